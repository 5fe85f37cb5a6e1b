"""Weak and strong scaling over targets, and where each mesh axis becomes bound by communication."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from spmd.fields import check
from spmd.mesh import BATCH_AXES
from spmd.plan import comms, cost, network
from spmd.plan.facts import Facts
from spmd.plan.layout import Layout, tokens
from spmd.plan.search import search
from spmd.plan.targets import Target

Mode = Literal["weak", "strong"]
Choose = Callable[[Facts, Target], Layout]


class Point(NamedTuple):
    """One target of a curve. batch_size: global. efficiency: tokens/s of a device over the first target's."""

    mode: Mode
    target: str
    num_devices: int
    batch_size: int
    estimate: cost.Estimate
    efficiency: float

    def json(self) -> dict[str, Any]:
        """As JSON types."""
        return {**self._asdict(), "estimate": self.estimate.json()}


class Bound(NamedTuple):
    """Of the collectives of an axis, seconds in a step against those of the products. limit: what they are
    equal at, all else as it is: the fewest tokens on a device for an axis that cuts the batch, the largest
    size of any other.
    """

    axis: str
    seconds: float
    products: float
    limit: float

    @property
    def bound(self) -> bool:
        """Whether communication takes longer."""
        return self.seconds > self.products

    def __str__(self) -> str:
        if self.axis in BATCH_AXES:
            what, unit = "fewer tokens on a device", f"{self.limit:,.0f} tokens"
        else:
            what, unit = "a larger size", f"mesh.{self.axis}={self.limit:.1f}"
        return f"{self.axis}: bound by communication with {what} than {unit}"

    def json(self) -> dict[str, Any]:
        """As JSON types."""
        return {**self._asdict(), "bound": self.bound}


def curve(
    facts: Facts, targets: Sequence[Target], mode: Mode, choose: Choose | None = None
) -> list[Point]:
    """One point for each target. weak: the batch grows with the devices; strong: it stays. choose: the layout
    for a target, by default the fastest that fits.

    ValueError when nothing fits a target, or when its batch would not be whole.
    """
    first = targets[0].num_devices
    found: list[Point] = []
    for target in targets:
        grown = scaled(facts, target.num_devices, first) if mode == "weak" else facts
        layout = (choose or fastest)(grown, target)
        made = cost.estimate(grown, target, layout)
        rate = made.tokens_per_second / target.num_devices
        base = found[0].estimate.tokens_per_second / first if found else rate
        found.append(
            Point(mode, target.name, target.num_devices, grown.batch_size, made, rate / base)
        )
    return found


def fastest(facts: Facts, target: Target) -> Layout:
    """The fastest layout that fits; ValueError with the nearest reason when none does."""
    best = search(facts, target)[0]
    check(best.fits, f"nothing fits {target.name}; the fastest layout {best.reason}")
    return best.layout


def scaled(facts: Facts, numerator: int, denominator: int = 1) -> Facts:
    """The facts of a batch numerator / denominator times as large."""
    check(
        facts.batch_size * numerator % denominator == 0,
        f"data.batch_size={facts.batch_size} x {numerator} / {denominator} is not whole",
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
    """For each axis that carries collectives, where it becomes bound by them. A collective over several axes
    counts for each of them.
    """
    levels = network.levels(target, layout.mesh, layout.slices)
    products = cost.estimate(facts, target, layout).seconds["products"]
    spent: dict[str, float] = {}
    for each in comms.of(facts, layout):
        took = each.count * network.seconds(network.join(levels, each.axes), each.kind, each.bytes)
        for axis in each.axes:
            spent[axis] = spent.get(axis, 0.0) + took
    here = tokens(facts, layout) * layout.accumulate
    return [
        Bound(
            axis,
            seconds,
            products,
            here * seconds / products
            if axis in BATCH_AXES
            else layout.size(axis) * products / seconds,
        )
        for axis, seconds in spent.items()
        if seconds > 0
    ]
