"""Logs of users and items as arrays: read from text, CSV, Parquet or Arrow, or generated."""

# E events, as read

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv, ipc, parquet

from spmd.core.fields import check, closest
from spmd.core.storage import is_remote
from spmd.data import files as data_files

SEPARATORS = ("\t", "::", "|", ",", ";", " ")


class Events(NamedTuple):
    """A log, each [E]. user, item: raw ids, integers or text. time: None where there is none."""

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray | None

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> Events:
        """Events at `rows`, numbers or a mask."""
        time = None if self.time is None else self.time[rows]
        return Events(self.user[rows], self.item[rows], self.rating[rows], time)


def read(paths: Sequence[str], columns: Sequence[str], option: str) -> Events:
    """The events of files, one file after the other.

    Args:
        paths: text (u.data, u1.base), .csv, .tsv, .parquet or .arrow files.
        columns: names of user, item, rating and time; of a text without a header the order of its columns.
        option: the field that names the files, for messages.

    Returns:
        All events. A log without ratings has 1 for each; without times, no times.

    Raises:
        ValueError: a file is missing, or a column is, or has values that are none.
    """
    for path in filter(is_remote, paths):
        raise ValueError(
            f"{option}={path!r} is in a bucket; copy the log to a disk and name it there"
        )
    parts = [_read_file(data_files.locate(path, option), columns) for path in paths]
    timed = all(part.time is not None for part in parts)
    join = lambda name: np.concatenate([getattr(part, name) for part in parts])
    kinds = {part.user.dtype.kind + part.item.dtype.kind for part in parts}
    check(len(kinds) == 1, f"{option}: ids are numbers in one file and text in another")
    return Events(join("user"), join("item"), join("rating"), join("time") if timed else None)


def _read_file(path: str, columns: Sequence[str]) -> Events:
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; name the file of the log, as {path}/u.data")
    try:
        table = _open(path, columns)
    except (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{path} is no log that can be read: {reason}") from None
    user, item, rating, time = columns
    for name in (user, item):
        check(
            name in table.column_names,
            f"{path} has no column {name!r}.{closest(name, table.column_names)} It has:"
            f" {', '.join(table.column_names[:12])}; name user, item, rating and time by data.columns",
        )
    check(table.num_rows > 0, f"{path} has no events")
    return Events(
        _ids(table, user, path),
        _ids(table, item, path),
        _numbers(table, rating, path, np.float32, default=1.0),
        _numbers(table, time, path, np.int64) if time in table.column_names else None,
    )


def _open(path: str, columns: Sequence[str]) -> pa.Table:
    if path.endswith(".parquet"):
        return parquet.read_table(path)
    if path.endswith((".arrow", ".feather")):
        with pa.memory_map(path) as source:
            return ipc.open_file(source).read_all()
    with open(path, "rb") as file:
        text = file.read()
    first = text.partition(b"\n")[0].decode("utf-8", "replace").strip("\r")
    separator = next((s for s in SEPARATORS if s in first), "\t")
    words = [word.strip('"') for word in first.split(separator)]
    if separator == "::":
        text, separator = text.replace(b"::", b"\t"), "\t"
    headed = columns[0] in words or columns[1] in words
    check(
        headed or (len(words) >= 2 and words[0].strip() != ""),
        f"{path}: its first line, {first[:60]!r}, is neither a header with {columns[0]!r} and"
        f" {columns[1]!r}, nor an event (user, item, rating, time)",
    )
    named = None if headed else [*columns[: len(words)], *map(str, range(len(words) - 4))]
    if not headed and not _is_number(words[2] if len(words) > 2 else "1"):
        raise ValueError(
            f"{path}: its first line, {first[:60]!r}, names no columns {columns[0]!r} and {columns[1]!r}, and"
            " is no event (user, item, rating, time); name the columns by data.columns"
        )
    options = csv.ReadOptions(column_names=named)
    return csv.read_csv(io.BytesIO(text), options, csv.ParseOptions(delimiter=separator))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _ids(table: pa.Table, name: str, path: str) -> np.ndarray:
    """Ids [E]: int64 where all are whole numbers, else text."""
    column = table[name]
    check(column.null_count == 0, f"{path}: column {name!r} has {column.null_count} empty values")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_integer(column.type):
        return column.to_numpy().astype(np.int64)
    check(
        pa.types.is_string(column.type) or pa.types.is_large_string(column.type),
        f"{path}: column {name!r} is {column.type}, and ids are whole numbers or text",
    )
    return np.array(column.to_pylist(), dtype=np.str_)


def _numbers(
    table: pa.Table, name: str, path: str, dtype: type, default: float = 0.0
) -> np.ndarray:
    if name not in table.column_names:
        return np.full(table.num_rows, default, dtype)
    column = table[name]
    check(column.null_count == 0, f"{path}: column {name!r} has {column.null_count} empty values")
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    check(
        pa.types.is_integer(column.type) or pa.types.is_floating(column.type),
        f"{path}: column {name!r} is {column.type}, and {'a rating' if default else 'a time'} is a number",
    )
    values = column.to_numpy()
    check(
        bool(np.isfinite(values).all()), f"{path}: column {name!r} has values that are no numbers"
    )
    return values.astype(dtype)


def read_titles(path: str) -> dict[str, str]:
    """{item: title} of lines `item|title|...` (u.item) or `item<tab>title`; else than UTF-8, ISO-8859-1."""
    with open(data_files.locate(path, "data.titles"), "rb") as file:
        raw = file.read()
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("iso-8859-1")
    lines = [line.replace("\t", "|").replace("::", "|").split("|") for line in text.splitlines()]
    return {words[0].strip(): words[1].strip() for words in lines if len(words) > 1}
