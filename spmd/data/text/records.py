"""Records of text files: named columns of Parquet, JSON lines, TSV and CSV, and lines of aligned files."""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spmd.core.fields import check, closest
from spmd.core.storage import is_remote
from spmd.data import content, files
from spmd.data.content import Content, Entry

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".tsv", ".csv", ".jsonl.gz", ".tsv.gz")


class Record(NamedTuple):
    """Values of the columns that are read. bad: why there are none."""

    values: tuple[Any, ...]
    bad: str = ""


class Records(NamedTuple):
    """The records of a split.

    name: for messages. key: identifies them in the cache. read: yields them in order. content: identifies
    them in a run.
    """

    name: str
    key: str
    read: Callable[[], Iterator[Record]]
    content: Content


def from_columns(
    globs: Sequence[str],
    columns: Sequence[str],
    option: str,
    cache_dir: str,
    *,
    partial: bool = False,
) -> Records:
    """Columns of the records of files.

    Args:
        globs: files, globs or folders.
        columns: names of the columns.
        option: the field of the globs, for messages.
        cache_dir: where digests of large files are kept.
        partial: a record may lack columns, whose values are then None.

    Raises:
        ValueError: no file matches, or one is of no format that is read.
    """
    paths = _local_files(globs, option, SUFFIXES)
    for path in paths:
        check(
            path.lower().endswith(SUFFIXES),
            f"{path} ({option}) is not read as records; what works: {', '.join(SUFFIXES)}",
        )

    def read() -> Iterator[Record]:
        for path in paths:
            yield from _read_file(path, tuple(columns), partial)

    return _records(paths, repr((columns, partial) if partial else columns), read, cache_dir)


def from_lines(globs: Sequence[Sequence[str]], options: Sequence[str], cache_dir: str) -> Records:
    """Records whose values are lines of the same number in text files; each file is aligned with another.

    Args:
        globs: for each value its files, in the same order.
        options: the fields of the globs, for messages.
        cache_dir: where digests of large files are kept.

    Raises:
        ValueError: the numbers of files differ; later, the numbers of their lines.
    """
    sides = [_local_files(g, option) for g, option in zip(globs, options, strict=True)]
    counts = [len(side) for side in sides]
    check(
        len(set(counts)) == 1,
        f"{' and '.join(options)} name {' and '.join(map(str, counts))} files: each file needs its"
        " counterpart, in the same order",
    )

    def read() -> Iterator[Record]:
        for paths in zip(*sides, strict=True):
            yield from _read_aligned(paths)

    return _records([path for side in sides for path in side], "lines", read, cache_dir)


def from_memory(name: str, rows: Sequence[tuple[Any, ...]]) -> Records:
    """Records that an experiment file makes."""
    digest = hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    entry = Entry(f"{len(rows)} records", len(rows), digest.hexdigest()[:32])
    read = lambda: (Record(tuple(row)) for row in rows)
    return Records(name, repr(entry), read, [entry])


def _records(
    paths: Sequence[str], kind: str, read: Callable[[], Iterator[Record]], cache_dir: str
) -> Records:
    entries = content.describe_files(paths, cache_dir)
    # The time of modification shows a change in the middle of a file.
    times = [os.stat(path).st_mtime_ns for path in paths]
    key = repr((kind, [(*e, t) for e, t in zip(entries, times, strict=True)]))
    return Records(Path(paths[0]).name.split(".")[0], key, read, entries)


def _local_files(globs: Sequence[str], option: str, suffixes: Sequence[str] = ()) -> list[str]:
    for pattern in globs:
        check(
            not is_remote(pattern),
            f"{option}={pattern!r}: text is read from a local disk; copy it there first"
            " (gcloud storage cp)",
        )
    return files.matching(globs, option, suffixes)


def _read_file(path: str, columns: tuple[str, ...], partial: bool) -> Iterator[Record]:
    """The records of one file; ValueError where it cannot be read to its end."""
    kind = path.lower().removesuffix(".gz").rpartition(".")[2]
    readers = {"parquet": _read_parquet, "csv": _read_table, "tsv": _read_table}
    try:
        yield from readers.get(kind, _read_json)(path, columns, partial)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read to its end: {error}") from None


def _read_parquet(path: str, columns: tuple[str, ...], partial: bool) -> Iterator[Record]:
    from spmd.data.tables.parquet import open_file

    file = open_file(path)
    present = file.schema_arrow.names
    if not partial:
        _check_columns(path, columns, present)
    named = [name for name in columns if name in present]
    for batch in file.iter_batches(2**14, columns=named):
        of = lambda name, batch=batch: batch.column(name).to_pylist()
        values = [of(name) if name in present else [None] * batch.num_rows for name in columns]
        yield from (Record(row) for row in zip(*values, strict=True))


def _read_table(path: str, columns: tuple[str, ...], partial: bool) -> Iterator[Record]:
    """Records of a table with a header; TSV knows no quotes."""
    tabs = ".tsv" in path.lower()
    with _open_text(path) as lines:
        rows: Iterator[list[str]] = (
            (line.rstrip("\r\n").split("\t") for line in lines) if tabs else csv.reader(lines)
        )
        header = next(rows, [])
        if not partial:
            _check_columns(path, columns, header)
        places = [header.index(name) if name in header else None for name in columns]
        for number, row in enumerate(rows, 2):
            if len(row) != len(header):
                wrong = f"{len(row)} fields, and the header has {len(header)}"
                yield Record((), f"{path}, line {number}: {wrong}")
            else:
                yield Record(tuple(None if place is None else row[place] for place in places))


def _read_json(path: str, columns: tuple[str, ...], partial: bool) -> Iterator[Record]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Record((), f"{path}, line {number}: not JSON: {error}")
                continue
            if not isinstance(record, dict):
                yield Record((), f"{path}, line {number}: no JSON object")
                continue
            if not partial:
                _check_columns(f"{path}, line {number}", columns, record)
            yield Record(tuple(record.get(name) for name in columns))


def _read_aligned(paths: Sequence[str]) -> Iterator[Record]:
    """The lines of aligned files; ValueError where one has fewer."""
    streams = [_open_text(path) for path in paths]
    try:
        for number, lines in enumerate(itertools.zip_longest(*streams), 1):
            ended = [path for path, line in zip(paths, lines, strict=True) if line is None]
            check(
                not ended,
                f"{' and '.join(ended)} ends after {number - 1} lines, and its counterpart has more: the"
                f" lines of {' and '.join(paths)} must be aligned",
            )
            yield Record(tuple(line.strip() for line in lines))
    finally:
        for stream in streams:
            stream.close()


def _open_text(path: str) -> Any:
    """A text file, .gz too, lines ended by a line feed only, as aligned files count them."""
    opened: Any = gzip.open if path.lower().endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8-sig", newline="\n")


def _check_columns(place: str, columns: Sequence[str], present: Any) -> None:
    for name in columns:
        check(
            name in present,
            f"{place}: no column {name!r}.{closest(name, present)} It has: {', '.join(present)}",
        )
