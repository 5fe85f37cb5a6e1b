"""Ends a process that no longer moves, so that the launcher can start the run again."""

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

_TOLD = 10.0  # seconds between what a process tells the others of itself


class Watchdog:
    """Counts the seconds since the last `beat`. Past the limit it prints where each process is and where this
    one's threads stand, and leaves with EXIT_AGAIN: a hung collective cannot be cancelled from inside.
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
        """The process moves: it is at `phase` of `step`."""
        self._at = (phase, step)
        self._last = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what takes as long as it takes: a compilation."""
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
        told = 0.0
        while not self._done.wait(min(1.0, self._limit / 4)):
            now = time.monotonic()
            if agree.joined() and now - told >= _TOLD:
                told = now
                self._tell()
            if not self._paused and now - self._last > self._limit:
                self._leave()

    def _tell(self) -> None:
        index, _ = agree.process()
        with contextlib.suppress(Exception):  # a lost coordinator shows elsewhere
            agree.store().key_value_set(
                f"spmd/beat/{index}",
                json_text([*self._at, time.time() - (time.monotonic() - self._last)]),
                allow_overwrite=True,
            )

    def _leave(self) -> None:
        phase, step = self._at
        lines = [
            f"no progress for {self._limit:g} s, at: {phase}, step {step}; leaving with exit code"
            f" {EXIT_AGAIN}, the last checkpoint stands (--runtime.hang-timeout)"
        ]
        if agree.joined():
            self._tell()
            lines += where()
        print("\n".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(EXIT_AGAIN)


def where() -> list[str]:
    """A line for each process: what it last said of itself."""
    _, num = agree.process()
    lines = []
    for index in range(num):
        try:
            said = agree.store().key_value_try_get(f"spmd/beat/{index}")
            phase, step, moved = json.loads(said)
            lines.append(
                f"  process {index}: {phase}, step {step}, {time.time() - moved:.0f} s ago"
            )
        except Exception:  # nothing said, or the coordinator is gone
            lines.append(f"  process {index}: silent")
    return lines
