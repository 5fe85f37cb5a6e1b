"""Arrow IPC files mapped into memory: rows are gathered from the file itself, whatever its record batches."""

# N rows

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from spmd.core.fields import check
from spmd.data import ragged
from spmd.data.tables import columns
from spmd.data.tables.columns import Column, Feature

_EXTRA = 8  # bytes by which the view of a file may end early


class Unmappable(Exception):
    """The file is compressed: its values are not in it as they are in memory."""


class ArrowRows:
    """The rows of Arrow IPC files or streams, numbered through.

    Args:
      paths: files on a local disk, not compressed.
      features: {name: (shape, dtype)}.
      names: {feature: its columns}.
      missing: "error", "nan" or "zero".

    Raises:
      Unmappable: a file is compressed.
    """

    def __init__(
        self,
        paths: Sequence[str],
        features: Mapping[str, tuple[tuple[int, ...], str]],
        names: Mapping[str, Sequence[str]],
        missing: str,
    ):
        self._fail, self._nan = missing == "error", missing == "nan"
        self._files = [_File(path, features, names) for path in paths]
        self.missing = sum((f.missing for f in self._files), collections.Counter())
        self._ends = np.cumsum([len(f) for f in self._files])
        check(len(self) > 0, f"{paths[0]}: no rows; give files that have some")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `indices` int64 [N] -> {feature: [N, ...]}."""
        if len(self._files) == 1:
            return self._part(self._files[0], indices, indices)
        file_N = np.searchsorted(self._ends, indices, side="right")
        out: dict[str, np.ndarray] = {}
        for number in np.unique(file_N):
            rows = np.flatnonzero(file_N == number)
            file = self._files[number]
            local = indices[rows] - (self._ends[number] - len(file))
            for name, x in self._part(file, local, indices[rows]).items():
                array = out.setdefault(name, np.empty((len(indices), *x.shape[1:]), x.dtype))
                array[rows] = x
        return out

    def _part(self, file: _File, local: np.ndarray, indices: np.ndarray) -> dict[str, np.ndarray]:
        batch, at = {}, file.locate(local)
        for feature in file.features:
            if feature.name in file.joined:
                batch[feature.name] = file.gather_joined(feature, at)
                continue
            parts, missing = [], np.zeros(len(local), bool)
            for column in feature.columns:
                values, missing_N = file.gather(column, local, at)
                if missing_N is not None:
                    missing |= missing_N
                    if values.dtype.kind == "f" and missing_N.any():
                        values[missing_N] = np.nan if self._nan else 0
                parts.append(values)
            if self._fail:
                columns.refuse_missing(missing, indices, feature.name)
            batch[feature.name] = columns.join(parts, feature)
        return batch


class _File:
    """A mapped file. Each column is a view of the whole file in the type of its values: a value of row r of
    record batch b is at element start[b] + r of it.
    """

    def __init__(self, path: str, features: Any, names: Any):
        try:
            self._map = pa.memory_map(path)
            table = _read(self._map)
        except pa.ArrowInvalid as error:
            reason = " ".join(str(error).split())[:150]
            raise ValueError(f"{path} is no Arrow IPC file that can be read: {reason}") from None
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
        self.features = columns.match(table.schema, features, names, path)
        self._map.seek(0)
        buffer = self._map.read_buffer()
        self._bytes = np.frombuffer(buffer, np.uint8)
        self._address, self._size = buffer.address, buffer.size
        self._table, self._length = table, table.num_rows  # the table keeps what is mapped
        self.missing: collections.Counter[str] = collections.Counter()
        self._columns = {
            c.name: self._view(table, c) for feature in self.features for c in feature.columns
        }
        self.joined = self._join()

    def __len__(self) -> int:
        return self._length

    def _view(self, table: pa.Table, column: Column) -> Any:
        chunks = _chunks(table, column)
        sizes = [len(c) for c in chunks]
        self._edges = np.cumsum([0, *sizes])
        if null := sum(c.null_count for c in chunks):
            self.missing[column.name.partition(".")[0]] += null
        if column.dtype == ragged.BYTES:
            return [c.cast(pa.large_binary()) if _is_text(c.type) else c for c in chunks], None
        missing = np.concatenate([np.asarray(c.is_null()) for c in chunks]) if null else None
        values = [c.flatten() if column.width else c for c in chunks]
        width = column.width or 1
        for chunk, flat in zip(chunks, values, strict=True):
            check(
                len(flat) == width * len(chunk) and not (column.width and flat.null_count),
                f"column {column.name!r}: not every list has {width} values",
            )
        kind = values[0].type if values else pa.int8()
        is_bool = pa.types.is_boolean(kind)
        dtype = np.dtype(np.uint8 if is_bool else kind.to_pandas_dtype())
        starts = [self._start(v, dtype, is_bool) for v in values]
        end = (self._size // dtype.itemsize) * dtype.itemsize
        view = self._bytes[:end].view(dtype)
        return (view, np.array(starts, np.int64), is_bool), missing

    def _start(self, values: pa.Array, dtype: np.dtype, is_bool: bool) -> int:
        """Element of the file's view at which a chunk begins; of bits, their number."""
        data = values.buffers()[-1]
        if data is None or not len(values):
            return 0
        at = data.address - self._address
        if not 0 <= at <= self._size - min(data.size, _EXTRA) or (at % dtype.itemsize):
            raise Unmappable
        return at * 8 + values.offset if is_bool else at // dtype.itemsize + values.offset

    def _join(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{feature: (view, starts [batches, columns])} of features whose columns are gathered as one."""
        joined = {}
        for feature in self.features:
            parts = [self._columns[c.name] for c in feature.columns]
            if feature.dtype == ragged.BYTES or feature.columns[0].width:
                continue
            views = [about[0] for about, _ in parts]
            alike = all(view.dtype == views[0].dtype for view in views)
            plain = not any(about[2] or missing is not None for about, missing in parts)
            if alike and plain:
                starts = np.stack([about[1] for about, _ in parts], axis=1)
                joined[feature.name] = (views[0], starts)
        return joined

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(record batch, row in it), int64 [N] each."""
        batch_N = np.searchsorted(self._edges, rows, side="right") - 1
        return batch_N, rows - self._edges[batch_N]

    def gather_joined(self, feature: Feature, at: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The values of a feature of `joined` [N, ...]. at: of each row, as `locate` gives it."""
        view, starts = self.joined[feature.name]
        batch_N, local = at
        taken = view.take(local[:, None] + starts[batch_N])
        values = columns.cast(taken, feature.dtype, feature.columns[0].name)
        return values.reshape(len(local), *feature.shape)

    def gather(
        self, column: Column, rows: np.ndarray, located: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(values of rows [N] or [N, width], bool [N] where they are missing, or None)."""
        about, missing = self._columns[column.name]
        batch_N, local = located
        if column.dtype == ragged.BYTES:
            values = [about[b][int(i)].as_py() for b, i in zip(batch_N, local, strict=True)]
            none = np.array([v is None for v in values])
            return ragged.column([v or b"" for v in values]), none if none.any() else None
        view, starts, is_bool = about
        at = local * (column.width or 1) + starts[batch_N]
        if column.width:
            at = at[:, None] + np.arange(column.width)
        taken = view.take(at >> 3) >> (at & 7).astype(np.uint8) & 1 if is_bool else view.take(at)
        values = columns.cast(taken.astype(bool) if is_bool else taken, column.dtype, column.name)
        return values, None if missing is None else missing.take(rows)


def _read(source: Any) -> pa.Table:
    """A file or a stream of record batches, without a copy."""
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()


def _chunks(table: pa.Table, column: Column) -> list[pa.Array]:
    name, _, field = column.name.partition(".")
    if name not in table.column_names:
        name, field = column.name, ""
    chunks = [c for c in table.column(name).chunks if len(c)]
    chunks = [c.storage if isinstance(c, pa.ExtensionArray) else c for c in chunks]
    return [c.field(field) for c in chunks] if field else chunks


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
