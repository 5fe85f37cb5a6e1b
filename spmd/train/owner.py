"""The owner of a run directory: its name, and its relation to another process."""

from __future__ import annotations

import os
import socket
import time
import uuid
from typing import Any

# Set by launchers: an id of the launch, the same for all its starts, and the number of the start, if a start
# begins only after the previous one is dead. Slurm has its own.
_LAUNCH = ("SPMD_RUN_TOKEN", "SLURM_JOB_ID")
_START = ("SPMD_RUN_ATTEMPT", "SLURM_RESTART_COUNT")
ENDING = 600.0
"""Seconds that a start waits for one of the same launch that is still saving (pods of a JobSet overlap)."""


class Busy(ValueError):
    """Another process owns the run directory. facts: its name, {} where the directory has none."""

    def __init__(self, path: Any, facts: dict[str, Any]):
        super().__init__(
            f"{path} is in use by {describe(facts)}: wait for it, stop it (kill -TERM saves first), or"
            " choose another directory with --run.dir"
        )


def describe(facts: dict[str, Any]) -> str:
    """An owner as `process 12 on host, since 2026-11-29 07:15:53 +0000`."""
    if {"pid", "host", "since"} <= facts.keys():
        return f"process {facts['pid']} on {facts['host']}, since {facts['since']}"
    return "another process"


def this_process() -> dict[str, Any]:
    """This process, as the lock file names it."""
    first_set = lambda names: next(filter(None, map(os.environ.get, names)), "")
    start = first_set(_START)
    slurm = not os.environ.get("SPMD_RUN_TOKEN")  # its first start has no count
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "process_started": _start_time(os.getpid()),
        "machine": _machine(),
        "launch": first_set(_LAUNCH),
        "start": int(start) if start.isdecimal() else 0 if slurm else -1,
        "token": uuid.uuid4().hex,
    }


def relation(facts: dict[str, Any], name: dict[str, Any]) -> str:
    """The relation of this process, `name`, to the owner `facts` of a directory, without waiting.

    Returns:
      "ended": the owner is dead, by the process table of this machine or by their common launcher;
      "alive"; "ending": the launcher has begun to stop it; "" when it is unknown.
    """
    machine = name["machine"]
    if machine and facts.get("machine") == machine:
        started = _start_time(int(facts.get("pid", 0)))
        return "alive" if started and started == facts.get("process_started") else "ended"
    if not name["launch"] or facts.get("launch") != name["launch"]:
        return ""
    if name["start"] < 0:
        return "ending"
    return "ended" if facts.get("start", 0) < name["start"] else ""


def _machine() -> str:
    """An id of this boot of the machine and its process table; "" where the system has none."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """The start of a process of this machine, in ticks since the boot; "" when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
