"""Weak and strong scaling over targets, and where each mesh axis becomes bound by communication."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from spmd.analysis.plan import comms, cost, network
from spmd.analysis.plan.facts import Facts
from spmd.analysis.plan.layout import Layout, tokens
from spmd.analysis.plan.search import search
from spmd.core.fields import check
from spmd.hardware.targets import Target
from spmd.parallel.mesh import BATCH_AXES

Mode = Literal["weak", "strong"]
Choose = Callable[[Facts, Target], Layout]


class Point(NamedTuple):
    """A target on a scaling curve. batch_size: global. efficiency: tokens/s of a device, relative to the
    first target.
    """

    mode: Mode
    target: str
    num_devices: int
    batch_size: int
    estimate: cost.Estimate
    efficiency: float

    def json(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {**self._asdict(), "estimate": self.estimate.json()}


class Bound(NamedTuple):
    """Seconds in a step of the collectives over an axis and of the matmuls. limit: where the two are equal,
    all else being fixed: the fewest tokens on a device for an axis that shards the batch, the largest size of
    any other axis.
    """

    axis: str
    seconds: float
    matmuls: float
    limit: float

    @property
    def bound(self) -> bool:
        """Whether communication takes longer."""
        return self.seconds > self.matmuls

    def __str__(self) -> str:
        if self.axis in BATCH_AXES:
            change, limit = "fewer tokens on a device", f"{self.limit:,.0f} tokens"
        else:
            change, limit = "a larger size", f"mesh.{self.axis}={self.limit:.1f}"
        return f"{self.axis}: bound by communication with {change} than {limit}"

    def json(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {**self._asdict(), "bound": self.bound}


def curve(
    facts: Facts, targets: Sequence[Target], mode: Mode, choose: Choose | None = None
) -> list[Point]:
    """The points of a scaling curve, one per target.

    Args:
        facts: the experiment, with the batch of the first target.
        targets: the targets, the smallest first.
        mode: weak: the batch grows with the devices; strong: it is fixed.
        choose: chooses the layout for a target; by default the fastest that fits.

    Raises:
        ValueError: nothing fits a target, or its batch would be a fraction.
    """
    first = targets[0].num_devices
    points: list[Point] = []
    for target in targets:
        grown = scale_batch(facts, target.num_devices, first) if mode == "weak" else facts
        layout = (choose or fastest)(grown, target)
        estimate = cost.estimate(grown, target, layout)
        rate = estimate.tokens_per_second / target.num_devices
        base = points[0].estimate.tokens_per_second / first if points else rate
        points.append(
            Point(mode, target.name, target.num_devices, grown.batch_size, estimate, rate / base)
        )
    return points


def fastest(facts: Facts, target: Target) -> Layout:
    """The fastest layout that fits; ValueError with a reason if none does."""
    best = search(facts, target)[0]
    check(best.fits, f"nothing fits {target.name}; the fastest layout {best.reason}")
    return best.layout


def scale_batch(facts: Facts, numerator: int, denominator: int = 1) -> Facts:
    """The facts with a batch that is numerator / denominator times as large."""
    check(
        facts.batch_size * numerator % denominator == 0,
        f"data.batch_size={facts.batch_size} x {numerator} / {denominator} is not an integer",
    )
    grown = lambda count: count * numerator // denominator
    return facts._replace(
        batch_size=grown(facts.batch_size),
        tokens=grown(facts.tokens),
        batch_bytes=grown(facts.batch_bytes),
        saved=grown(facts.saved),
        flops={dtype: grown(count) for dtype, count in facts.flops.items()},
    )


def bounds(facts: Facts, target: Target, layout: Layout) -> list[Bound]:
    """For each axis with collectives, the limit at which it becomes bound by communication. A collective over
    several axes counts for each of them.
    """
    levels = network.levels(target, layout.mesh, layout.slices)
    matmuls = cost.estimate(facts, target, layout).seconds["matmuls"]
    spent: dict[str, float] = {}
    for each in comms.step_collectives(facts, layout):
        took = each.count * network.seconds(network.join(levels, each.axes), each.kind, each.bytes)
        for axis in each.axes:
            spent[axis] = spent.get(axis, 0.0) + took
    local_tokens = tokens(facts, layout) * layout.accumulate
    return [
        Bound(
            axis,
            seconds,
            matmuls,
            local_tokens * seconds / matmuls
            if axis in BATCH_AXES
            else layout.size(axis) * matmuls / seconds,
        )
        for axis, seconds in spent.items()
        if seconds > 0
    ]
