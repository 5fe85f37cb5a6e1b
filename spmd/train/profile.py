"""Trace a window of steps with JAX's profiler, for xprof, TensorBoard or Perfetto."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath

from spmd.core.storage import is_remote
from spmd.runtime import agree


class Profile:
    """Traces the dispatches that hold the steps of `window` (`A:B`, both included; "" is none).

    Writes RUN/profile/plugins/profile/steps-A-B/process-N.*, one for each process, in a single session that
    xprof shows side by side. The host waits for the devices at both ends of the window only.
    """

    def __init__(
        self, window: str, directory: epath.Path, step: int, num_steps: int, per_dispatch: int
    ):
        self._directory, self._per_dispatch = directory / "profile", per_dispatch
        self._began = self._at = step
        self._local: tempfile.TemporaryDirectory[str] | None = None
        self._first, self._last = map(int, window.split(":")) if window else (0, 0)
        self._waiting = bool(window)
        if self._waiting and (self._last <= step or self._first > num_steps):
            self._waiting = False
            agree.say(f"no profile: --log.profile {window} is outside steps {step + 1}:{num_steps}")

    def start_at(self, step: int, drain: Callable[[], None]) -> None:
        """Starts the trace when the dispatch after `step` reaches the window."""
        if self._waiting and step + self._per_dispatch >= self._first:
            self._waiting = False
            drain()
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python calls would outnumber the steps
            self._local = tempfile.TemporaryDirectory(prefix="spmd-profile-")
            jax.profiler.start_trace(self._local.name, profiler_options=options)
            self._began = step

    def stop_at(self, step: int, drain: Callable[[], None]) -> bool:
        """Ends the trace when `step` completes the window; returns whether it did."""
        self._at = step
        if self._local is None or step < self._last:
            return False
        drain()
        self._finish()
        return True

    def close(self) -> None:
        """Ends an open trace: the run ends within the window."""
        if self._local is not None:
            self._finish()

    def discard(self) -> None:
        """End an open trace and discard it: the run has not begun."""
        if self._local is not None:
            jax.profiler.stop_trace()
            self._local.cleanup()
            self._local = None

    def _finish(self) -> None:
        """Moves the files from this host to the run directory, each under its process's name."""
        assert self._local is not None
        local, self._local = self._local, None
        jax.profiler.stop_trace()
        session = f"steps-{self._began + 1}-{self._at}"
        target = self._directory / "plugins" / "profile" / session
        if not is_remote(target):
            target.mkdir(parents=True, exist_ok=True)
        index, _ = agree.process()
        for suffix in (".xplane.pb", ".trace.json.gz"):
            for file in Path(local.name).glob(f"plugins/profile/*/*{suffix}"):
                (target / f"process-{index}{suffix}").write_bytes(file.read_bytes())
        local.cleanup()
        agree.say(
            f"profile of steps {self._began + 1} to {self._at}: xprof --logdir {self._directory}"
            " (pip install xprof)"
        )
