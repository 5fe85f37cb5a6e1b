"""The collectives of a step, in closed form.

Counted as the TPU compiler leaves them (read from programs for v5p:2x2x2; tests/plan hold the forms):

- a block's weights that fsdp cuts (ZeRO-3) are gathered in the compute type twice in each microbatch, forward
  and backward; norms as they are; the table once in a step; the head once, or twice for a chunk of the loss.
- gradients are summed in the parameters' own type once in each microbatch, the head's for each chunk: those
  of matrices under ZeRO-3 by a reduce-scatter over fsdp, then an all-reduce of the shard over the other batch
  axes (HSDP); those of norms and of the table, which is a scatter, by one all-reduce over all batch axes.
  Under ZeRO-1 the compiler leaves all-reduces (the stacked gradients leave the loop whole) where Rajbhandari
  et al. 2020 have reduce-scatters.
- ZeRO-1 gathers the new parameters once in a step, in their own type.
- tensor: one sum of [tokens, embed] after attention and one after the feed-forward layer, two in the backward
  pass, one more where remat computes the attention's output anew; one for the table, one for the head; three
  numbers for each token in the loss. Sequence parallelism makes each sum a reduce-scatter, and gathers what
  enters attention and feed-forward layer: forward, again under remat, and the gradients of their outputs.

Left out: the scalars of loss, metrics and global norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from jax.sharding import AbstractMesh

from spmd import hlo
from spmd.mesh import BATCH_AXES
from spmd.plan.facts import Facts, Leaf, abstract_mesh
from spmd.plan.layout import Layout, tokens
from spmd.plan.shardings import GROUPS

WHAT = ("parameters", "gradients", "new parameters", "activations")


@dataclasses.dataclass(frozen=True)
class Collective:
    """As spmd.hlo's: bytes of the whole (gathered, or not yet reduced) array that one device takes part in,
    for each of `count` executions in a step. what: of WHAT.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    bytes: float
    count: float
    what: str

    @property
    def wire_bytes(self) -> float:
        """That one device sends in a step, by rings."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * (self.group - 1) / self.group * self.bytes * self.count

    def json(self) -> dict[str, Any]:
        """As JSON types."""
        return {**dataclasses.asdict(self), "axes": list(self.axes), "wire_bytes": self.wire_bytes}


def of(facts: Facts, layout: Layout) -> list[Collective]:
    """Every collective of a step; ValueError where a dim does not divide."""
    mesh = abstract_mesh(layout.mesh)
    found = [each for leaf in facts.weights for each in _of_param(facts, layout, mesh, leaf)]
    if facts.model is not None and layout.size("tensor") > 1:
        found += _of_activations(facts, layout)
    counts: dict[Collective, float] = {}
    for each in found:
        alike = dataclasses.replace(each, count=0)
        counts[alike] = counts.get(alike, 0) + each.count
    return [dataclasses.replace(alike, count=count) for alike, count in counts.items()]


def compiled(program: hlo.Program, layout: Layout) -> list[Collective]:
    """Those of a compiled program, by what they carry: gathers over batch axes are parameters, sums over them
    gradients, all else activations. Groups that span no product of axes count for the whole mesh.
    """
    whole = tuple(axis for axis in layout.mesh if layout.size(axis) > 1)
    found = []
    for c in hlo.alike(program.collectives):
        axes = c.axes or whole
        what = "activations"
        if set(axes) <= {*BATCH_AXES}:
            gathered = "new parameters" if layout.zero == 1 else "parameters"
            what = gathered if c.kind == "all-gather" else "gradients"
        found.append(Collective(c.kind, axes, c.group, c.bytes, c.count, what))
    return found


def ledger(found: Iterable[Collective]) -> dict[hlo.Key, hlo.Total]:
    """As hlo.ledger, of collectives in closed form: (axes, kind) -> its sum over a step."""
    return hlo.summed(
        ((each.axes, each.kind), hlo.Total(each.count, each.count * each.bytes, each.wire_bytes))
        for each in found
    )


# ---- parameters


def _of_param(facts: Facts, layout: Layout, mesh: AbstractMesh, leaf: Leaf) -> Iterator[Collective]:
    other = tuple(a for a in (*BATCH_AXES, "context") if a != "fsdp" and layout.size(a) > 1)
    fsdp, micro = layout.size("fsdp"), layout.accumulate
    cut = "fsdp" in leaf.axes(mesh, fsdp=True)
    layers, table = leaf.stacked or 1, is_table(leaf)
    own = (
        leaf.bytes(mesh, fsdp=False) / layers
    )  # one layer, whole but for the axes that are no batch axes
    matrix = len(leaf.shape) > 1 + bool(leaf.stacked)
    narrow = own * facts.compute / leaf.itemsize if matrix else own
    chunks = facts.chunks if facts.model is not None and is_head(facts, leaf) else 1
    if cut and layout.zero == 3:
        gathers = (1 if chunks == 1 else 2 * chunks) * micro if is_head(facts, leaf) else 0
        gathers += 1 if table else 0 if gathers else 2 * layers * micro
        yield Collective("all-gather", ("fsdp",), fsdp, narrow, gathers, "parameters")
    if leaf.group != GROUPS["params"]:  # frozen
        return
    if cut and layout.zero == 1:
        yield Collective("all-gather", ("fsdp",), fsdp, own * layers, 1, "new parameters")
    parts = [(False, micro)] if table else []  # a tied table has both gradients
    if not table or is_head(facts, leaf):
        parts.append((matrix, layers * micro * chunks))
    for product, count in parts:
        if cut and layout.zero == 3 and product:
            yield Collective("reduce-scatter", ("fsdp",), fsdp, own, count, "gradients")
            rest, bytes = other, own / fsdp
        else:
            rest = tuple(a for a in (*BATCH_AXES, "context") if layout.size(a) > 1)
            bytes = own
        if rest:
            group = layout.size(*rest)
            yield Collective("all-reduce", rest, group, bytes, count, "gradients")


def is_table(leaf: Leaf) -> bool:
    """Whether rows of it are looked up."""
    return leaf.dims in (("vocab", "embed"), ("position", "embed"))


def is_head(facts: Facts, leaf: Leaf) -> bool:
    """Whether the logits are a product with it."""
    tied = facts.model is not None and facts.model.tied
    return leaf.dims == (("vocab", "embed") if tied else ("embed", "vocab"))


# ---- activations


def _of_activations(facts: Facts, layout: Layout) -> Iterator[Collective]:
    """Of tensor and sequence parallelism."""
    model, ways, here = facts.model, layout.size("tensor"), tokens(facts, layout)
    assert model
    size = here * model.embed * facts.compute
    anew = layout.remat in ("named", "full")  # the attention's output, for what comes after it
    blocks = model.layers * layout.accumulate
    sums = blocks * (5 if anew else 4) + 2 * layout.accumulate  # and of the table, and of the head

    def each(kind: str, bytes: float, count: int) -> Collective:
        return Collective(kind, ("tensor",), ways, bytes, count, "activations")

    if layout.sequence_parallel:
        gathers = blocks * (4 if layout.remat == "none" else 6) + 2 * layout.accumulate
        yield each("reduce-scatter", size, sums)
        yield each("all-gather", size, gathers)
    else:
        yield each("all-reduce", size, sums)
    yield each("all-reduce", here * 4, 3 * layout.accumulate)
