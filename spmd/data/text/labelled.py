"""Texts with a class each: a row is one text, cut or padded to the same length.

A batch has `tokens` and `segments`, int32 [B, T], segments 1 for a token and 0 for padding, and `label`,
int32 [B].
"""

# N examples, T tokens

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from spmd.core.fields import check
from spmd.data import Split, cache_root
from spmd.data import cache as caches
from spmd.data.sources import ArraySource
from spmd.data.text.records import Record
from spmd.data.text.tokenized import TokenizedRecords

FORMAT = 1  # raised when the same records would give other rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledTexts(TokenizedRecords):
    """Texts and their classes: two columns of files, or records of the experiment."""

    text_column: str = "text"
    """Column of the text."""
    label_column: str = "label"
    """Column of the class, a number from 0 on."""
    length: int = 128
    """Tokens of a row; a longer text is cut."""

    def __post_init__(self) -> None:
        check(self.length >= 1, f"data.length={self.length} must be at least 1")
        row = ((self.length,), "int32")
        features = {"tokens": row, "segments": row, "label": ((), "int32")}
        object.__setattr__(self, "features", features)
        super().__post_init__()

    @property
    def columns(self) -> tuple[str, ...]:
        """Text and class."""
        return (self.text_column, self.label_column)

    def open(self, split: Split) -> ArraySource:
        """The rows of a split, from the cache."""
        records, tokenizer = self.records(split), self.open_tokenizer()
        about = (FORMAT, records.key, tokenizer.key, self.length)
        digest = hashlib.sha256(repr(about).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        cache = Path(cache_root(self.cache_dir)) / "texts" / f"{records.name}-{digest}"

        def write(part: Path) -> dict[str, Any]:
            bad = caches.BadRecords(self.skip_bad)
            good: list[Record] = []
            for number, record in enumerate(records.read(), 1):
                reason = record.bad or self._reason(record)
                if reason:
                    bad.add(record.bad or f"record {number} of {records.name}: {reason}")
                else:
                    good.append(record)
            tokens_NT = np.zeros((len(good), self.length), np.int32)
            segments_NT = np.zeros_like(tokens_NT)
            encoded = tokenizer.encode([record.values[0] for record in good])
            for row, ids in enumerate(encoded):
                cut = ids[: self.length]
                tokens_NT[row, : len(cut)], segments_NT[row, : len(cut)] = cut, 1
            label_N = np.array([int(record.values[1]) for record in good], np.int32)
            arrays = {"tokens": tokens_NT, "segments": segments_NT, "label": label_N}
            for name, array in arrays.items():
                np.save(part / f"{name}.npy", array)
            return {"bad": bad.reasons}

        caches.open_records(cache, write, self.skip_bad)
        arrays = {name: np.load(cache / f"{name}.npy") for name in self.features}
        return ArraySource(arrays, self.features)

    def _reason(self, record: Record) -> str:
        """Why a record is bad; else ""."""
        text, label = record.values
        if not isinstance(text, str) or not text.strip():
            return f"the column {self.text_column!r} holds no text"
        if not str(label).isdecimal():
            return (
                f"the column {self.label_column!r} is {label!r}, and a class is a number from 0 on"
            )
        return ""
