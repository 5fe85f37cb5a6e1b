"""Sources over arrays in memory or mapped from disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from spmd.core.fields import check, closest
from spmd.data import Features, ragged


def _is_encoded(values: Any) -> bool:
    """Whether a feature is a list of bytes: encoded images, say."""
    return isinstance(values, list) and bool(values) and isinstance(values[0], bytes)


class ArraySource:
    """Examples `start` to `stop` of arrays with a common first dim; `take` is one gather each.

    bad: {row of the arrays: why it could not be read}; kept by the number of the example.
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],
        features: Features | None = None,
        start: int = 0,
        stop: int | None = None,
        bad: Mapping[int, str] | None = None,
    ):
        # Mapped files as plain arrays: the indexing of np.memmap, in Python, takes twice as long as take.
        arrays = {
            name: ragged.column(a) if _is_encoded(a) else np.asarray(a)
            for name, a in arrays.items()
        }
        for name, (shape, dtype) in (features or {}).items():
            check(
                name in arrays,
                f"data has no feature {name!r}.{closest(name, arrays)} It has: {', '.join(arrays)}",
            )
            a = arrays[name]
            if dtype == ragged.BYTES and a.dtype.hasobject:
                continue
            check(
                a.shape[1:] == tuple(shape) and a.dtype == dtype,
                f"feature {name!r} is {a.dtype}{list(a.shape[1:])}, the experiment declares"
                f" {dtype}{list(shape)}",
            )
        self._arrays = {name: arrays[name] for name in (features or arrays)}
        sizes = {name: len(a) for name, a in self._arrays.items()}
        check(bool(sizes), "the data has no features")
        check(len(set(sizes.values())) == 1, f"features differ in length: {sizes}")
        total = next(iter(sizes.values()))
        self._start, self._stop = start, total if stop is None else stop
        check(self._stop > self._start, "the split holds no examples")
        self.bad = {
            i - start: reason for i, reason in (bad or {}).items() if start <= i < self._stop
        }

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The examples as arrays."""
        return {name: a[self._start : self._stop] for name, a in self._arrays.items()}

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Examples at `indices` int64 [N]."""
        rows = indices + self._start
        return {name: a.take(rows, axis=0) for name, a in self._arrays.items()}
