"""Tables: Parquet, Arrow IPC, CSV and JSON lines, columns as features.

Arrow IPC is mapped into memory and read by random access. Of Parquet, row groups are read: their order is
shuffled, then that of the rows in a window (spmd.data.grouped). CSV and JSON lines are converted once to
Arrow IPC.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import tyro

from spmd.core.fields import check, free, located
from spmd.data import DataConfig, Source, Split

if TYPE_CHECKING:
    from spmd.data.content import Content

SUFFIXES = (".parquet", ".arrow", ".feather", ".csv", ".tsv", ".jsonl", ".ndjson")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(DataConfig):
    """Rows of tables; `features` declares {name: (shape, dtype)}, dtype "bytes" for encoded images."""

    files: tuple[str, ...] = located(())
    """Files, globs in quotes, or folders: .parquet, .arrow, .feather, .csv, .tsv, .jsonl; gs:// too."""
    eval_files: tuple[str, ...] = located(())
    """Files to evaluate on; without any, eval_fraction."""
    eval_fraction: float = 0.1
    """Share of the rows to evaluate on where no files are given for it: every tenth row, say."""
    columns: tyro.conf.Suppress[Mapping[str, tuple[str, ...]]] = dataclasses.field(
        default_factory=dict
    )
    """Feature -> its column, or as many as it has elements; by default the column of its name."""
    missing: Literal["error", "nan", "zero"] = "error"
    """Value in the place of missing ones; error: such a row is a bad record."""
    window: int = 262_144
    """Rows of Parquet that are shuffled together, as far as 256 MiB of them go."""
    convert: bool = False
    """Convert Parquet to Arrow IPC in the cache, once: rows are then shuffled over the whole table."""
    cache_dir: str = free("")
    """Where converted tables go; empty is $SPMD_CACHE_DIR, else ~/.cache/spmd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            0 < self.eval_fraction <= 0.5,
            f"data.eval_fraction={self.eval_fraction} must be more than 0 and at most 0.5",
        )
        check(self.window >= 1, f"data.window={self.window} must be at least 1")
        check(
            bool(self.features),
            "data.features is empty; declare the columns that are read, {name: (shape, dtype)}",
        )
        for name in self.columns:
            check(name in self.features, f"data.columns names {name!r}, which is no feature")

    def open(self, split: Split) -> Source:
        """The rows of a split."""
        from spmd.data.tables import opening

        return opening.open_split(self, split)

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """The files; those of training where evaluation has none of its own."""
        del source
        from spmd.data import content
        from spmd.data.tables import opening

        return content.describe_files(opening.files_of(self, split), self.cache_dir)

    def columns_of(self, feature: str) -> tuple[str, ...]:
        """The columns of a feature."""
        return tuple(self.columns.get(feature, (feature,)))
