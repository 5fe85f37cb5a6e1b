"""Reading past bad records: each becomes an empty row, so that the positions of all others stay."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from spmd.data import Features, Source
from spmd.data.cache import beyond

Batch = dict[str, np.ndarray]


def known_bad(source: Any) -> Mapping[int, str]:
    """{example: why} of the records that a source knows to be bad since it was opened."""
    return getattr(source, "bad", None) or {}


class Skips:
    """Which records of one source cannot be read.

    limit: so many may pass, of all processes together (`merge`). Several threads may read.
    """

    def __init__(self, split: str = "train", limit: int = 0, features: Features | None = None):
        self.split, self.limit, self._features = split, limit, features or {}
        self.reasons: dict[int, str] = {}
        self._lock = threading.Lock()

    def take(self, source: Source, indices: np.ndarray) -> tuple[Batch, np.ndarray]:
        """(the examples at `indices` int64 [N], which of them are good: bool [N]); the others are zeros.

        ValueError that names the first example beyond the limit. Without a limit an error that is no
        ValueError is a fault of the source itself, and raised as it is.
        """
        known = known_bad(source)
        good_N = ~np.isin(indices, list(known)) if known else np.ones(len(indices), bool)
        try:
            return source.take(indices), good_N
        except MemoryError:
            raise
        except Exception as error:
            if not self.limit and not isinstance(error, ValueError):
                raise
            return self._singly(source, indices, good_N, error)

    def _singly(
        self, source: Source, indices: np.ndarray, good_N: np.ndarray, error: Exception
    ) -> tuple[Batch, np.ndarray]:
        rows: list[Batch | None] = []
        for index in indices:
            try:
                rows.append(source.take(np.array([index], np.int64)))
            except Exception as found:
                rows.append(None)
                self._add(int(index), found)
        good_N = good_N & np.array([row is not None for row in rows])
        if all(row is not None for row in rows):
            raise error  # of no single example
        like = next((row for row in rows if row is not None), None) or self._zeros(source)
        filled = [row or {name: np.zeros_like(x) for name, x in like.items()} for row in rows]
        return {name: np.concatenate([row[name] for row in filled]) for name in like}, good_N

    def _zeros(self, source: Source) -> Batch:
        """An empty row, shaped as declared or as an example that can be read."""
        if self._features:
            return {
                name: np.zeros((1, *shape), dtype)
                for name, (shape, dtype) in self._features.items()
            }
        for index in range(min(self.limit + 1, len(source))):
            try:
                return source.take(np.array([index], np.int64))
            except Exception as error:
                self._add(index, error)
        raise ValueError(f"no example of the {self.split} data can be read")

    def _add(self, index: int, error: Exception) -> None:
        said = " ".join(str(error).split())[:200]
        kind = "" if isinstance(error, ValueError) and said else f"{type(error).__name__}: "
        why = f"example {index} of the {self.split} data: {kind}{said}"
        with self._lock:
            self.reasons.setdefault(index, why)
            over = len(self.reasons) > self.limit
        if over:
            raise ValueError(beyond(why, self.limit)) from error

    def merge(self, found: Iterable[Mapping[str, str]]) -> int:
        """Takes in what all processes have found; returns how many bad records that makes.

        found: `reasons` of each process, as JSON gives them. ValueError beyond the limit, the same in all.
        """
        together = {int(i): why for reasons in found for i, why in reasons.items()}
        if len(together) > self.limit:
            raise ValueError(beyond(together[max(together)], self.limit))
        with self._lock:
            self.reasons |= together
        return len(together)
