"""Graceful stopping: a signal to any process stops all at one agreed step, within the grace period."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.runtime import EXIT_AGAIN, outlet

# SIGHUP: the terminal has closed. SIGXCPU: a batch system's time limit is near (SGE, LSF).
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Stop:
    """State of a request to stop.

    signum: the first signal that this process received, 0 for none. phase: the current activity. outcome: a
    sentence about the checkpoint that remains if no other is saved. The loop sets the last two.
    """

    def __init__(self, wake: int):
        self.signum = 0
        self.phase = "starting"
        self.outcome = "nothing was saved yet"
        self._wake = wake

    def begin_stopping(self, signum: int) -> None:
        """Record that the processes agreed to stop: the grace period begins in this one too."""
        if signum and not self.signum:
            self.signum = signum
            os.write(self._wake, bytes([signum]))


@contextlib.contextmanager
def catch_signals(grace: float) -> Iterator[Stop]:
    """Catch SIGINT, SIGTERM, SIGHUP and SIGXCPU, except those that are ignored (nohup).

    The loss of the terminal, or of the reader of the output, counts as such a signal. A second SIGINT exits
    at once; `grace` seconds after the first signal the process exits with EXIT_AGAIN in any phase, before
    it is killed in the middle of a save.
    """
    # Python's handlers wait while the main thread compiles; the wake-up pipe and its thread do not.
    read, write = os.pipe()
    os.set_blocking(write, False)
    stop = Stop(write)

    def handler(signum: int, frame: Any) -> None:
        del frame
        stop.signum = stop.signum or signum

    previous: dict[int, Any] = {}
    previous_wakeup = -1
    with contextlib.suppress(ValueError):  # not in the main thread: signals are the caller's
        for signum in _SIGNALS:
            if signal.getsignal(signum) is signal.SIG_IGN and signum != signal.SIGINT:
                continue  # nohup
            previous[signum] = signal.signal(signum, handler)
        previous_wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(read, stop, grace), daemon=True)
    watcher.start()
    try:
        with outlet.guard(stop.begin_stopping):
            yield stop
    finally:
        if previous:
            signal.set_wakeup_fd(previous_wakeup)
        for signum, old in previous.items():
            signal.signal(signum, old)
        os.write(write, b"\0")
        watcher.join()
        os.close(write)
        os.close(read)


def _watch(read: int, stop: Stop, grace: float) -> None:
    """Read signal numbers until 0: announce the first, exit at a second SIGINT or after the grace period."""
    deadline: float | None = None
    while True:
        seconds_left = None if deadline is None else max(deadline - time.monotonic(), 0)
        if not select.select([read], [], [], seconds_left)[0]:
            _say(
                f"the grace period of {grace:g} s is over, at: {stop.phase}; {stop.outcome}. The same command"
                " resumes from there (--runtime.grace SECONDS)"
            )
            os._exit(EXIT_AGAIN)
        signum = os.read(read, 1)[0]
        if not signum:
            return
        if deadline is not None and signum == signal.SIGINT:
            _say(f"exited at once; {stop.outcome}")
            os._exit(130)
        if deadline is None and signum in (*_SIGNALS, getattr(signal, "SIGPIPE", None)):
            deadline = time.monotonic() + grace
            _say("stopping: saving the state (Ctrl-C again leaves at once)")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal has gone
        os.write(2, f"\n{text}\n".encode())


_SECONDS_APART = 0.5  # between votes
_MAX_DISPATCHES = 16  # between votes: later dispatches may be slower


class Votes:
    """Votes of all processes on whether to stop, within the stream of steps.

    Each process casts a vote with a dispatch and reads it with that dispatch's metrics: all read the same
    votes at the same step, without an extra wait, in whichever phase the signal arrived. Short dispatches do
    not all carry one: a vote also proposes the number of dispatches until the next, and the least is taken.

    agreed: the signal that all have agreed to stop for; 0 for none.
    """

    def __init__(self, mesh: Mesh):
        self.agreed = 0
        self._spread, self._size = NamedSharding(mesh, P(mesh.axis_names)), mesh.size
        self._votes: dict[tuple[int, int], jax.Array] = {}
        self._highest = jax.jit(lambda x: x.max(0), out_shardings=NamedSharding(mesh, P()))
        self._dispatch = self._due = 0
        self._last = 0, time.monotonic()  # dispatch and time of the newest vote

    def cast(self, signum: int) -> dict[str, jax.Array]:
        """Metrics that carry the vote of a dispatch, {} where it carries none; called with each dispatch."""
        self._dispatch += 1
        if self._dispatch <= self._due:
            return {}
        previous, now = self._last, time.monotonic()
        self._last = self._dispatch, now
        seconds = (now - previous[1]) / (self._dispatch - previous[0])
        return {"stop": self._highest(self._vote(signum, int(_SECONDS_APART / max(seconds, 1e-6))))}

    def read(self, vote: np.ndarray) -> None:
        """Take the result of a vote, int32 [2], in all processes after the same dispatch."""
        self.agreed = max(self.agreed, int(vote[0]))
        self._due = max(self._due, self._dispatch - int(vote[1]))

    def ask(self, signum: int) -> None:
        """Vote and wait for the result."""
        self.agreed = max(self.agreed, int(self._highest(self._vote(signum, 0))[0]))

    def _vote(self, signum: int, dispatches: int) -> jax.Array:
        """int32 [devices, 2]: the signal, and the number of dispatches without a vote, negated."""
        vote = signum, -min(dispatches, _MAX_DISPATCHES)
        if vote not in self._votes:
            rows = lambda index: np.tile(
                np.array(vote, np.int32), (len(range(self._size)[index[0]]), 1)
            )
            shape = (self._size, 2)
            self._votes[vote] = jax.make_array_from_callback(shape, self._spread, rows)
        return self._votes[vote]
