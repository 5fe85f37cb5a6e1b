"""Collectives of a step in closed form: what each carries, its bytes, and sums over a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from spmd.hardware import hlo
from spmd.strategies.grads.pipeline.arrays import STAGE
from spmd.strategies.grads.pipeline.execute import MANUAL_BATCH

PAYLOADS = (
    "keys and values",
    "parameters",
    "gradients",
    "new parameters",
    "merges",  # exchanged by a strategy other than auto over its own axes
    "activations",
    "rows",
    "lookups",  # ids and rows of sparse tables
    "microbatches",
    "chunks",
)
SCALAR = 8  # bytes at most: the loss, metrics and norms, which no parameter waits for


@dataclasses.dataclass(frozen=True)
class EstimatedCollective:
    """A collective that one device takes part in.

    bytes: of the complete array (gathered, or not yet reduced), as in spmd.hardware.hlo, for each of `count`
    executions in a step. group: devices that take part. payload: of PAYLOADS.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    bytes: float
    count: float
    payload: str

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in a step with ring algorithms."""
        if self.kind == "collective-permute":
            return self.bytes * self.count
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * (self.group - 1) / self.group * self.bytes * self.count

    @property
    def ticking(self) -> bool:
        """Whether a pipeline runs it within the work of a microbatch, so that an idle stage does not run
        it.
        """
        return self.payload in ("keys and values", "parameters", "activations", "rows") or (
            self.payload == "gradients" and not set(self.axes) <= {*MANUAL_BATCH, STAGE}
        )

    def json(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {**dataclasses.asdict(self), "axes": list(self.axes), "wire_bytes": self.wire_bytes}


def merge_equal(collectives: Iterable[EstimatedCollective]) -> list[EstimatedCollective]:
    """Merges collectives that differ only in how often they run."""
    merged: dict[Any, EstimatedCollective] = {}
    for each in collectives:
        key = each.kind, each.axes, each.bytes, each.payload
        count = each.count + (merged[key].count if key in merged else 0)
        merged[key] = dataclasses.replace(each, count=count)
    return list(merged.values())


def ledger(collectives: Iterable[EstimatedCollective]) -> dict[hlo.Key, hlo.Total]:
    """(axes, kind) -> sum over a step, as hlo.ledger for a compiled program."""
    return hlo.sum_totals(
        ((each.axes, each.kind), hlo.Total(each.count, each.count * each.bytes, each.wire_bytes))
        for each in collectives
    )
