"""Criteo's logs of advertisements: a label, 13 numbers and 26 categories in a line, separated by tabs.

The format of the Display Advertising Challenge (train.txt) and of the terabyte (day_0 to day_23), .gz too.
Lines are converted once into the cache, 164 bytes each, and read from there at random.
"""

# N rows

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spmd.core.fields import check, free, located
from spmd.core.storage import cache_root
from spmd.data import DataConfig, Source, Split, files
from spmd.data import cache as caches
from spmd.data.clicks import category_names

if TYPE_CHECKING:
    from spmd.data.content import Content

NUMBERS, CATEGORIES = 13, 26
_WIDTH = (
    1 + NUMBERS + CATEGORIES + 1
)  # int32 of a row: the last has a bit for each category that is missing
_MISSING = np.iinfo(np.int32).min
_BLOCK = 2**24  # bytes of lines that are parsed together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criteo(DataConfig):
    """A log in Criteo's format; features `numbers`, `category_00`, ..., `category_25`, and `label`.

    A number x becomes log(1 + max(x, 0)), a missing one 0. A category, eight hexadecimal digits, becomes 1 +
    lowbias32 of it modulo the table's ids - 1; id 0 is that of missing ones.
    """

    files: tuple[str, ...] = located(())
    """Files, or globs in quotes: train.txt, day_*, .gz too; empty is a generated log."""
    eval_files: tuple[str, ...] = located(())
    """Files to evaluate on; without any, the last lines of the others."""
    eval_fraction: float = 1 / 7
    """Share of the lines, the last ones, to evaluate on where no files are given for it: a day of a week."""
    ids: tuple[int, ...] = (10_000,) * CATEGORIES
    """Number of ids of each category, those of the model's tables."""
    limit: int = 0
    """Ids of a category, at most, as the model's; 0 is no limit."""
    generated: int = 20_000
    """Lines of the log that is generated where no files are given."""
    cache_dir: str = free("")
    """Where converted logs go; empty is $SPMD_CACHE_DIR, else ~/.cache/spmd."""

    def __post_init__(self) -> None:
        check(
            len(self.ids) == CATEGORIES and min(self.ids) >= 2,
            f"data.ids has {len(self.ids)} numbers; give 26, of 2 ids or more each: one is of missing values",
        )
        check(
            0 < self.eval_fraction <= 0.5,
            f"data.eval_fraction={self.eval_fraction} must be more than 0 and at most 0.5",
        )
        check(
            self.limit != 1 and self.limit >= 0, f"data.limit={self.limit} must be 0, or 2 or more"
        )
        check(self.generated >= 100, f"data.generated={self.generated} must be at least 100")
        features = {"numbers": ((NUMBERS,), "float32"), "label": ((), "int32")}
        features |= dict.fromkeys(category_names(CATEGORIES), ((), "int32"))
        object.__setattr__(self, "features", features)
        super().__post_init__()

    @property
    def num_ids(self) -> tuple[int, ...]:
        """Ids of each category, limited."""
        return tuple(min(num, self.limit or num) for num in self.ids)

    def open(self, split: Split) -> Source:
        """The rows of a split."""
        own = split == "eval" and self.eval_files
        rows = _rows(self, "eval" if own else "train")
        held = 0 if self.eval_files else max(1, round(len(rows) * self.eval_fraction))
        first, last = (0, len(rows)) if own else (0, len(rows) - held)
        if split == "eval" and not own:
            first, last = last, len(rows)
        return CriteoSource(rows[first:last], self.num_ids)

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """The files; of a generated log a sample of its rows."""
        from spmd.data import content

        if not self.files:
            return content.describe_source(source())
        return content.describe_files(_paths(self, split), self.cache_dir)


@dataclasses.dataclass(frozen=True)
class CriteoSource:
    """Rows of a converted log, int32 [N, 41], of tables with so many ids."""

    rows: np.ndarray
    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: np.ndarray) -> dict[str, Any]:
        """Rows at `indices` [N]."""
        rows = self.rows[np.asarray(indices)]
        numbers = rows[:, 1 : 1 + NUMBERS]  # a missing one is the least integer
        bits = rows[:, 1 + NUMBERS : -1].view(np.uint32)
        missing = (rows[:, -1:] >> np.arange(CATEGORIES)) & 1
        hashed = _mix(bits) % np.asarray([num - 1 for num in self.ids], np.uint32)
        id_NC = np.where(missing == 1, 0, hashed.astype(np.int32) + 1).astype(np.int32)
        return {
            "numbers": np.log1p(np.maximum(numbers, 0).astype(np.float32)),
            "label": np.ascontiguousarray(rows[:, 0]),
            **{name: id_NC[:, i].copy() for i, name in enumerate(category_names(CATEGORIES))},
        }


def generate_lines(num: int, seed: int = 0) -> Iterator[str]:
    """Lines in Criteo's format, of a label that depends on some of the values; a tenth is missing."""
    rng = np.random.default_rng(seed)
    for _ in range(num):
        numbers = rng.geometric(0.05, NUMBERS) - 2
        rank = np.minimum(rng.zipf(1.3, CATEGORIES), 10**6)
        odds = 0.5 * np.log1p(max(numbers[0], 0)) - 2.0 + (rank[0] % 2) - (rank[1] % 2)
        click = rng.random() < 1 / (1 + np.exp(-odds))
        code = _mix((rank + np.arange(CATEGORIES) * 10**6).astype(np.uint32))
        values = [*map(str, numbers), *(f"{x:08x}" for x in code)]
        absent = rng.random(len(values)) < 0.1
        values = ["" if gone else value for gone, value in zip(absent, values, strict=True)]
        yield "\t".join([str(int(click)), *values]) + "\n"


