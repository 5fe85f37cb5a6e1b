"""The order of examples of several sources that are read in turn, by weight."""

# N examples, K sources

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from spmd.core.fields import check

CYCLE = 10_000  # at most so many examples until a mixture's pattern repeats


def check_weights(weights: Sequence[float], num_parts: int) -> None:
    """ValueError unless there is a weight above 0 for each part, and a part."""
    check(
        len(weights) == num_parts >= 1,
        f"data.weights={weights} must be one number for each of the {num_parts} parts",
    )
    check(
        all(0 < w < float("inf") for w in weights),
        f"data.weights={weights} must all be more than 0",
    )


class MixedOrder:
    """Stream position -> example: the part whose turn it is, and its own shuffle.

    own: {part: its order}, of parts that bring one.
    """

    def __init__(
        self, turns: Turns, sizes: Sequence[int], seed: int, own: Mapping[int, Any] | None = None
    ):
        from spmd.data.loader import Order

        self._turns = turns
        own = own or {}
        self._orders = [own.get(k) or Order(seed, size, k) for k, size in enumerate(sizes)]
        self._first_K = np.cumsum([0, *sizes[:-1]])

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
