"""Runs of several processes on this machine, as a launcher would start them."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command import free_port, start


class Group:
    """The processes of one run; their output as it comes."""

    def __init__(self, processes: list[subprocess.Popen[str]]):
        self.processes = processes
        self.out = [""] * len(processes)
        self.err = [""] * len(processes)
        self._readers = [
            threading.Thread(target=self._read, args=(texts, i, stream), daemon=True)
            for i, process in enumerate(processes)
            for texts, stream in ((self.out, process.stdout), (self.err, process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, texts: list[str], index: int, stream) -> None:
        with stream:
            for line in stream:
                texts[index] += line

    def until(self, pattern: str, index: int = 0, timeout: float = 240) -> re.Match[str]:
        """Waits for a line of a process's standard output."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if match := re.search(pattern, self.out[index]):
                return match
            if self.processes[index].poll() is not None:
                break
            time.sleep(0.01)
        raise AssertionError(f"no {pattern!r} in:\n{self.text()}")

    def wait(self, timeout: float = 240) -> list[int]:
        """The exit codes, once all have ended."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.wait(max(end - time.monotonic(), 0.1))
        for reader in self._readers:
            reader.join(10)
        return [process.returncode for process in self.processes]

    def text(self) -> str:
        """Everything that was printed."""
        return "\n".join(
            f"---- {i} ({p.returncode})\n{self.out[i]}{self.err[i]}"
            for i, p in enumerate(self.processes)
        )


@pytest.fixture
def start_group(tmp_path: Path) -> Iterator[Callable[..., Group]]:
    """`start_group(2, "--experiment", "digits")`: that many processes of one run, in tmp_path."""
    groups: list[Group] = []

    def go(
        num: int, *args: str | int | Path, each: list[list[str]] | None = None, **kwargs
    ) -> Group:
        port = free_port()
        shared = {"SPMD_COORDINATOR": f"127.0.0.1:{port}", "SPMD_NUM_PROCESSES": str(num)}
        group = Group(
            [
                start(
                    *args,
                    *(each[i] if each else []),
                    cwd=tmp_path,
                    env=shared | {"SPMD_PROCESS_ID": str(i)} if num > 1 else {},
                    **kwargs,
                )
                for i in range(num)
            ]
        )
        groups.append(group)
        return group

    yield go
    for group in groups:
        for process in group.processes:
            process.kill()
        group.wait()