def _paths(config: Criteo, split: str) -> list[str]:
    own = split == "eval" and config.eval_files
    option = "data.eval_files" if own else "data.files"
    return files.matching(config.eval_files if own else config.files, option)


def _rows(config: Criteo, split: str) -> np.ndarray:
    """All rows, int32 [N, 41], mapped from the cache; converted if that has not been done."""
    from spmd.data import content

    paths = _paths(config, split) if config.files else []
    about: Any = config.generated
    if paths:
        about = (
            content.describe_files(paths, config.cache_dir),
            [os.stat(p).st_mtime_ns for p in paths],
        )
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    stem = Path(paths[0]).stem if paths else "generated"
    cache = Path(cache_root(config.cache_dir)) / "criteo" / f"{stem}-{key}"
    if not caches.read_facts(cache):
        print(f"converting Criteo's lines to {cache}", file=sys.stderr, flush=True)
        caches.build(cache, lambda part: _convert(config, paths, part))
    return np.memmap(cache / "rows.bin", np.int32, "r").reshape(-1, _WIDTH)


def _convert(config: Criteo, paths: list[str], part: Path) -> dict[str, Any]:
    if not paths:
        paths = [str(part / "generated.txt")]
        Path(paths[0]).write_text("".join(generate_lines(config.generated)))
    num = 0
    with open(part / "rows.bin", "wb") as out:
        for path in paths:
            for rows in parse(path):
                rows.tofile(out)
                num += len(rows)
    check(num >= 2, f"{paths[0]}: fewer than two lines; give a log that has some")
    return {"rows": num}


def parse(path: str) -> Iterator[np.ndarray]:
    """The rows of a log, int32 [N, 41] at a time: label, numbers, categories' bits, which are missing.

    Raises:
        ValueError: a line that is not in the format; names file, line and column.
    """
    import pyarrow as pa
    from pyarrow import csv

    names = ["label", *(f"number {i + 1}" for i in range(NUMBERS)), *category_names(CATEGORIES)]
    kinds = {name: pa.string() if "category" in name else pa.int32() for name in names}
    convert = csv.ConvertOptions(column_types=kinds, null_values=[""], strings_can_be_null=True)
    line = 1
    try:
        reader = csv.open_csv(
            path,
            csv.ReadOptions(column_names=names, block_size=_BLOCK),
            csv.ParseOptions(delimiter="\t", quote_char=False),
            convert,
        )
        with reader:
            for batch in reader:
                yield _to_rows(batch, path, line)
                line += batch.num_rows
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is no log of Criteo's (a label, {NUMBERS} integers and {CATEGORIES} hexadecimal"
            f" categories, separated by tabs), after line {line}: {reason}"
        ) from None


def _to_rows(batch: Any, path: str, line: int) -> np.ndarray:
    """The rows of a record batch whose first line has this number."""
    rows = np.zeros((batch.num_rows, _WIDTH), np.int32)
    for i, column in enumerate(batch.columns):
        missing = column.is_null().to_numpy(zero_copy_only=False)
        if i <= NUMBERS:
            rows[:, i] = column.fill_null(_MISSING).to_numpy(zero_copy_only=False)
            continue
        bits, bad = _hexadecimal(column)
        at = np.flatnonzero(bad & ~missing)
        check(
            not at.size,
            f"{path}, line {line + (at[0] if at.size else 0)}: category {i - NUMBERS} is"
            f" {column[int(at[0]) if at.size else 0].as_py()!r}, no hexadecimal number of 32 bits",
        )
        rows[:, i] = bits.view(np.int32)
        rows[:, -1] |= missing.astype(np.int32) << (i - NUMBERS - 1)
    wrong = np.flatnonzero((rows[:, 0] != 0) & (rows[:, 0] != 1))
    check(
        not wrong.size,
        f"{path}, line {line + (wrong[0] if wrong.size else 0)}: the label is not 0 or 1",
    )
    return rows


def _hexadecimal(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 [N] of texts of up to eight hexadecimal digits, bool [N] whether a text is none)."""
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are made when it is imported
    text = pc.utf8_lpad(column.fill_null("0"), 8, "0")
    long = pc.greater(pc.binary_length(text), 8).to_numpy(zero_copy_only=False)
    digits = np.array(text.to_numpy(zero_copy_only=False), "S8").view(np.uint8).reshape(-1, 8)
    value = np.full(256, 255, np.uint32)
    for i, pair in enumerate("0123456789"):
        value[ord(pair)] = i
    for i, pair in enumerate("abcdef"):
        value[[ord(pair), ord(pair.upper())]] = 10 + i
    nibbles = value[digits]
    shifts = np.arange(28, -1, -4, dtype=np.uint32)
    bits = (np.where(nibbles > 15, 0, nibbles) << shifts).sum(1, dtype=np.uint32)
    return bits, long | (nibbles > 15).any(1)


def _mix(x: np.ndarray) -> np.ndarray:
    """lowbias32 (spmd.core.bits), by numpy."""
    x = np.asarray(x, np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
