"""Parquet by row groups: those of the window that is read are held in memory, as numpy arrays."""

# N rows, G groups

from __future__ import annotations

import collections
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from spmd.core.fields import check
from spmd.core.storage import is_remote
from spmd.data import files as disks
from spmd.data import ragged
from spmd.data.tables import columns
from spmd.data.tables.columns import Feature

WINDOW_BYTES = 2**28  # of the rows that are shuffled together


def open_file(path: str, metadata: Any = None) -> Any:
    """A Parquet file, its footer read; ValueError where it is none."""
    try:
        source = disks.bucket().open(path) if is_remote(path) else path
        return pq.ParquetFile(source, metadata=metadata)
    except Exception as error:  # of the reader, whatever its kind
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{path} is no Parquet file that can be read: {reason}") from None


class ParquetRows:
    """The rows of Parquet files, numbered through.

    Args:
      paths: the files.
      features: {name: (shape, dtype)}.
      names: {feature: its columns}.
      missing: "error", "nan" or "zero".
      window: rows that the reader needs at the same time, about.
    """

    def __init__(
        self,
        paths: Sequence[str],
        features: Mapping[str, tuple[tuple[int, ...], str]],
        names: Mapping[str, Sequence[str]],
        missing: str,
        window: int,
    ):
        self._paths, self._fail = list(paths), missing == "error"
        self._fill = float("nan") if missing == "nan" else 0.0
        self._metadata: list[Any] = []
        self._groups: list[tuple[int, int]] = []  # (file, row group in it)
        sizes: list[int] = []
        num_bytes = 0
        self._features: tuple[Feature, ...] = ()
        self.missing: collections.Counter[str] = collections.Counter()
        for number, path in enumerate(paths):
            file = open_file(path)
            self._features = columns.match(file.schema_arrow, features, names, path)
            self._metadata.append(file.metadata)
            self._names = [c.name for f in self._features for c in f.columns]
            for group in range(file.metadata.num_row_groups):
                about = file.metadata.row_group(group)
                if about.num_rows:
                    self._groups.append((number, group))
                    sizes.append(about.num_rows)
                    num_bytes += self._count(about)
        check(bool(sizes), f"{paths[0]}: no rows; give files that have some")
        self.edges = np.cumsum([0, *sizes])
        per_row = max(num_bytes // int(self.edges[-1]), 1)
        self.window = max(min(window, WINDOW_BYTES // per_row), 1)
        self._allocate(max(sizes))

    def _count(self, group: Any) -> int:
        """Bytes of the columns read of a row group; its missing values are noted where they are known."""
        size = 0
        for i in range(group.num_columns):
            column = group.column(i)
            name = column.path_in_schema
            if name not in self._names and name.partition(".")[0] not in self._names:
                continue
            size += column.total_uncompressed_size
            statistics = column.statistics
            if statistics is not None and statistics.has_null_count and statistics.null_count:
                self.missing[name.partition(".")[0]] += statistics.null_count
        return size

    def _allocate(self, largest: int) -> None:
        """Places for the groups of two windows: when one ends, the next one has begun."""
        num = min(2 * -(-self.window // largest) + 4, len(self._groups))
        # Uneven groups: places for all of a window.
        if self.edges[-1] // len(self._groups) < largest // 2:
            average = max(int(self.edges[-1]) // len(self._groups), 1)
            num = min(2 * -(-self.window // average) + 4, len(self._groups))
        self._largest = largest
        self._arrays = {
            f.name: ragged.column([b""] * (num * largest))
            if f.dtype == ragged.BYTES
            else np.empty((num * largest, *f.shape), f.dtype)
            for f in self._features
        }
        self._missing = {f.name: np.zeros(num * largest, bool) for f in self._features}
        self._place_G = np.full(len(self._groups), -1, np.int64)  # -1: the group is not held
        self._used: collections.OrderedDict[int, int] = collections.OrderedDict()  # group -> place
        self._free = list(range(num))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.edges[-1])

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `indices` int64 [N] -> {feature: [N, ...]}."""
        group_N = np.searchsorted(self.edges, indices, side="right") - 1
        local_N = indices - self.edges[group_N]
        needed = np.unique(group_N)
        num_places = len(self._place_G[self._place_G >= 0]) + len(self._free)
        # Access without the window: as many groups at a time as there are places.
        if len(needed) > num_places:
            return self._take_in_parts(indices, group_N, needed, num_places)
        with self._lock:
            for group in needed:
                self._load(int(group), needed)
            at_N = self._place_G[group_N] * self._largest + local_N
            batch = {name: x.take(at_N, axis=0) for name, x in self._arrays.items()}
            missing = {name: x.take(at_N) for name, x in self._missing.items()}
        if self._fail:
            for name, missing_N in missing.items():
                columns.refuse_missing(missing_N, indices, name)
        return batch

    def _take_in_parts(
        self, indices: np.ndarray, group_N: np.ndarray, needed: np.ndarray, num_places: int
    ) -> dict[str, np.ndarray]:
        out: dict[str, np.ndarray] = {}
        for first in range(0, len(needed), num_places):
            rows = np.flatnonzero(np.isin(group_N, needed[first : first + num_places]))
            for name, x in self.take(indices[rows]).items():
                array = out.setdefault(name, np.empty((len(indices), *x.shape[1:]), x.dtype))
                array[rows] = x
        return out

    def _load(self, group: int, needed: np.ndarray) -> None:
        """Read a group into a place, that of the group that was not used for longest."""
        if group in self._used:
            self._used.move_to_end(group)
            return
        if self._free:
            place = self._free.pop()
        else:
            wanted = set(needed.tolist())
            oldest = next(g for g in self._used if g not in wanted)
            place = self._used.pop(oldest)
            self._place_G[oldest] = -1
        try:
            self._read(group, place)
        except BaseException:
            self._free.append(place)
            raise
        self._used[group] = place
        self._place_G[group] = place

    def _read(self, group: int, place: int) -> None:
        number, at = self._groups[group]
        path = self._paths[number]
        file = open_file(path, self._metadata[number])
        try:
            table = file.read_row_group(at, columns=self._names)
        except Exception as error:  # of the reader, whatever its kind
            reason = " ".join(str(error).split())[:150]
            raise ValueError(f"{path}: row group {at} cannot be read: {reason}") from None
        rows = slice(place * self._largest, place * self._largest + table.num_rows)
        for feature in self._features:
            parts, missing = [], np.zeros(table.num_rows, bool)
            for column in feature.columns:
                values, missing_N = columns.to_numpy(
                    table.column(column.name.partition(".")[0]), column, self._fill
                )
                parts.append(values)
                if missing_N is not None:
                    missing |= missing_N
            self._arrays[feature.name][rows] = columns.join(parts, feature)
            self._missing[feature.name][rows] = missing
