"""Tables opened: their files, formats and splits; what is not mapped is converted once."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from spmd.core.fields import check
from spmd.core.storage import cache_root, is_remote
from spmd.data import cache as caches
from spmd.data import content, files, grouped
from spmd.data.tables import SUFFIXES, columns
from spmd.data.tables.arrow import ArrowRows, Unmappable
from spmd.data.tables.parquet import ParquetRows, open_file

if TYPE_CHECKING:
    from spmd.data.tables import Table

_ROWS = 2**16  # of a record batch that is written


class TableSource:
    """Rows of a split, by random access."""

    def __init__(self, rows: Any, split: grouped.Held):
        self._rows, self._split = rows, split
        self.missing: dict[str, int] = dict(rows.missing)

    def __len__(self) -> int:
        return int(self._split.count(np.array([len(self._rows)]))[0])

    def take(self, indices: np.ndarray) -> dict[str, Any]:
        """Rows at `indices` int64 [N]."""
        return self._rows.take(self._split.locate(indices))


class GroupedSource(TableSource):
    """Rows of row groups, which are read together."""

    def order(self, seed: int) -> grouped.GroupOrder:
        """Groups shuffled, then the rows of a window: the loader asks for it."""
        return grouped.GroupOrder(seed, self._split.count(self._rows.edges), self._rows.window)


def files_of(config: Table, split: str) -> list[str]:
    """The files of a split."""
    own = split == "eval" and config.eval_files
    option = "data.eval_files" if own else "data.files"
    paths = files.matching(config.eval_files if own else config.files, option, SUFFIXES)
    for path in paths:
        check(
            path.lower().endswith(SUFFIXES),
            f"{path} ({option}) is no table; what works: {', '.join(SUFFIXES)}",
        )
    kinds = sorted({_kind(path) for path in paths})
    check(
        len(kinds) == 1, f"{option} matches files of several formats: {', '.join(kinds)}; give one"
    )
    return paths


def _kind(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    return {"feather": "arrow", "ndjson": "jsonl"}.get(suffix[1:], suffix[1:])


def open_split(config: Table, split: str) -> TableSource:
    """The rows of a split; ValueError where values are missing that may not be."""
    paths = files_of(config, split)
    every = 0 if config.eval_files else round(1 / config.eval_fraction)
    held = grouped.Held(None, every, held=split == "eval")
    rows = _rows(config, paths)
    source = (GroupedSource if isinstance(rows, ParquetRows) else TableSource)(rows, held)
    check_missing(config, rows, paths[0])
    return source


def check_missing(config: Any, rows: Any, path: str) -> None:
    """ValueError, with their counts, where values are missing that may not be.

    config: of the table: features, columns, what takes the place of missing values. rows: opened.
    """
    total = sum(rows.missing.values())
    shown = ", ".join(f"{name} ({num} of {len(rows)})" for name, num in rows.missing.items())
    check(
        not total or config.missing != "error" or config.skip_bad > 0,
        f"{path}: values are missing in {shown}; take --data.missing nan or zero in their place, or leave"
        " such rows out with --data.skip-bad N",
    )
    if total and config.missing == "nan":
        whole = [
            n for n, (_, dtype) in config.features.items() if dtype.startswith(("int", "uint"))
        ]
        without = [n for n in whole if rows.missing.keys() & set(config.columns_of(n))]
        check(
            not without,
            f"data.missing=nan: feature {', '.join(without)} holds whole numbers, which have no NaN; declare"
            " float32, or take --data.missing zero",
        )


def _rows(config: Table, paths: list[str]) -> Any:
    kind = _kind(paths[0])
    about = (config.features, config.columns, config.missing)
    if kind == "parquet" and not config.convert:
        return ParquetRows(paths, *about, config.window)
    if kind == "arrow" and not is_remote(paths[0]):
        try:
            return ArrowRows(paths, *about)
        except Unmappable:
            pass
    return ArrowRows([_converted(config, paths, kind)], *about)


# ---- conversion


def _converted(config: Table, paths: list[str], kind: str) -> str:
    """The table as an Arrow IPC file in the cache, written once."""
    entries = content.describe_files(paths, config.cache_dir)
    times = [0 if is_remote(p) else os.stat(p).st_mtime_ns for p in paths]
    wanted = sorted((k, tuple(s), d, config.columns_of(k)) for k, (s, d) in config.features.items())
    key = hashlib.sha256(repr((entries, times, wanted, pa.__version__)).encode()).hexdigest()[:16]
    cache = Path(cache_root(config.cache_dir)) / "tables" / f"{Path(paths[0]).stem}-{key}"
    if not caches.read_facts(cache):
        size = sum(e.size for e in entries) / 1e6
        print(
            f"converting {len(paths)} {kind} files of {size:.1f} MB to Arrow IPC in {cache}",
            file=sys.stderr,
            flush=True,
        )
        caches.build(cache, lambda part: _write(config, paths, kind, part))
    return str(cache / "table.arrow")


def _write(config: Table, paths: list[str], kind: str, part: Path) -> dict[str, Any]:
    num, writer, path = 0, None, ""
    try:
        for path in paths:
            for batch in _batches(config, path, kind):
                if writer is None:
                    writer = pa.ipc.new_file(str(part / "table.arrow"), batch.schema)
                writer.write_batch(batch)
                num += batch.num_rows
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    finally:
        if writer is not None:
            writer.close()
    check(num > 0, f"{paths[0]}: no rows; give files that have some")
    return {"rows": num}


def _batches(config: Table, path: str, kind: str) -> Iterator[pa.RecordBatch]:
    """The columns of a file that are read, in record batches."""
    wanted = {c: dtype for n, (s, dtype) in config.features.items() for c in config.columns_of(n)}
    scalar = {
        c
        for n, (shape, dtype) in config.features.items()
        for c in config.columns_of(n)
        if dtype != "bytes" and (not shape or len(config.columns_of(n)) > 1)
    }
    types = {c: pa.from_numpy_dtype(np.dtype(wanted[c])) for c in scalar}
    source = files.bucket().open(path) if is_remote(path) else path
    if kind == "parquet":
        file = open_file(path)
        columns.match(file.schema_arrow, config.features, config.columns, path)
        yield from file.iter_batches(_ROWS, columns=list(wanted))
        return
    if kind == "arrow":
        table = pa.ipc.open_file(source).read_all()
        yield from table.select(list(wanted)).to_batches(_ROWS)
        return
    yield from _text_batches(source, path, kind, wanted, types)


def _text_batches(source: Any, path: str, kind: str, wanted: Any, types: Any) -> Iterator[Any]:
    from pyarrow import csv, json

    if kind == "jsonl":
        schema = pa.schema(list(types.items()))
        options = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="infer")
        reader: Any = json.open_json(source, parse_options=options)
    else:
        parse = csv.ParseOptions(delimiter="\t" if kind == "tsv" else ",")
        convert = csv.ConvertOptions(column_types=types)
        reader = csv.open_csv(source, parse_options=parse, convert_options=convert)
    with reader:
        for name in wanted:
            if name not in reader.schema.names:
                columns.match(reader.schema, {name: ((), "float32")}, {}, path)
        for batch in reader:
            yield batch.select(list(wanted))
