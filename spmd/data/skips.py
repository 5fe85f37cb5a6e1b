"""Bad records of a source: each becomes an empty row, so that the positions of the others do not change."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from spmd.data import Features, Source, ragged
from spmd.data.cache import limit_message

Batch = dict[str, np.ndarray]


def bad_records(source: Any) -> Mapping[int, str]:
    """{example: reason} of the records that a source found to be bad when it was opened."""
    return getattr(source, "bad", None) or {}


class Skips:
    """The records of a source that cannot be read.

    limit: how many may pass, over all processes (`merge`). Several threads may read.
    """

    def __init__(self, split: str = "train", limit: int = 0, features: Features | None = None):
        self.split, self.limit, self._features = split, limit, features or {}
        self.reasons: dict[int, str] = {}
        self._lock = threading.Lock()

    def take(self, source: Source, indices: np.ndarray) -> tuple[Batch, np.ndarray]:
        """(the examples at `indices` int64 [N], whether each is good: bool [N]); bad ones are zeros.

        ValueError that names the first example beyond the limit. Without a limit, an error that is no
        ValueError is a fault of the source, and raised unchanged.
        """
        bad = bad_records(source)
        good_N = ~np.isin(indices, list(bad)) if bad else np.ones(len(indices), bool)
        try:
            return ragged.columns(source.take(indices)), good_N
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
                rows.append(ragged.columns(source.take(np.array([index], np.int64))))
            except Exception as problem:
                rows.append(None)
                self._add(source, int(index), problem)
        good_N = good_N & np.array([row is not None for row in rows])
        if all(row is not None for row in rows):
            raise error  # it belongs to no single example
        example = next((row for row in rows if row is not None), None) or self._zeros(source)
        filled = [
            row or {name: ragged.zeros_like(x) for name, x in example.items()} for row in rows
        ]
        return {name: np.concatenate([row[name] for row in filled]) for name in example}, good_N

    def _zeros(self, source: Source) -> Batch:
        """An empty row with the declared shapes, or those of an example that can be read."""
        if self._features:
            return {
                name: ragged.zeros(1, shape, dtype)
                for name, (shape, dtype) in self._features.items()
            }
        for index in range(min(self.limit + 1, len(source))):
            try:
                return ragged.columns(source.take(np.array([index], np.int64)))
            except Exception as error:
                self._add(source, index, error)
        raise ValueError(f"no example of the {self.split} data can be read")

    def note(self, source: Source, index: int, reason: str) -> None:
        """Count an example that a transform found to be bad; ValueError beyond the limit."""
        self._add(source, index, ValueError(reason))

    def _add(self, source: Source, index: int, error: Exception) -> None:
        text = " ".join(str(error).split())[:200]
        kind = "" if isinstance(error, ValueError) and text else f"{type(error).__name__}: "
        name_of = getattr(source, "name_of", None)  # of a source whose examples are files, say
        named = f" ({name_of(index)})" if name_of else ""
        reason = f"example {index}{named} of the {self.split} data: {kind}{text}"
        with self._lock:
            self.reasons.setdefault(index, reason)
            exceeded = len(self.reasons) > self.limit
        if exceeded:
            raise ValueError(limit_message(reason, self.limit)) from error

    def merge(self, reports: Iterable[Mapping[str, str]]) -> int:
        """Add the bad records that all processes report; returns how many there are.

        reports: `reasons` of each process, as JSON types. ValueError beyond the limit, the same in all.
        """
        reasons = {int(i): reason for report in reports for i, reason in report.items()}
        if len(reasons) > self.limit:
            raise ValueError(limit_message(reasons[max(reasons)], self.limit))
        with self._lock:
            self.reasons |= reasons
        return len(reasons)
