"""Several processes on this machine: logs with prefixes, restarts; when a process dies, the others end."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from spmd.launch import base
from spmd.launch.base import Command, Job, check

POLL = 0.05  # seconds between polls of the processes
# Signal to the launcher -> signal to each process. After a closed terminal (SIGHUP) the run saves and stops.
FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalLaunch(base.LaunchOptions):
    """Processes on this machine."""

    processes: int = 1
    """Number of processes."""
    devices_per_process: int = 0
    """GPUs per process if there are GPUs, else simulated CPU devices; 0: the real devices."""
    restarts: int = 0
    """Largest number of restarts after the run was killed, lost a peer or saved on SIGTERM."""
    grace: float = 10.0
    """Seconds between SIGTERM and SIGKILL for the other processes when a process dies."""

    def start(self, job: Job) -> int:
        """Runs in the foreground; returns the exit code of the process that ended the run."""
        base.at_least("--processes", self.processes, 1)
        base.at_least("--devices-per-process", self.devices_per_process, 0)
        base.at_least("--restarts", self.restarts, 0)
        check(self.grace >= 0, f"--grace {self.grace} must not be negative")
        check(
            not job.extra, f"launch local takes nothing after --, but got {shlex.join(job.extra)}"
        )
        gpus = self._gpus(job)
        argv = [sys.executable, *base.PROGRAM, *job.words()]
        if self.devices_per_process and not gpus:
            argv += ["--simulate", str(self.devices_per_process)]
        if self.dry_run:
            envs = environments(self.processes, free_port(), gpus)
            lines = [Command(tuple(argv), env=env).shell() for env in envs]
            return base.show(*[f"{line} &" for line in lines[:-1]], lines[-1])
        with claim(job.dir, job.name), (job.dir / "log").open("ab", buffering=0) as log:
            return supervise(
                argv,
                processes=self.processes,
                restarts=self.restarts,
                grace=self.grace,
                gpus=gpus,
                log=log,
            )

    def stop(self, job: Job) -> int:
        """Sends SIGTERM to the launcher, which forwards it: the run saves and ends."""
        pid = running_process(job.dir)
        check(pid is not None, f"no job {job.name!r} is running here (in {job.dir})")
        assert pid is not None
        if self.dry_run:
            return base.show(Command(("kill", "-TERM", str(pid))))
        os.kill(pid, signal.SIGTERM)
        print(f"launch: asked {job.name} (process {pid}) to save and stop")
        while running_process(job.dir) == pid:
            time.sleep(POLL)
        return 0

    def logs(self, job: Job) -> int:
        """Prints the output of the job, with all its starts."""
        file = job.dir / "log"
        check(file.exists(), f"no job {job.name!r} was launched here (no {file})")
        follow = (
            ["--follow", f"--pid={running_process(job.dir)}"]
            if self.follow and running_process(job.dir)
            else []
        )
        command = Command(("tail", "--lines=+1", *follow, str(file)))
        return base.show(command) if self.dry_run else command.run()

    def _gpus(self, job: Job) -> list[list[str]]:
        """The GPUs of each process; empty without GPUs, or if they are not divided."""
        simulates = any(word.split("=")[0] == "--simulate" for word in job.fields)
        check(
            not (simulates and self.devices_per_process),
            "--simulate and --devices-per-process both set the number of devices; give one of them",
        )
        gpus = [] if simulates else visible_gpus()
        if not gpus:
            return []
        count, each = self.processes, self.devices_per_process
        check(
            bool(each) or count == 1,
            f"--processes {count} would each take all {len(gpus)} GPUs; give --devices-per-process"
            f" {max(len(gpus) // count, 1)}, or --simulate N for simulated CPU devices",
        )
        check(
            count * each <= len(gpus),
            f"--processes {count} x --devices-per-process {each} need {count * each} GPUs; there are"
            f" {len(gpus)}",
        )
        return [gpus[i * each : (i + 1) * each] for i in range(count)] if each else []


# ---- the environment of a process


def visible_gpus() -> list[str]:
    """Indices or ids for CUDA_VISIBLE_DEVICES; none if JAX_PLATFORMS selects the CPU."""
    if os.environ.get("JAX_PLATFORMS", "").lower() == "cpu":
        return []
    if (variable := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [g for g in variable.split(",") if g and g != "-1"]
    return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def environments(
    processes: int, port: int, gpus: Sequence[Sequence[str]] = ()
) -> list[dict[str, str]]:
    """Environment variables of each process: the address of its peers, and the GPUs that it sees.

    The coordinator is not authenticated: it listens on the loopback interface only.
    """
    address = f"127.0.0.1:{port}"
    peers = {
        "SPMD_COORDINATOR": address,
        "SPMD_COORDINATOR_BIND": address,
        "SPMD_NUM_PROCESSES": str(processes),
    }
    envs = [peers | {"SPMD_PROCESS_ID": str(i)} if processes > 1 else {} for i in range(processes)]
    visible = [{"CUDA_VISIBLE_DEVICES": ",".join(each)} for each in gpus] or [{}] * processes
    return [env | gpu for env, gpu in zip(envs, visible, strict=True)]


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- at most one job of a name


@contextlib.contextmanager
def claim(directory: Path, name: str) -> Iterator[None]:
    """Holds a lock on the job's pid file: unlike a number in a file, a lock ends with its process."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "pid").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"job {name!r} is running already (process {running_process(directory)}); give another"
                f" --name, or stop it: run.py launch local stop --experiment {name}"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def running_process(directory: Path) -> int | None:
    """Id of the process that holds the lock on the job's pid file, or None."""
    try:
        with (directory / "pid").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return int(file.read() or 0) or None
    except FileNotFoundError:
        pass
    return None


