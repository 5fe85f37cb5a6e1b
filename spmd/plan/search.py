"""All layouts of an experiment on a target, estimated and ranked; those that cannot be keep the reason."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple

from spmd import tree
from spmd.mesh import AXES, BATCH_AXES
from spmd.models.transformer import Transformer
from spmd.plan import comms, cost, memory, network
from spmd.plan.facts import Facts
from spmd.plan.layout import CONTEXTS, REMATS, Layout, Sizes, check_mesh
from spmd.plan.targets import Target

VIRTUAL = (2, 4)  # virtual stages that are tried
# Numbers of microbatches that fit, the fewest first: more only take longer, but the compiler may need more.
ENOUGH = 2


class Candidate(NamedTuple):
    """A layout, its estimate (None where there is none) and why it is rejected, "" where it is not.

    compiled: bytes of a device at the peak by the target's compiler; 0 where it was not asked.
    """

    layout: Layout
    estimate: cost.Estimate | None
    reason: str
    compiled: int = 0

    @property
    def fits(self) -> bool:
        """Whether it can be run."""
        return not self.reason

    @property
    def peak(self) -> float:
        """Bytes of a device, by the compiler where it was asked, else by estimate; 0 without either."""
        return self.compiled or (self.estimate.memory.peak if self.estimate else 0.0)

    def json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "layout": self.layout.json(),
            "words": self.layout.words(),
            "reason": self.reason,
            "peak": self.peak,
            "compiled": bool(self.compiled),
            "estimate": self.estimate.json() if self.estimate else None,
        }


def search(facts: Facts, target: Target, slices: int = 1) -> list[Candidate]:
    """Every candidate, those that fit first, the fastest first; then the rejected ones.

    Meshes of replica (between slices), data, fsdp and tensor, of a Transformer stage, context and (with
    experts) expert, x ZeRO level x accumulation (powers of 2) x remat x sequence parallelism x schedule x
    kind of context. The global batch stays as it is. A mesh that cannot be is one candidate, and so is one
    whose state alone is too large. Left out is what is never better: gpipe (1f1b waits as long, in fewer
    ticks, and keeps no more), fewer microbatches than stages, and, without stages, more microbatches than
    memory asks for.
    """
    found: list[Candidate] = []
    for sizes in meshes(target.num_devices, slices, facts.model):
        try:
            network.levels(target, sizes, slices)
        except ValueError as error:
            found.append(Candidate(Layout(sizes, slices=slices), None, str(error)))
            continue
        for context in CONTEXTS if sizes.get("context", 1) > 1 else CONTEXTS[:1]:
            for zero in (3, 1) if sizes.get("fsdp", 1) > 1 else (3,):
                whole = Layout(sizes, zero=zero, slices=slices, context=context)
                reason = cannot(facts, target, whole)
                found += (
                    [Candidate(whole, None, reason)] if reason else judged(facts, target, whole)
                )
    return sorted(found, key=rank)


def cannot(facts: Facts, target: Target, layout: Layout) -> str:
    """Why nothing can run on its mesh, at its ZeRO level and with its kind of context; else ""."""
    assert target.chip
    try:
        check_mesh(facts, layout)
        state, has = memory.state(facts, layout), memory.usable(target.chip.memory)
    except ValueError as error:
        return str(error)
    needs, given = tree.human_bytes(state), tree.human_bytes(has)
    return f"needs {needs} on each device for its state, which has {given}" if state > has else ""


def judged(facts: Facts, target: Target, whole: Layout) -> list[Candidate]:
    """Every layout of one mesh, ZeRO level and kind of context."""
    found: list[Candidate] = []
    weights: dict[int, list[comms.Collective]] = {}  # nothing else changes them
    fitting: collections.Counter[Any] = collections.Counter()
    for layout in layouts(facts, whole):
        alike = layout.sequence_parallel, layout.remat
        if whole.stages == 1 and fitting[alike] >= ENOUGH:
            continue
        if layout.accumulate not in weights:
            weights[layout.accumulate] = comms.of_weights(facts, layout)
        found.append(judge(facts, target, layout, weights[layout.accumulate]))
        fitting[alike] += found[-1].fits
    return found


def judge(
    facts: Facts, target: Target, layout: Layout, weights: list[comms.Collective] | None = None
) -> Candidate:
    """One layout, estimated; rejected where it cannot be cut, or needs more memory than a device has.
    weights: comms.of_weights, if known.
    """
    try:
        made = cost.estimate(facts, target, layout, weights=weights)
    except ValueError as error:
        return Candidate(layout, None, str(error))
    needs, has = (tree.human_bytes(n) for n in (made.memory.peak, made.capacity))
    reason = "" if made.fits else f"needs {needs} on each device, which has {has}"
    return Candidate(layout, made, reason)


def meshes(num_devices: int, slices: int = 1, model: Transformer | None = None) -> Iterator[Sizes]:
    """Every cut of the devices into data, fsdp and tensor, and what else can cut the model; replica is the
    number of slices.
    """
    axes = ["tensor", "fsdp"]
    if model is not None:
        axes += ["context", "stage", *(["expert"] if model.experts.num else [])]

    def cuts(axes: list[str], left: int) -> Iterator[dict[str, int]]:
        if not axes:
            yield {"replica": slices, "data": left}
            return
        for size in divisors(left):
            for rest in cuts(axes[1:], left // size):
                yield {axes[0]: size, **rest}

    for sizes in cuts(axes, num_devices):
        yield {axis: sizes[axis] for axis in AXES if sizes.get(axis, 1) > 1}


def layouts(facts: Facts, whole: Layout) -> Iterator[Layout]:
    """Every way to run on one mesh, at one ZeRO level and with one kind of context; remat is a model's own
    field, which only the Transformer has.
    """
    saved = facts.model.saved if facts.model else whole.saved
    for parallel in (False, True) if whole.size("tensor") > 1 else (False,):
        for accumulate in accumulations(facts, whole):
            for scheduled in schedulings(facts, whole._replace(accumulate=accumulate)):
                for remat in REMATS if facts.model else ("",):
                    yield scheduled._replace(sequence_parallel=parallel, remat=remat, saved=saved)


def schedulings(facts: Facts, layout: Layout) -> Iterator[Layout]:
    """With each schedule of a pipeline."""
    yield layout
    if layout.stages == 1 or facts.model is None:
        return
    for virtual in VIRTUAL:
        chunks = layout.stages * virtual
        if facts.model.layers % chunks == 0 and layout.accumulate % layout.stages == 0:
            yield layout._replace(pipeline="interleaved", virtual=virtual)


def accumulations(facts: Facts, layout: Layout) -> list[int]:
    """Powers of 2 up to the rows of a device, in a pipeline from the number of its stages; the largest also
    where that is less, or where the batch does not divide at all.
    """
    rows = facts.batch_size // layout.size(*BATCH_AXES)
    powers = [2**i for i in range(max(rows, 1).bit_length())]
    return [n for n in powers if n >= layout.stages] or powers[-1:]


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def rank(candidate: Candidate) -> tuple[bool, float]:
    """Those that fit first, the fastest first."""
    made = candidate.estimate
    return not candidate.fits, made.step_seconds if made else float("inf")
