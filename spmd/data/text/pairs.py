"""Pairs of texts, source and target: columns of files, aligned files, or a TFDS set.

A batch has `source`, `source_positions`, `source_segments`, int32 [B, S], and `tokens`, `targets`,
`positions`, `segments`, int32 [B, T]. A row holds one pair or, packed, several: segments number them from 1
on both sides, 0 is padding; positions restart at 0. A source ends with the tokenizer's end token; `tokens`
begin with it, and `targets` are the next tokens up to it, -1 at padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from spmd.core.fields import check, free, located
from spmd.data import TFDS, Split
from spmd.data.text.tokenized import TokenizedRecords

if TYPE_CHECKING:
    from spmd.data.text.packing import PackedPairs
    from spmd.data.text.records import Records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(TokenizedRecords):
    """Pairs of texts, of one tokenizer, packed."""

    source_column: str = "source"
    """Column of the text that is read."""
    target_column: str = "target"
    """Column of the text that is written."""
    target_files: tuple[str, ...] = located(())
    """Text files whose lines are the targets of the lines of data.files, .gz too; without any, columns."""
    eval_target_files: tuple[str, ...] = located(())
    """The same of data.eval_files."""
    name: str = ""
    """Instead of files, a TFDS set whose features are the columns: `wmt17_translate/de-en`."""
    dir: str = free("")
    """TFDS data directory; empty is $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    train_split: str = "train"
    """TFDS split to train on."""
    eval_split: str = "validation"
    """TFDS split to evaluate on."""
    source_length: int = 128
    """Tokens of a row's source side, their end tokens included."""
    target_length: int = 128
    """Tokens of a row's target side."""
    packed: bool = True
    """Several pairs in a row, as many as fit; else one."""

    def __post_init__(self) -> None:
        for name in ("source_length", "target_length"):
            check(getattr(self, name) >= 2, f"data.{name}={getattr(self, name)} must be at least 2")
        check(
            not (self.files and self.name),
            f"both data.files={self.files} and data.name={self.name!r} are given; give one of them",
        )
        check(
            bool(self.target_files) == bool(self.eval_target_files),
            "data.target_files and data.eval_target_files: give both, or neither",
        )
        source, target = ((n,) for n in (self.source_length, self.target_length))
        features = dict.fromkeys(("tokens", "targets", "positions", "segments"), (target, "int32"))
        sides = ("source", "source_positions", "source_segments")
        features |= dict.fromkeys(sides, (source, "int32"))
        object.__setattr__(self, "features", features)
        super().__post_init__()

    @property
    def columns(self) -> tuple[str, ...]:
        """Source and target."""
        return (self.source_column, self.target_column)

    @property
    def num_texts(self) -> int:
        """Both."""
        return 2

    def tfds(self) -> TFDS:
        """The TFDS set by itself."""
        return TFDS(name=self.name, dir=self.dir, cache_dir=self.cache_dir)

    def records(self, split: Split) -> Records:
        """The pairs of a split, as text."""
        from spmd.data.text import records

        train = split == "train"
        if self.name:
            return _tfds_records(self, self.train_split if train else self.eval_split)
        if self.files and self.target_files:
            globs = (self.files, self.target_files)
            options = ("data.files", "data.target_files")
            if not train:
                globs = (self.eval_files, self.eval_target_files)
                options = ("data.eval_files", "data.eval_target_files")
            return records.from_lines(globs, options, self.cache_dir)
        return super().records(split)

    def pairs(self, split: Split) -> Iterator[tuple[str, str]]:
        """(source, target) of each pair of a split, in its order; those that cannot be read are left out."""
        for record in self.records(split).read():
            if not (record.bad or reason_of(record.values, self.columns)):
                yield record.values[0], record.values[1]

    def open(self, split: Split) -> PackedPairs:
        """Rows of pairs, mapped from the cache."""
        from spmd.data.text import packing

        records, tokenizer = self.records(split), self.open_tokenizer()
        lengths = (self.source_length, self.target_length)
        options = {"packed": self.packed, "cache_dir": self.cache_dir, "skip_bad": self.skip_bad}
        source = packing.open_pairs(records, self.columns, tokenizer, lengths, **options)
        check(
            len(source) > 0,
            f"the {split} split has no pair of at most data.source_length={lengths[0]} and"
            f" data.target_length={lengths[1]} tokens ({source.longer} are longer); raise them",
        )
        return source

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The source tokens of texts, each with the end token: int32 [S]."""
        tokenizer = self.open_tokenizer()
        end = np.array([tokenizer.end], np.int32)
        return [np.concatenate([ids.astype(np.int32), end]) for ids in tokenizer.encode(texts)]


def reason_of(values: tuple[Any, ...], columns: tuple[str, ...]) -> str:
    """Why the values of a pair are none: an empty text, or no text; else ""."""
    for value, name in zip(values, columns, strict=True):
        if not isinstance(value, str):
            return f"the column {name!r} is {type(value).__name__}, not text"
        if not value.strip():
            return f"the column {name!r} is empty"
    return ""


def _tfds_records(config: Pairs, split: str) -> Records:
    from spmd.data import tfds
    from spmd.data.text.records import Record, Records

    part = tfds.locate(config.tfds(), split)
    columns = list(config.columns)

    def read() -> Iterator[Record]:
        reader = tfds.open_reader(config.tfds(), part.directory, part.name, columns)
        text = lambda x: x.decode("utf-8", "replace") if isinstance(x, bytes) else x
        for start in range(part.start, part.stop, 256):
            with tfds.quiet():
                examples = reader.__getitems__(list(range(start, min(start + 256, part.stop))))
            for example in examples:
                yield Record(tuple(text(example[name]) for name in columns))

    name, _, _ = tfds.parse_name(config.name)
    key = repr((tfds.fingerprint(part.directory, part.name), *part[1:], columns))
    return Records(name, key, read, tfds.slice_content(part))
