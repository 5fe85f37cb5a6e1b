"""The owner of a run directory: how a process names itself, and what one owner can tell of another."""

from __future__ import annotations

import os
import socket
import time
import uuid
from typing import Any

# Set by launchers: the launch, the same for all its starts, and the number of the start, where they begin one
# only when the one before is dead. Slurm has its own.
_LAUNCH = ("SPMD_RUN_TOKEN", "SLURM_JOB_ID")
_START = ("SPMD_RUN_ATTEMPT", "SLURM_RESTART_COUNT")
ENDING = 600.0
"""Seconds that a start waits for one of the same launch that is still saving (pods of a JobSet overlap)."""


class Busy(ValueError):
    """Another process owns the run directory. found: its name, {} where the directory does not say."""

    def __init__(self, path: Any, found: dict[str, Any]):
        super().__init__(
            f"{path} is in use by {described(found)}: wait for it, stop it (kill -TERM saves first), or"
            " choose another directory with --run.dir"
        )


def described(found: dict[str, Any]) -> str:
    """`process 12 on host, since 2026-11-29 07:15:53 +0000`."""
    if {"pid", "host", "since"} <= found.keys():
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    return "another process"


def this() -> dict[str, Any]:
    """This process, as the lock file names it."""
    found = lambda names: next(filter(None, map(os.environ.get, names)), "")
    start = found(_START)
    slurm = not os.environ.get("SPMD_RUN_TOKEN")  # its first start has no count
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "process_started": _started(os.getpid()),
        "machine": _machine(),
        "launch": found(_LAUNCH),
        "start": int(start) if start.isdecimal() else 0 if slurm else -1,
        "token": uuid.uuid4().hex,
    }


def relation(found: dict[str, Any], name: dict[str, Any]) -> str:
    """How this process relates to the owner that it found, judged without waiting.

    Returns:
      "ended": it is dead, by the process table of this machine or by the word of the launcher of both;
      "alive"; "ending": the launcher has begun to end it; "" when nothing can be told.
    """
    here = name["machine"]
    if here and found.get("machine") == here:
        started = _started(int(found.get("pid", 0)))
        return "alive" if started and started == found.get("process_started") else "ended"
    if not name["launch"] or found.get("launch") != name["launch"]:
        return ""
    if name["start"] < 0:
        return "ending"
    return "ended" if found.get("start", 0) < name["start"] else ""


def _machine() -> str:
    """This boot of this machine and its table of processes; "" where the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine began, in ticks since the boot; "" when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