# ---- the processes


def supervise(
    argv: Sequence[str],
    *,
    processes: int,
    restarts: int = 0,
    grace: float = 10.0,
    gpus: Sequence[Sequence[str]] = (),
    log: IO[bytes] | None = None,
) -> int:
    """Runs `processes` copies of argv until they end; restarts them if that may help.

    Signals to this process are forwarded, each once. To be called from the main thread.

    Returns:
        The exit code of the process that ended the run, as in a shell.
    """
    output = Output(log)
    for start in range(restarts + 1):
        port = free_port()  # that of the last start may be taken by now
        job = {"SPMD_RUN_TOKEN": base.token(), "SPMD_RUN_ATTEMPT": str(start)}
        envs = [env | job for env in environments(processes, port, gpus)]
        code, signalled = ProcessGroup(argv, output, envs).run(grace)
        if signalled or not base.starts_again(code) or start == restarts:
            return code
        output.say(f"exit code {code}; start {start + 2} of at most {restarts + 1}")
    raise AssertionError("restarts is negative")


class Output:
    """Writes the lines of all processes to standard output and the log, without mixing them."""

    def __init__(self, log: IO[bytes] | None):
        self._log, self._lock, self._shown = log, threading.Lock(), True

    def write(self, line: bytes) -> None:
        with self._lock:
            if self._log is not None:
                self._log.write(line)
            if self._shown:
                try:
                    sys.stdout.buffer.write(line)
                    sys.stdout.buffer.flush()
                except OSError:  # the reader of a pipe is gone; the run and its log continue
                    self._shown = False

    def say(self, text: str) -> None:
        self.write(f"launch: {text}\n".encode())

    def copy(self, index: int, pipe: IO[bytes]) -> None:
        """Copies a process's output until it closes."""
        with pipe:
            for line in pipe:
                self.write(b"[%d] " % index + line.removesuffix(b"\n") + b"\n")


class ProcessGroup:
    """The processes of a start, each in its own session so that it gets only the launcher's signals."""

    def __init__(self, argv: Sequence[str], output: Output, envs: Sequence[Mapping[str, str]]):
        peers = environments(2, 0)[0]  # variables of an outer launcher are not passed on
        ambient = {k: v for k, v in os.environ.items() if k not in peers}
        self._argv, self._envs = argv, [ambient | dict(env) for env in envs]
        self._output, self._signal, self._forwarded = output, 0, False
        self._started = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []

    def run(self, grace: float) -> tuple[int, int]:
        """Runs until all have ended; returns (exit code, the signal that this process received or 0)."""
        previous_handlers = {s: signal.signal(s, self._forward) for s in FORWARDED}
        try:
            for index, env in enumerate(self._envs):
                self._spawn(index, env)
            self._started = True
            if (
                self._signal and not self._forwarded
            ):  # it came while the processes were being started
                self._kill(self._signal)
            return self._wait(grace), self._signal
        finally:
            self._kill(signal.SIGKILL, whole_session=True)  # also their remaining children
            for process in self._processes:
                process.wait()
            for reader in self._readers:
                reader.join(timeout=5)
            for signum, handler in previous_handlers.items():
                signal.signal(signum, handler)

    def _spawn(self, index: int, env: Mapping[str, str]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", EXEC_WITH_PARENT, str(os.getpid()), *self._argv],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        reader = threading.Thread(
            target=self._output.copy, args=(index, process.stdout), daemon=True
        )
        reader.start()
        self._processes.append(process)
        self._readers.append(reader)

    def _wait(self, grace: float) -> int:
        """Exit code of the process that ended the run. After the first death, the others have `grace`
        seconds.
        """
        while True:
            codes = {i: p.poll() for i, p in enumerate(self._processes)}
            dead = {i: base.exit_code(c) for i, c in codes.items() if c}
            if dead or all(c == 0 for c in codes.values()):
                break
            time.sleep(POLL)
        if not dead:
            return 0
        # If several died at once, report the cause: the loss of a peer is a consequence.
        index, code = min(dead.items(), key=lambda item: base.starts_again(item[1]))
        if any(c is None for c in codes.values()):
            if not self._signal:
                self._output.say(f"process {index} ended with exit code {code}; ending the others")
                self._kill(signal.SIGTERM)
            deadline = time.monotonic() + grace
            while any(p.poll() is None for p in self._processes) and time.monotonic() < deadline:
                time.sleep(POLL)
        return code

    def _forward(self, signum: int, frame: object) -> None:
        self._signal = FORWARDED[signal.Signals(signum)]
        if self._started:
            self._forwarded = True
            self._kill(self._signal)

    def _kill(self, signum: int, *, whole_session: bool = False) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if whole_session:
                    os.killpg(process.pid, signum)
                else:
                    process.send_signal(signum)  # does nothing after the process was reaped


# Executes argv; on Linux the kernel kills it together with its parent.
EXEC_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):  # the parent died before the request
        os._exit(137)
os.execvp(sys.argv[2], sys.argv[2:])
"""
