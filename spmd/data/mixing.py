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


Schedule = tuple[
    tuple[int, tuple[float, ...]], ...
]  # (first step, weights of the parts), ascending


def check_schedule(schedule: Schedule, num_parts: int) -> None:
    """ValueError unless steps ascend from 1 on, each with weights of all parts that are not all 0."""
    before = 0
    for step, weights in schedule:
        what = f"data.schedule has {(step, weights)}"
        check(step > before, f"{what}: its steps must ascend, from 1 on")
        check(
            len(weights) == num_parts,
            f"{what}, which must be one number for each of the {num_parts} parts",
        )
        check(
            all(0 <= w < float("inf") for w in weights) and any(weights),
            f"{what}: weights must not be negative, and one of them more than 0",
        )
        before = step


class MixedOrder:
    """Stream position -> example: the part whose turn it is, and its own shuffle.

    own: {part: its order}, of parts that bring one.
    """

    def __init__(
        self,
        turns: Turns | TurnsByStep,
        sizes: Sequence[int],
        seed: int,
        own: Mapping[int, Any] | None = None,
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

    def counts(self, position: int) -> np.ndarray:
        """Examples of each part, int64 [K], before a position."""
        rounds, offset = divmod(position, self._cycle)
        return rounds * self._counts[-1] + self._counts[offset]


class TurnsByStep:
    """Turns whose weights change at given steps: a function of the position, so that a run can resume.

    After any number of examples of a phase, each part is within one example of its share of that phase.

    Args:
        weights: of the parts from the first step on.
        schedule: weights from later steps on.
        batch_size: examples of a step.
    """

    def __init__(self, weights: Sequence[float], schedule: Schedule, batch_size: int):
        phases = ((0, tuple(weights)), *schedule)
        self._starts_P = np.array([step * batch_size for step, _ in phases])
        self._turns = [Turns(each) for _, each in phases]
        self._shares = [np.array(each) / sum(each) for _, each in phases]
        before = [np.zeros(len(weights), np.int64)]
        for turns, num in zip(self._turns, np.diff(self._starts_P), strict=False):
            before.append(before[-1] + turns.counts(int(num)))
        self._before_P = before  # examples of each part before each phase

    def assign(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the part at each position [N], how many of that part came before)."""
        phase_N = np.searchsorted(self._starts_P, positions, side="right") - 1
        part_N, count_N = np.empty_like(positions), np.empty_like(positions)
        for p in np.unique(phase_N):
            rows = phase_N == p
            part_n, count_n = self._turns[p].assign(positions[rows] - self._starts_P[p])
            part_N[rows], count_N[rows] = part_n, count_n + self._before_P[p][part_n]
        return part_N, count_N

    def counts(self, position: int) -> np.ndarray:
        """Examples of each part, int64 [K], before a position."""
        p = self._phase(position)
        return self._before_P[p] + self._turns[p].counts(position - int(self._starts_P[p]))

    def shares(self, position: int) -> np.ndarray:
        """Share of each part, float64 [K], at a position."""
        return self._shares[self._phase(position)]

    def _phase(self, position: int) -> int:
        return int(np.searchsorted(self._starts_P, position, side="right")) - 1
