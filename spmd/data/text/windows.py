"""Packed sequences: windows over the tokens of all documents; and weighted mixtures of them."""

# N examples, T tokens of a sequence, D documents, K parts of a mixture

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spmd.core.fields import check
from spmd.data.mixing import MixedOrder, TurnsByStep


class Windows:
    """Windows of `length` tokens: example i begins at token i * stride; targets are the next tokens.

    tokens [M], starts_D: where documents begin, ascending from 0. The last window is padded. skipped: why
    documents without tokens could not be read.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts_D: np.ndarray,
        length: int,
        stride: int = 0,
        skipped: Sequence[str] = (),
    ):
        self.tokens, self.starts, self.length = tokens, starts_D, length
        self.skipped = tuple(skipped)
        self._stride = stride or length
        remaining = len(tokens) - 1 - length  # tokens that a first window leaves to predict
        self._num = (1 + max(-(-remaining // self._stride), 0)) if len(tokens) > 1 else 0
        check(
            self._num < 2**31,
            f"data.stride={stride} makes {self._num} windows of {len(tokens)} tokens, more than can"
            " be numbered; use a larger one",
        )

    def __len__(self) -> int:
        return self._num

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Windows `indices` int64 [N] -> tokens, targets, segments, positions, each int32 [N, T]."""
        first_N = indices * self._stride
        at_NT = first_N[:, None] + np.arange(self.length + 1)
        inside_NT = at_NT < len(self.tokens)
        full = bool(inside_NT.all())
        text_NT = self.tokens[at_NT if full else np.minimum(at_NT, len(self.tokens) - 1)]
        text_NT = text_NT.astype(np.int32)
        begins_NT = self._begins(first_N)
        targets_NT = np.where(begins_NT[:, 1:], np.int32(-1), text_NT[:, 1:])
        tokens_NT, begins_NT = text_NT[:, :-1], begins_NT[:, :-1]
        begins_NT[:, 0] = True
        segments_NT = np.cumsum(begins_NT, axis=1, dtype=np.int32)
        place_T = np.arange(self.length, dtype=np.int32)
        begin_NT = np.maximum.accumulate(np.where(begins_NT, place_T, np.int32(0)), axis=1)
        batch = {
            "tokens": tokens_NT,
            "targets": targets_NT,
            "segments": segments_NT,
            "positions": place_T - begin_NT,
        }
        if not full:
            targets_NT[~inside_NT[:, 1:]] = -1
            for name in ("tokens", "segments", "positions"):
                batch[name] = np.where(inside_NT[:, :-1], batch[name], np.int32(0))
        return {name: np.ascontiguousarray(x) for name, x in batch.items()}

    def _begins(self, first_N: np.ndarray) -> np.ndarray:
        """bool [N, T + 1]: whether a document begins there."""
        begins_NT = np.zeros((len(first_N), self.length + 1), bool)
        low_N = np.searchsorted(self.starts, first_N)
        count_N = np.searchsorted(self.starts, first_N + self.length + 1) - low_N
        row = np.repeat(np.arange(len(first_N)), count_N)
        within = np.arange(len(row)) - np.repeat(np.cumsum(count_N) - count_N, count_N)
        begins_NT[row, self.starts[low_N[row] + within] - first_N[row]] = True
        return begins_NT


def slice_tokens(
    tokens: np.ndarray, starts_D: np.ndarray, start: int, stop: int
) -> tuple[np.ndarray, ...]:
    """Tokens `start` to `stop`, and where documents begin in them; a document that is split begins anew."""
    inside = starts_D[(starts_D > start) & (starts_D < stop)] - start
    return tokens[start:stop], np.concatenate([[0], inside]).astype(np.int64)


class Mixed:
    """Concatenated sources, read in turn by weight: see `order`."""

    def __init__(self, parts: Sequence[Windows], turns: TurnsByStep):
        self.parts = parts
        self._ends_K = np.cumsum([len(p) for p in parts])
        self._turns = turns

    def consumed(self, position: int) -> dict[str, float]:
        """Tokens, epochs and share of each part in the examples of training before a position."""
        values: dict[str, float] = {}
        shares = self._turns.shares(max(position - 1, 0))
        for k, (part, num) in enumerate(zip(self.parts, self._turns.counts(position), strict=True)):
            values[f"data/part_{k}/tokens"] = float(num * part.length)
            values[f"data/part_{k}/epochs"] = float(num / len(part))
            values[f"data/part_{k}/share"] = float(shares[k])
        return values

    @property
    def skipped(self) -> tuple[str, ...]:
        """Why documents of the parts could not be read."""
        return tuple(reason for part in self.parts for reason in part.skipped)

    def __len__(self) -> int:
        return int(self._ends_K[-1])

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Examples `indices` int64 [N], numbered through all parts."""
        part_N = np.searchsorted(self._ends_K, indices, side="right")
        batch: dict[str, np.ndarray] = {}
        for k, source in enumerate(self.parts):
            rows = part_N == k
            if not rows.any():
                continue
            for name, x in source.take(indices[rows] - (self._ends_K[k] - len(source))).items():
                array = batch.setdefault(name, np.empty((len(indices), *x.shape[1:]), x.dtype))
                array[rows] = x
        return batch

    def order(self, seed: int) -> MixedOrder:
        """The order of training: the loader asks for it."""
        return MixedOrder(self._turns, [len(p) for p in self.parts], seed)
