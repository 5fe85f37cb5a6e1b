"""Records of the loop: seconds by phase, metrics fetched one step late."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from spmd.runtime.stop import Votes
from spmd.strategies import base, layers
from spmd.train import LogConfig, progress
from spmd.train.metrics import Writer


class NonFinite(ArithmeticError):
    """Loss or gradient became NaN or infinite."""


class Clock:
    """Seconds by phase. entering: (phase) -> a context manager that is open during the phase."""

    def __init__(self, entering: Callable[[str], contextlib.AbstractContextManager[None]]):
        self._entering = entering
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = dict.fromkeys(
            ("compile", "input", "step", "evaluation", "checkpoint"), 0.0
        )

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with self._entering(phase), jax.profiler.TraceAnnotation(phase):
                yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    def summary(self) -> dict[str, float]:
        """Seconds by phase, of the remainder, and in all."""
        total = time.perf_counter() - self._began
        seconds = self.seconds | {"other": total - sum(self.seconds.values()), "total": total}
        return {phase: round(value, 3) for phase, value in seconds.items()}


def check_finite(step: int, host: dict[str, np.ndarray]) -> None:
    """NonFinite when a step of the dispatch that ends at `step` was not finite.

    host: its metrics [steps].
    """
    bad = np.flatnonzero(host["finite"] == 0)
    if not len(bad):
        return
    first_bad = step - len(host["finite"]) + int(bad[0]) + 1
    norm = next(v for k, v in host.items() if k.endswith("grad_norm"))
    raise NonFinite(
        f"loss or gradient is not finite at step {first_bad} (loss {host['loss'][bad[0]]}, gradient norm"
        f" {norm[bad[0]]}); nothing of that step was saved. To continue from the newest checkpoint, type"
        " the same command with --run.amend and a lower --optimizer.learning-rate or an"
        " --optimizer.clip-norm, or skip such steps with --train.nonfinite skip"
    )


def weighted_mean(values_S: np.ndarray, weights_S: np.ndarray) -> float | None:
    """The weighted mean over the steps of positive weight; None where there is none.

    Args:
      values_S: a metric of each step, anything where its weight is 0.
      weights_S: not negative.
    """
    has_weight_S = weights_S > 0
    values, weights = values_S[has_weight_S], weights_S[has_weight_S]
    if not len(values):
        return None
    if (weights == weights[0]).all():
        return float(values.mean())
    return float(np.average(values.astype(np.float64), weights=weights.astype(np.float64)))


class Log:
    """Metrics of dispatches in flight; fetched late, so that the host never waits for the newest."""

    def __init__(
        self,
        writer: Writer,
        bar: progress.Bar,
        config: LogConfig,
        nonfinite: str,
        step: int,
        votes: Votes | None = None,
        layer_names: Sequence[str] = (),
        consumed: Callable[[int], Mapping[str, float]] | None = None,
    ):
        self._writer, self._bar, self._every = writer, bar, config.every
        self._stop_on_nonfinite = nonfinite == "stop"
        self._pending: collections.deque[tuple[int, base.Metrics]] = collections.deque()
        self._window: list[dict[str, np.ndarray]] = []
        self._reported = step
        self._votes = votes
        self._layer_names, self._consumed = layer_names, consumed
        self._layers: list[jax.Array] = []  # of the window, on the devices
        self.last = writer.last

    def add(self, step: int, metrics: base.Metrics, in_flight: int) -> None:
        """Add the metrics of the dispatch that ends at `step`; waits for the oldest of too many in flight."""
        self._pending.append((step, metrics))
        while len(self._pending) > in_flight:
            self._fetch()

    def drain(self) -> None:
        """Wait for all dispatches, whose metrics are then checked to be finite."""
        while self._pending:
            self._fetch()

    def _fetch(self) -> None:
        step, device = self._pending.popleft()
        if base.LAYERS in device:  # stays there until a line is written
            device = dict(device)
            self._layers.append(device.pop(base.LAYERS))
        # Not jax.device_get, which takes ten times as long for a few scalars.
        host = {k: np.atleast_1d(np.asarray(v)) for k, v in device.items()}
        host[base.WEIGHTS] = np.atleast_2d(host[base.WEIGHTS])
        if self._votes is not None and "stop" in host:
            self._votes.read(host.pop("stop"))
        if self._stop_on_nonfinite:
            check_finite(step, host)
        self._window.append(host)
        if step // self._every > self._reported // self._every:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Report the weighted means of the window; None for a metric without weight in it."""
        if not self._window:
            return
        columns = {k: np.concatenate([h[k] for h in self._window]) for k in self._window[0]}
        self._window = []
        weights_MS = columns.pop(base.WEIGHTS).T
        weights = dict(zip(base.weighed_names(columns), weights_MS, strict=True))
        values = {
            f"train/{k}": weighted_mean(v, weights[k]) for k, v in columns.items() if k != "finite"
        }
        values["train/learning_rate"] = float(columns["learning_rate"][-1])
        signal, noise = (values.get(f"train/gradient_{k}") for k in ("signal", "variance"))
        if (
            signal is not None and noise is not None and signal > 0
        ):  # else below what these steps can tell
            values["train/noise_scale"] = max(noise / signal, 0.0)
        values["train/skipped_steps"] = float((columns["finite"] == 0).sum())
        values |= self._layer_norms()
        if self._consumed is not None:
            values |= self._consumed(step)
        self.last = values
        self._reported = step
        self._writer.write(step, values | self._bar.report(step, values))

    def _layer_norms(self) -> dict[str, float]:
        """`layers/blocks/3/gradient_norm` and the others, of the newest step that measured them."""
        arrays, self._layers = self._layers, []
        for array in reversed(arrays):
            # [kinds, layers], or of each step of the dispatch
            for norms in reversed(
                np.asarray(array).reshape(-1, len(layers.KINDS), array.shape[-1])
            ):
                if not (norms == layers.UNMEASURED).all():
                    return {
                        f"layers/{name}/{kind}": float(norms[i, g])
                        for i, kind in enumerate(layers.KINDS)
                        for g, name in enumerate(self._layer_names)
                    }
        return {}
