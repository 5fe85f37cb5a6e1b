"""Search: all layouts of an experiment on a target, estimated and ranked, or rejected with a reason."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple

from spmd.analysis.plan import cost, memory, network
from spmd.analysis.plan.blocks import BlockModel
from spmd.analysis.plan.collective import EstimatedCollective
from spmd.analysis.plan.facts import Facts
from spmd.analysis.plan.layout import CONTEXTS, REMATS, Layout, Sizes, check_mesh
from spmd.analysis.plan.weights import weight_collectives
from spmd.core import tree
from spmd.hardware.targets import Target
from spmd.parallel.mesh import AXES, BATCH_AXES

VIRTUAL = (2, 4)  # numbers of virtual stages to try
# Without a pipeline, the numbers of microbatches to keep of those that fit, the smallest first: more only
# take longer, but the compiler may need more memory than estimated.
ENOUGH = 2


class Candidate(NamedTuple):
    """A layout, its estimate (None if there is none) and the reason why it is rejected ("" if it is not).

    compiled: peak bytes of a device by the target's compiler; 0 if it was not compiled.
    """

    layout: Layout
    estimate: cost.Estimate | None
    reason: str
    compiled: int = 0

    @property
    def fits(self) -> bool:
        """Whether the layout can run."""
        return not self.reason

    @property
    def peak(self) -> float:
        """Peak bytes of a device, by the compiler if it was compiled, else estimated; 0 without either."""
        return self.compiled or (self.estimate.memory.peak if self.estimate else 0.0)

    def json(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {
            "layout": self.layout.json(),
            "words": self.layout.words(),
            "reason": self.reason,
            "peak": self.peak,
            "compiled": bool(self.compiled),
            "estimate": self.estimate.json() if self.estimate else None,
        }


def search(facts: Facts, target: Target, slices: int = 1) -> list[Candidate]:
    """Candidates: those that fit, the fastest first, then the rejected ones.

    They are the meshes over replica (between slices), data, fsdp and tensor, for a model that declares its
    stacks of blocks also stage, context and (with experts) expert, x ZeRO level x accumulation (powers of 2)
    x remat x sequence parallelism x schedule x kind of context. The global batch is fixed. A mesh that is
    impossible, or whose state alone is too large, is a single candidate. Not tried is what is never better:
    gpipe (1f1b waits as long, in fewer ticks, and keeps no more), fewer microbatches than stages, and,
    without stages, more microbatches than the memory requires.
    """
    candidates: list[Candidate] = []
    stacks = len(facts.model.stacks) if facts.model else 1
    for sizes in meshes(target.num_devices, slices, facts.model):
        try:
            network.levels(target, sizes, slices)
        except ValueError as error:
            candidates.append(Candidate(Layout(sizes, slices=slices), None, str(error)))
            continue
        for context in CONTEXTS if sizes.get("context", 1) > 1 else CONTEXTS[:1]:
            for zero in (3, 1) if sizes.get("fsdp", 1) > 1 else (3,):
                options = {"zero": zero, "context": context, "stacks": stacks}
                base = Layout(sizes, slices=slices, **options)
                reason = rejection(facts, target, base)
                candidates += (
                    [Candidate(base, None, reason)] if reason else variants(facts, target, base)
                )
    return sorted(candidates, key=rank)


def rejection(facts: Facts, target: Target, layout: Layout) -> str:
    """The reason why no layout with this mesh, ZeRO level and kind of context can run; "" if one may."""
    assert target.chip
    try:
        check_mesh(facts, layout)
        state, has = memory.state_bytes(facts, layout), memory.usable(target.chip.memory)
    except ValueError as error:
        return str(error)
    needs, given = tree.human_bytes(state), tree.human_bytes(has)
    return f"needs {needs} on each device for its state, which has {given}" if state > has else ""


def variants(facts: Facts, target: Target, base: Layout) -> list[Candidate]:
    """The layouts of one mesh, ZeRO level and kind of context, evaluated."""
    candidates: list[Candidate] = []
    weights: dict[
        int, list[EstimatedCollective]
    ] = {}  # by accumulation: no other choice changes them
    fitting: collections.Counter[Any] = collections.Counter()
    for layout in layouts(facts, base):
        kind = layout.sequence_parallel, layout.remat
        if base.stages == 1 and fitting[kind] >= ENOUGH:
            continue
        if layout.accumulate not in weights:
            weights[layout.accumulate] = weight_collectives(facts, layout)
        candidates.append(evaluate(facts, target, layout, weights[layout.accumulate]))
        fitting[kind] += candidates[-1].fits
    return candidates


def evaluate(
    facts: Facts, target: Target, layout: Layout, weights: list[EstimatedCollective] | None = None
) -> Candidate:
    """Estimates a layout; rejects it if it is impossible, or needs more memory than a device has.

    weights: weight_collectives of the layout, if they have been computed.
    """
    try:
        estimate = cost.estimate(facts, target, layout, weights=weights)
    except ValueError as error:
        return Candidate(layout, None, str(error))
    needs, has = (tree.human_bytes(n) for n in (estimate.memory.peak, estimate.capacity))
    reason = "" if estimate.fits else f"needs {needs} on each device, which has {has}"
    return Candidate(layout, estimate, reason)


def meshes(num_devices: int, slices: int = 1, model: BlockModel | None = None) -> Iterator[Sizes]:
    """Factorisations of the devices over data, fsdp, tensor and the other axes that can shard the model;
    replica is the number of slices.
    """
    axes = ["tensor", "fsdp"]
    if model is not None:
        axes += ["context", "stage", *(["expert"] if model.experts else [])]

    def factorise(axes: list[str], left: int) -> Iterator[dict[str, int]]:
        if not axes:
            yield {"replica": slices, "data": left}
            return
        for size in divisors(left):
            for rest in factorise(axes[1:], left // size):
                yield {axes[0]: size, **rest}

    for sizes in factorise(axes, num_devices):
        yield {axis: sizes[axis] for axis in AXES if sizes.get(axis, 1) > 1}


def layouts(facts: Facts, base: Layout) -> Iterator[Layout]:
    """The layouts of one mesh, ZeRO level and kind of context, with each remat if the model has it."""
    saved = facts.model.saved if facts.model else base.saved
    remats = REMATS if facts.model and facts.model.remat else ("",)
    for parallel in (False, True) if base.size("tensor") > 1 else (False,):
        for accumulate in accumulations(facts, base):
            for scheduled in schedulings(facts, base._replace(accumulate=accumulate)):
                for remat in remats:
                    yield scheduled._replace(sequence_parallel=parallel, remat=remat, saved=saved)


def schedulings(facts: Facts, layout: Layout) -> Iterator[Layout]:
    """The layout with each schedule of a pipeline."""
    yield layout
    if layout.stages == 1 or facts.model is None:
        return
    for virtual in VIRTUAL:
        units = [layout.stages * virtual * stack.period for stack in facts.model.stacks]
        layers = [stack.layers for stack in facts.model.stacks]
        divides = all(num % unit == 0 for num, unit in zip(layers, units, strict=True))
        if divides and layout.accumulate % layout.stages == 0:
            yield layout._replace(pipeline="interleaved", virtual=virtual)


def accumulations(facts: Facts, layout: Layout) -> list[int]:
    """Numbers of microbatches: powers of 2 up to the rows of a device, in a pipeline at least the number of
    its stages. The largest power is included even if it is smaller, or the batch does not divide.
    """
    rows = facts.batch_size // layout.size(*BATCH_AXES)
    powers = [2**i for i in range(max(rows, 1).bit_length())]
    return [n for n in powers if n >= layout.stages] or powers[-1:]


def divisors(number: int) -> list[int]:
    """The divisors of `number` in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def rank(candidate: Candidate) -> tuple[bool, float]:
    """Sort key: candidates that fit come first, the fastest first."""
    estimate = candidate.estimate
    return not candidate.fits, estimate.step_seconds if estimate else float("inf")
