"""An index of images: CSV, JSONL or Parquet, a row for each image."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spmd.core.fields import check, closest
from spmd.core.storage import is_remote
from spmd.data import files

if TYPE_CHECKING:
    from spmd.data.folders import Rows
    from spmd.data.images import Images

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


def read(config: Images, path: str, *, labelled: bool) -> Rows:
    """The rows of an index. labelled: False where classes, masks and columns may be missing."""
    from spmd.data.folders import Rows

    table = _table(path, (config.image_column, config.mask_column, config.group_by))
    folder = posixpath.dirname(path) if is_remote(path) else os.path.dirname(path)
    join = posixpath.join if is_remote(path) else os.path.join
    place = lambda pattern, values: [pattern.replace("{}", str(x)) for x in values]
    column = _column(table, config.image_column, "data.image_column", path)
    names = place(config.image_pattern, column)
    check(bool(names), f"{path} has no rows; give an index of images")
    labels, masks, columns = [""] * len(names), list[str](), {}
    if config.target == "label" and (labelled or config.label_column in table):
        labels = [str(x) for x in _column(table, config.label_column, "data.label_column", path)]
    if config.target == "mask" and labelled:
        column = _column(table, config.mask_column, "data.mask_column", path)
        masks = [join(folder, name) for name in place(config.mask_pattern, column)]
    for name in config.columns:
        if labelled or name in table:
            columns[name] = _numbers(_column(table, name, "data.columns", path), name, path)
        else:
            columns[name] = np.zeros(len(names), np.float32)
    groups = names
    if config.group_by and labelled:
        groups = [str(x) for x in _column(table, config.group_by, "data.group_by", path)]
    return Rows(names, [join(folder, n) for n in names], labels, groups, masks, columns, [])


def _column(table: dict[str, list[Any]], name: str, option: str, path: str) -> list[Any]:
    check(
        name in table,
        f"{path} has no column {name!r} ({option}).{closest(name, table)} It has: {', '.join(table)}",
    )
    missing = [i for i, x in enumerate(table[name]) if x is None or x == ""]
    check(
        not missing,
        f"{path}: column {name!r} is empty in {len(missing)} of {len(table[name])} rows, first in row"
        f" {missing[0] + 1 if missing else 0}; fill it in, or remove these rows",
    )
    nested = [i for i, x in enumerate(table[name]) if isinstance(x, dict | list | bytes)]
    kind = "bytes" if nested and isinstance(table[name][nested[0]], bytes) else "nested"
    check(
        not nested,
        f"{path}: column {name!r} ({option}) is {kind} in row {nested[0] + 1 if nested else 0}; it must hold"
        " text or numbers: flatten it. Images within Parquet are read by Table (docs/data.md)",
    )
    return table[name]


def _numbers(values: Sequence[Any], name: str, path: str) -> np.ndarray:
    for i, value in enumerate(values):
        check(
            isinstance(value, int | float),
            f"{path}: column {name!r} holds {value!r} in row {i + 1}; data.columns are numbers",
        )
    return np.array(values, np.float32)


def _table(path: str, texts: Sequence[str]) -> dict[str, list[Any]]:
    """The columns of an index. texts: those that a CSV file gives as they are written, 0001 say."""
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    suffix = posixpath.splitext(path)[1].lower()
    check(
        suffix in SUFFIXES,
        f"{path} is neither a folder nor an index of images ({', '.join(SUFFIXES)})",
    )
    data = pa.BufferReader(files.read(path))
    try:
        if suffix in (".csv", ".tsv"):
            options = csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",")
            types = csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string()))
            table = csv.read_csv(data, parse_options=options, convert_options=types)
        elif suffix == ".parquet":
            table = parquet.read_table(data)
        else:
            table = json.read_json(data)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    return table.to_pydict()
