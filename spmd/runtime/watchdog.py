"""Exit from a process that makes no progress, so that the launcher can restart the run."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator

from spmd.core.storage import json_text
from spmd.runtime import EXIT_AGAIN, agree

_REPORT_SECONDS = 10.0  # between the reports of a process about its progress


class Watchdog:
    """Counts the seconds since the last `beat`. Past the limit it prints the phase of each process and the
    stacks of this one's threads, and exits with EXIT_AGAIN: a hung collective cannot be cancelled.
    """

    def __init__(self, limit: float):
        self._limit = limit
        self._at = ("starting", 0)
        self._last = time.monotonic()
        self._paused = 0
        self._done = threading.Event()
        if limit:
            threading.Thread(target=self._watch, daemon=True).start()

    def beat(self, phase: str, step: int) -> None:
        """Record progress: the process is in `phase` of `step`."""
        self._at = (phase, step)
        self._last = time.monotonic()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stop counting during the body, whose duration has no limit: a compilation."""
        self._paused += 1
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._paused -= 1

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        reported = 0.0
        while not self._done.wait(min(1.0, self._limit / 4)):
            now = time.monotonic()
            if agree.has_peers() and now - reported >= _REPORT_SECONDS:
                reported = now
                self._tell()
            if not self._paused and now - self._last > self._limit:
                self._leave()

    def _tell(self) -> None:
        index, _ = agree.process()
        with contextlib.suppress(Exception):  # a lost coordinator is reported elsewhere
            agree.store().key_value_set(
                f"spmd/beat/{index}",
                json_text([*self._at, time.time() - (time.monotonic() - self._last)]),
                allow_overwrite=True,
            )

    def _leave(self) -> None:
        phase, step = self._at
        lines = [
            f"no progress for {self._limit:g} s, at: {phase}, step {step}; leaving with exit code"
            f" {EXIT_AGAIN}, the last checkpoint is kept (--runtime.hang-timeout)"
        ]
        if agree.has_peers():
            self._tell()
            lines += process_reports()
        print("\n".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(EXIT_AGAIN)


def process_reports() -> list[str]:
    """A line for each process with its last report."""
    _, num = agree.process()
    lines = []
    for index in range(num):
        try:
            report = agree.store().key_value_try_get(f"spmd/beat/{index}")
            phase, step, moved_at = json.loads(report)
            lines.append(
                f"  process {index}: {phase}, step {step}, {time.time() - moved_at:.0f} s ago"
            )
        except Exception:  # no report yet, or the coordinator has exited
            lines.append(f"  process {index}: silent")
    return lines
