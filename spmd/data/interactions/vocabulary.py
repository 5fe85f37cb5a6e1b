"""Vocabularies: raw ids of a log as rows 0, 1, ..., and one row more for those that are unknown."""

# N ids as read

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np


class Vocabulary:
    """The ids of a log in ascending order; row `len(self)` is that of all others.

    Args:
        words: the ids, integers or text, each once and sorted.
    """

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    @classmethod
    def build(cls, raw: np.ndarray, least: int = 1) -> Vocabulary:
        """The vocabulary of raw ids [N]; ids that occur less than `least` times are left out."""
        words, counts = np.unique(raw, return_counts=True)
        return cls(words[counts >= least])

    @classmethod
    def restore(cls, words: Sequence[str]) -> Vocabulary:
        """The vocabulary of the ids that a run recorded."""
        return cls(_numbers(tuple(words)))

    def record(self) -> tuple[str, ...]:
        """The ids as text."""
        return tuple(map(str, self.words.tolist()))

    def __len__(self) -> int:
        return len(self.words)

    @property
    def rows(self) -> int:
        """Rows of a table: the ids, and the row of those that are unknown."""
        return len(self.words) + 1

    def index(self, raw: Any) -> np.ndarray:
        """Rows int32 of raw ids [N]; those out of the vocabulary share row `len(self)`."""
        raw = np.asarray(raw)
        if raw.dtype.kind != self.words.dtype.kind:
            raw = self._as_words(raw)
        at = np.minimum(np.searchsorted(self.words, raw), len(self.words) - 1)
        return np.where(self.words[at] == raw, at, len(self.words)).astype(np.int32)

    def _as_words(self, raw: np.ndarray) -> np.ndarray:
        """Raw ids of the vocabulary's type; text that is no number becomes one that no id has."""
        if self.words.dtype.kind != "i":
            return raw.astype(np.str_)
        absent = int(self.words[0]) - 1
        whole = lambda word: int(word) if _is_whole(str(word)) else absent
        return np.array([whole(word) for word in raw.ravel()], np.int64).reshape(raw.shape)


@functools.lru_cache(maxsize=8)
def _numbers(words: tuple[str, ...]) -> np.ndarray:
    if all(map(_is_whole, words)):
        return np.array([int(word) for word in words], np.int64)
    return np.array(words, np.str_)


def _is_whole(word: str) -> bool:
    return word.lstrip("-").isdecimal() and str(int(word)) == word
