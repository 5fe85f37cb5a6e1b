"""Packed sequences: windows over the tokens of all documents; and weighted mixtures of them."""

# N examples, T tokens of a sequence, D documents, K parts of a mixture

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from spmd.core.fields import check

if TYPE_CHECKING:
    from spmd.data.loader import Order

CYCLE = 10_000  # at most so many examples until a mixture's pattern repeats


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

    def __init__(self, parts: Sequence[Windows], weights: Sequence[float]):
        self.parts = parts
        self._ends_K = np.cumsum([len(p) for p in parts])
        self._turns = Turns(weights)

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
        from spmd.data.loader import Order

        orders = [Order(seed, len(p), k) for k, p in enumerate(self.parts)]
        return MixedOrder(self._turns, orders, self._ends_K - [len(p) for p in self.parts])


class MixedOrder:
    """Stream position -> example: the part whose turn it is, and its own shuffle."""

    def __init__(self, turns: Turns, orders: Sequence[Order], first_K: np.ndarray):
        self._turns, self._orders, self._first_K = turns, orders, first_K

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        part_N, count_N = self._turns.assign(positions)
        examples = np.empty_like(positions)
        for k, order in enumerate(self._orders):
            rows = part_N == k
            if rows.any():
                examples[rows] = order[count_N[rows]] + self._first_K[k]
        return examples


class Turns:
    """Order of parts such that after any number of examples each part is within one of its share.

    Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980): of the parts that are
    far enough behind, take the one whose turn is due first. The order repeats once all shares are integers.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(w)) for w in weights]
        shares = [w / sum(exact) for w in exact]
        cycle = math.lcm(*(s.denominator for s in shares))
        check(
            cycle <= CYCLE,
            f"data.weights={tuple(weights)} repeat only after {cycle} examples; give numbers with"
            f" fewer digits, so that it is at most {CYCLE}",
        )
        num = len(shares)
        slack = Fraction(1, max(2 * num - 2, 1))
        due_K = [int(s * cycle) for s in shares]
        turns, counts = [], [[0] * num]
        for n in range(1, cycle + 1):
            counts_before = counts[-1]
            eligible = [
                k for k in range(num) if n * due_K[k] - counts_before[k] * cycle >= slack * cycle
            ]
            deadline = lambda k, n=n, counts=counts_before: (
                ((1 - slack + counts[k]) * cycle - n * due_K[k]) / due_K[k]
            )
            turn = min(eligible, key=deadline) if num > 1 else 0
            turns.append(turn)
            counts.append([c + (k == turn) for k, c in enumerate(counts_before)])
        self._cycle, self._turns, self._counts = cycle, np.array(turns), np.array(counts)

    def assign(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the part at each position [N], how many of that part came before)."""
        rounds_N, offset_N = np.divmod(positions, self._cycle)
        part_N = self._turns[offset_N]
        return part_N, rounds_N * self._counts[-1][part_N] + self._counts[offset_N, part_N]
