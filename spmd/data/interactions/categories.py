"""Logs with categorical columns: text or numbers of any kind as rows of a vocabulary for each column."""

# N examples as read, E rows of the log

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from spmd.core.fields import check, closest, located
from spmd.data import DataConfig, Source, Split
from spmd.data.interactions.vocabulary import Vocabulary
from spmd.data.transform import uniform

if TYPE_CHECKING:
    import pyarrow as pa

    from spmd.data.content import Content

_DRAW = 2**41  # of the rows to evaluate on; transforms draw at other numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class CategoryLog(DataConfig):
    """Rows of a log: features `numbers`, `label`, and for each categorical column the row of its value.

    The vocabulary of a column has the values of the training rows in ascending order; the row after the last
    is that of all others, and of missing values. It is built once, and recorded by the run. The log is read
    into memory.
    """

    files: tuple[str, ...] = located(())
    """Files of the log: .parquet, .arrow, .csv or .tsv with a header."""
    eval_files: tuple[str, ...] = located(())
    """Files to evaluate on; without any, eval_fraction."""
    eval_fraction: float = 0.1
    """Share of the rows to evaluate on where no files are given for it, at random."""
    numbers: tuple[str, ...] = ()
    """Columns of numbers."""
    categories: tuple[str, ...] = ()
    """Categorical columns; model.features of a DLRM."""
    label: str = "label"
    """Column of labels, 0 or 1."""
    least: int = 1
    """Values that occur fewer times share the row of unknown ones."""
    vocabularies: tyro.conf.Suppress[tuple[tuple[str, ...], ...]] = ()
    """Values of each categorical column, in the order of their rows; recorded by the run."""

    def __post_init__(self) -> None:
        check(
            len(self.numbers) > 0 and len(self.categories) > 0,
            "data.numbers and data.categories name the columns that are read; give one or more of each",
        )
        check(
            0 < self.eval_fraction <= 0.5,
            f"data.eval_fraction={self.eval_fraction} must be more than 0 and at most 0.5",
        )
        check(self.least >= 1, f"data.least={self.least} must be at least 1")
        features: dict[str, Any] = {"numbers": ((len(self.numbers),), "float32")}
        features |= dict.fromkeys(self.categories, ((), "int32")) | {"label": ((), "int32")}
        object.__setattr__(self, "features", features)
        super().__post_init__()

    def found(self, recorded: Mapping[str, Any] | None = None) -> CategoryLog:
        """With the vocabularies: those that a run recorded, or of the training rows."""
        if self.vocabularies or (not self.files and recorded is None):
            return self
        words = (recorded or {}).get("vocabularies") or [v.record() for v in self._built]
        return dataclasses.replace(self, vocabularies=tuple(map(tuple, words)))

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each categorical column, the unknown one included: model.ids of a DLRM."""
        return tuple(len(words) + 1 for words in self.vocabularies)

    def check_model(self, model: Any) -> None:
        """ValueError where a model that has `ids` has not as many as there are rows."""
        ids = getattr(model, "ids", None)
        check(
            ids is None or not self.vocabularies or tuple(ids) == self.rows,
            f"model.ids={' '.join(map(str, ids or ()))}, and the columns {', '.join(self.categories)} have"
            f" values, the unknown one included: --model.ids {' '.join(map(str, self.rows))}",
        )

    def open(self, split: Split) -> Source:
        """The rows of a split in memory."""
        from spmd.data.sources import ArraySource

        config = self.found()
        table, kept = config._table(split)
        arrays = {
            "numbers": np.stack([_numbers(table, name) for name in self.numbers], axis=1),
            "label": _numbers(table, self.label).astype(np.int32),
        }
        for name, words in zip(self.categories, config.vocabularies, strict=True):
            values, missing = _values(table, name)
            vocabulary = Vocabulary.restore(words)
            row = np.where(missing, len(vocabulary), vocabulary.index(values))
            arrays[name] = row.astype(np.int32)
        return ArraySource({name: x[kept] for name, x in arrays.items()}, self.features)

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """The files."""
        from spmd.data import content

        return content.describe_files((*self.files, *self.eval_files))

    @functools.cached_property
    def _built(self) -> list[Vocabulary]:
        table, kept = self._table("train")
        built = []
        for name in self.categories:
            values, missing = _values(table, name)
            built.append(Vocabulary.build(values[kept & ~missing], self.least))
            check(len(built[-1]) > 0, f"column {name!r} has no value in {self.least} rows or more")
        return built

    def _table(self, split: Split) -> tuple[pa.Table, np.ndarray]:
        """(the table that has a split, which of its rows are in it [E])."""
        held = split == "eval" and bool(self.eval_files)
        table = _read(self.eval_files if held else self.files, held)
        for name in (*self.numbers, *self.categories, self.label):
            check(
                name in table.column_names,
                f"the log has no column {name!r}.{closest(name, table.column_names)} It has:"
                f" {', '.join(table.column_names[:12])}",
            )
        if self.eval_files:
            return table, np.ones(table.num_rows, bool)
        held_E = uniform(0, _DRAW, np.arange(table.num_rows)) < self.eval_fraction
        return table, held_E == (split == "eval")


def _read(files: tuple[str, ...], held: bool) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv, ipc, parquet

    option = "data.eval_files" if held else "data.files"
    check(bool(files), f"{option} is empty; name the log: --{option.replace('_', '-')} FILE")
    tables = []
    for file in files:
        path = os.path.expanduser(file)
        check(os.path.exists(path), f"{option}={file!r} does not exist; give another path")
        try:
            if path.endswith(".parquet"):
                tables.append(parquet.read_table(path))
            elif path.endswith((".arrow", ".feather")):
                tables.append(ipc.open_file(path).read_all())
            else:
                separator = "\t" if path.endswith(".tsv") else ","
                tables.append(
                    csv.read_csv(path, parse_options=csv.ParseOptions(delimiter=separator))
                )
        except pa.ArrowInvalid as error:
            reason = " ".join(str(error).split())[:150]
            raise ValueError(f"{file} is no table that can be read: {reason}") from None
    return pa.concat_tables(tables, promote_options="permissive")


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    column = table[name]
    check(column.null_count == 0, f"column {name!r} has {column.null_count} missing values")
    values = column.to_numpy()
    check(values.dtype.kind in "iufb", f"column {name!r} is {column.type}, and numbers are needed")
    return values.astype(np.float32)


def _values(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(values of a column: int64 or text; bool where one is missing), [E] each."""
    import pyarrow as pa

    column = table[name].combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    missing = np.asarray(column.is_null())
    if pa.types.is_integer(column.type):
        return column.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64), missing
    text = ["" if x is None else str(x) for x in column.to_pylist()]
    values = np.array(text, np.str_)
    return values, missing | (values == "")
