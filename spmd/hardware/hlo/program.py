"""A compiled program as data: its collectives, its FLOPs, and sums over a step."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from spmd.hardware.hlo.kernels import Kernel

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of the program that one device takes part in.

    kind: one of KINDS. axes: the mesh axes that its groups span; () if they are no product of axes. group:
    devices in a group. bytes: per execution, of the complete array: the result of an all-gather, the operand
    of the others. count: executions per step, 1 / n for one in every n-th step. source:
    `spmd/models/attention/xla.py:20`, "" if unknown. overlapped: whether computation runs at the same time.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    bytes: int
    count: float
    dtype: str
    op_name: str
    source: str
    overlapped: bool

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends per execution with a ring algorithm."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (self.group - 1) / self.group


class CompiledProgram(NamedTuple):
    """A program of one device. flops: FLOPs of matmuls and convolutions per step, rematerialisation included;
    custom calls count as none. endless: number of loops whose trip count is not in the text; their bodies
    count once. kernels: what runs between the collectives; [] for a text without the compiler's estimates.
    """

    collectives: list[Collective]
    flops: float
    endless: int
    kernels: list[Kernel] = []  # noqa: RUF012 (never changed)

    @property
    def cycles(self) -> float:
        """Cycles of a step, by the compiler; 0 if it estimates none."""
        return sum(each.step_cycles for each in self.kernels)


@dataclasses.dataclass(frozen=True)
class Total:
    """Sum of collectives per device and step. wire_bytes: bytes sent with ring algorithms."""

    count: float
    bytes: float
    wire_bytes: float

    def __add__(self, other: Total) -> Total:
        return Total(
            self.count + other.count,
            self.bytes + other.bytes,
            self.wire_bytes + other.wire_bytes,
        )


Key = tuple[tuple[str, ...], str]  # mesh axes, kind


def ledger(program: CompiledProgram) -> dict[Key, Total]:
    """(axes, kind) -> sum over the program, the largest first."""
    return sum_totals(
        ((c.axes, c.kind), Total(c.count, c.count * c.bytes, c.count * c.wire_bytes))
        for c in program.collectives
    )


def sum_totals(totals: Iterable[tuple[Key, Total]]) -> dict[Key, Total]:
    """Sums totals by key, the most bytes on the wire first."""
    sums: dict[Key, Total] = {}
    for key, total in totals:
        sums[key] = sums[key] + total if key in sums else total
    return dict(sorted(sums.items(), key=lambda item: -item[1].wire_bytes))


def merge_alike(collectives: Iterable[Collective]) -> list[Collective]:
    """Merges collectives that differ only in how often they run; the most bytes first."""
    counts = defaultdict[Collective, float](int)
    for c in collectives:
        counts[dataclasses.replace(c, count=0, op_name="" if c.source else c.op_name)] += c.count
    results = [dataclasses.replace(c, count=count) for c, count in counts.items()]
    return sorted(results, key=lambda c: -c.count * c.wire_bytes)
