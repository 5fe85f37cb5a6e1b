"""All layouts of an experiment on a target, estimated and ranked; those that cannot be keep the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from spmd import tree
from spmd.mesh import BATCH_AXES
from spmd.plan import cost, network
from spmd.plan.facts import Facts
from spmd.plan.layout import REMATS, Layout, Sizes
from spmd.plan.targets import Target


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

    Meshes of replica (between slices), data, fsdp and tensor x ZeRO level x accumulation (powers of 2) x
    remat x sequence parallelism. The global batch stays as it is.
    """
    found: list[Candidate] = []
    for sizes in meshes(target.num_devices, slices):
        try:
            network.levels(target, sizes, slices)
        except ValueError as error:
            found.append(Candidate(Layout(sizes, slices=slices), None, str(error)))
            continue
        found += [judge(facts, target, layout) for layout in layouts(facts, sizes, slices)]
    return sorted(found, key=rank)


def judge(facts: Facts, target: Target, layout: Layout) -> Candidate:
    """One layout, estimated; rejected where it cannot be cut, or needs more memory than a device has."""
    try:
        made = cost.estimate(facts, target, layout)
    except ValueError as error:
        return Candidate(layout, None, str(error))
    needs, has = (tree.human_bytes(n) for n in (made.memory.peak, made.capacity))
    reason = "" if made.fits else f"needs {needs} on each device, which has {has}"
    return Candidate(layout, made, reason)


def meshes(num_devices: int, slices: int = 1) -> Iterator[Sizes]:
    """Every cut of the devices into data, fsdp and tensor; replica is the number of slices."""
    for tensor in divisors(num_devices):
        for fsdp in divisors(num_devices // tensor):
            data = num_devices // tensor // fsdp
            sizes = {"replica": slices, "data": data, "fsdp": fsdp, "tensor": tensor}
            yield {axis: size for axis, size in sizes.items() if size > 1}


def layouts(facts: Facts, sizes: Sizes, slices: int = 1) -> Iterator[Layout]:
    """Every way to run on one mesh; remat is a model's own field, which only the Transformer has."""
    whole = Layout(sizes, slices=slices)
    saved = facts.model.saved if facts.model else whole.saved
    for zero in (3, 1) if whole.size("fsdp") > 1 else (3,):
        for parallel in (False, True) if whole.size("tensor") > 1 else (False,):
            for accumulate in accumulations(facts, whole):
                for remat in REMATS if facts.model else ("",):
                    yield Layout(sizes, zero, parallel, accumulate, remat, saved, slices)


def accumulations(facts: Facts, layout: Layout) -> list[int]:
    """Powers of 2 up to the rows of a device; 1 also where the batch does not divide at all."""
    rows = facts.batch_size // layout.size(*BATCH_AXES)
    return [2**i for i in range(max(rows, 1).bit_length())]


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def rank(candidate: Candidate) -> tuple[bool, float]:
    """Those that fit first, the fastest first."""
    made = candidate.estimate
    return not candidate.fits, made.step_seconds if made else float("inf")
