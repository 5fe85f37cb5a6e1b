"""The collectives of a step, in closed form.

Counted as the TPU compiler leaves them (read from programs for v5p:2x2x2; tests/plan hold the forms):

- a block's weights that fsdp cuts (ZeRO-3) are gathered in the compute type twice in each microbatch, forward
  and backward; norms as they are; the table once in a step; the head once, or twice for a chunk of the loss.
- gradients are summed in the parameters' own type, float32 at least, once in each microbatch, the head's for
  each chunk: those of matrices under ZeRO-3 by a reduce-scatter over fsdp, then an all-reduce of the shard
  over the other axes that cut tokens (HSDP), context by itself and of the head once for all chunks; those of
  norms, of experts (whose layer is a shard_map, which sums whole gradients) and of the table, which is a
  scatter, by one all-reduce over all axes that cut tokens.
  Under ZeRO-1 the compiler leaves all-reduces (the stacked gradients leave the loop whole) where Rajbhandari
  et al. 2020 have reduce-scatters.
- ZeRO-1 gathers the new parameters once in a step, in their own type.
- tensor: one sum of [tokens, embed] after attention and one after the feed-forward layer, two in the backward
  pass, one more where remat computes the attention's output anew; one for the table, one for the head; three
  numbers for each token in the loss. Sequence parallelism makes each sum a reduce-scatter, and gathers what
  enters attention and feed-forward layer: forward, again under remat, and the gradients of their outputs. A
  mixture sums three times instead of twice, in float32.
- context, ring: keys and values go round n - 1 times in each forward, and n - 1 times backward, where their
  gradients go n times in float32; queries, keys and values change their order before each forward, the
  result after it, and so do their gradients. With any remat the backward pass has a forward of its own.
  ulysses: four all-to-alls in each forward, and of their gradients.
- expert: the rows of top_k experts travel there and back, again where the backward pass computes them anew,
  and their gradients; in ROUNDS rounds, each of whole buffers.
- stage: at each tick of the schedule an activation goes up and a gradient down, on all stages. Each
  microbatch has one more forward: that of its backward, which begins at the kept input. What fsdp, expert
  and context share is summed for each microbatch (of the table's gradient, rows are gathered instead), over
  replica and data once in a step, and what no stage owns (table, last norm, head) over the stages too. Table
  and head count on every stage, though one has each. interleaved brings weights to their stages once in a
  step, and takes gradients back.

Left out: the scalars of loss, metrics and global norm; document numbers; what routing tells.
"""

# KV: of keys or values, Q: of queries, on one device

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from jax.sharding import AbstractMesh

from spmd import hlo
from spmd.mesh import AXES, BATCH_AXES
from spmd.pipeline.arrays import STAGE, exchange_turns
from spmd.pipeline.execute import MANUAL_BATCH
from spmd.plan.facts import Facts, Leaf, abstract_mesh
from spmd.plan.layout import Layout, tokens
from spmd.plan.shardings import GROUPS

WHAT = (
    "keys and values",
    "parameters",
    "gradients",
    "new parameters",
    "merges",  # what a strategy other than auto exchanges by itself
    "activations",
    "rows",
    "microbatches",
    "chunks",
)
TOKEN_AXES = (*BATCH_AXES, "context")  # those that cut what a gradient is summed over
WIDE = 4  # bytes of float32
SCALAR = 8  # bytes: of loss, metrics and norms, for which no parameter waits
# Rounds of a mixture's exchange: the first has room for even loads, and loads are never quite even.
ROUNDS = 2


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
        if self.kind == "collective-permute":
            return self.bytes * self.count
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * (self.group - 1) / self.group * self.bytes * self.count

    @property
    def ticking(self) -> bool:
        """Whether a pipeline does it within a microbatch's work: a stage that waits does not."""
        return self.what in ("keys and values", "parameters", "activations", "rows") or (
            self.what == "gradients" and not set(self.axes) <= {*MANUAL_BATCH, STAGE}
        )

    def json(self) -> dict[str, Any]:
        """As JSON types."""
        return {**dataclasses.asdict(self), "axes": list(self.axes), "wire_bytes": self.wire_bytes}


def of(facts: Facts, layout: Layout, weights: list[Collective] | None = None) -> list[Collective]:
    """Every collective of a step; ValueError where a dim does not divide. weights: of_weights, if known."""
    found = list(of_weights(facts, layout) if weights is None else weights)
    if facts.model is not None:
        parts = {"tensor": _of_tensor, "context": _of_context, "stage": _of_stages}
        if facts.model.experts.num:
            parts["expert"] = _of_experts
        for axis, part in parts.items():
            if layout.size(axis) > 1:
                found += part(facts, layout)
    return _joined(found)


def of_weights(facts: Facts, layout: Layout) -> list[Collective]:
    """Of them, those of parameters: mesh, ZeRO level and microbatches decide."""
    mesh = abstract_mesh(layout.mesh)
    return _joined(each for leaf in facts.weights for each in _of_param(facts, layout, mesh, leaf))


def _joined(found: Iterable[Collective]) -> list[Collective]:
    """Those that differ in nothing but how often they run, as one."""
    alike: dict[Any, Collective] = {}
    for each in found:
        key = each.kind, each.axes, each.bytes, each.what
        count = each.count + (alike[key].count if key in alike else 0)
        alike[key] = Collective(each.kind, each.axes, each.group, each.bytes, count, each.what)
    return list(alike.values())


def compiled(
    program: hlo.Program, layout: Layout, merges_over: tuple[str, ...] = ()
) -> list[Collective]:
    """Those of a compiled program, by what they carry: gathers over batch axes are parameters, sums over axes
    that share gradients are these, all else activations; all over axes of `merges_over` only, merges. Groups
    that span no product of axes count for the whole mesh.

    The text does not tell how often a branch is taken, nor how many rounds a mixture needs: of a pipeline's
    ticks, those count in which a stage works; rounds are ROUNDS.
    """
    whole = tuple(axis for axis in layout.mesh if layout.size(axis) > 1)
    found = []
    for c in hlo.alike(program.collectives):
        if c.bytes <= SCALAR:
            continue
        axes, count = c.axes or whole, c.count
        what = "merges" if set(axes) <= {*merges_over} else _carried(c.kind, axes, layout)
        if what == "new parameters" and layout.stages > 1 and count % layout.ticks == 0:
            what = "activations"  # a table's rows, at each tick
        made = Collective(c.kind, axes, c.group, c.bytes, count, what)
        if made.what == "rows":
            ways = layout.size("expert")
            count *= ROUNDS if program.endless else min(ROUNDS, ways) / ways
        if layout.stages > 1 and made.ticking:
            count *= layout.accumulate * layout.virtual / layout.ticks
        found.append(dataclasses.replace(made, count=count))
    return found


def _carried(kind: str, axes: tuple[str, ...], layout: Layout) -> str:
    over = set(axes)
    if kind == "collective-permute":
        named = {STAGE: "microbatches", "context": "keys and values"}
        # A TPU gathers weights over fsdp, and sums their gradients, piece by piece beside products.
        named |= dict.fromkeys(BATCH_AXES, "parameters")
        return named.get(axes[0], "activations") if len(axes) == 1 else "activations"
    if kind == "all-to-all":
        return "rows" if "expert" in over else "activations"
    if kind == "all-gather" and over <= {*BATCH_AXES}:
        return "new parameters" if layout.zero == 1 else "parameters"
    if kind in ("all-reduce", "reduce-scatter") and over <= {*TOKEN_AXES, STAGE}:
        return "gradients"
    return "activations"


def ledger(found: Iterable[Collective]) -> dict[hlo.Key, hlo.Total]:
    """As hlo.ledger, of collectives in closed form: (axes, kind) -> its sum over a step."""
    return hlo.summed(
        ((each.axes, each.kind), hlo.Total(each.count, each.count * each.bytes, each.wire_bytes))
        for each in found
    )


# ---- parameters


def _of_param(facts: Facts, layout: Layout, mesh: AbstractMesh, leaf: Leaf) -> Iterator[Collective]:
    fsdp, micro, piped = layout.size("fsdp"), layout.accumulate, layout.stages > 1
    cut = "fsdp" in leaf.axes(mesh, fsdp=True)
    layers, table = layers_here(leaf, layout), is_table(leaf)
    # One layer, whole but for the axes that cut it anyway.
    own = leaf.bytes(mesh, fsdp=False) / layers
    matrix = len(leaf.shape) > 1 + bool(leaf.stacked)
    narrow = own * facts.compute / leaf.itemsize if matrix else own
    chunks = facts.chunks if facts.model is not None and is_head(facts, leaf) else 1
    if cut and layout.zero == 3:
        gathers = (1 if chunks == 1 else 2 * chunks) * micro if is_head(facts, leaf) else 0
        gathers += (2 * micro if piped else 1) if table else 0
        gathers = gathers or (3 if piped else 2) * layers * micro
        yield Collective("all-gather", ("fsdp",), fsdp, narrow, gathers, "parameters")
    if leaf.group != GROUPS["params"]:  # frozen
        return
    if cut and layout.zero == 1:
        yield Collective("all-gather", ("fsdp",), fsdp, own * layers, 1, "new parameters")
    shared = shared_over(leaf, layout, mesh)
    within = tuple(axis for axis in shared if not piped or axis not in MANUAL_BATCH)
    summed = own * leaf.widening
    # A pipeline's sums lie as ZeRO-3's do, whatever the parameters do.
    sharded = cut and (layout.zero == 3 or piped)
    parts = [(False, micro)] if table else []  # a tied table has both gradients
    if not table or is_head(facts, leaf):
        parts.append((matrix and not is_expert(leaf), layers * micro * chunks))
    for product, count in parts:
        if piped and table and not product:  # of all rows, each device takes those of its own part
            yield from _rows(facts, layout, within, max(leaf.itemsize, WIDE), count)
            continue
        bytes, rest = summed, within
        if sharded and product:
            yield Collective("reduce-scatter", ("fsdp",), fsdp, summed, count, "gradients")
            bytes, rest = summed / fsdp, _without(within, "fsdp")
        if product and "context" in rest:  # by itself, and once for all chunks of the loss
            yield from _summed(layout, ("context",), bytes, count / chunks)
            rest = _without(rest, "context")
        yield from _summed(layout, rest, bytes, count)
    if piped:
        once = tuple(axis for axis in shared if axis in MANUAL_BATCH)
        once += () if leaf.stacked else (STAGE,)
        yield from _summed(layout, once, summed * layers / (fsdp if sharded else 1), 1)


def _summed(
    layout: Layout, axes: tuple[str, ...], bytes: float, count: float
) -> Iterator[Collective]:
    if axes:
        yield Collective("all-reduce", axes, layout.size(*axes), bytes, count, "gradients")


def _rows(
    facts: Facts, layout: Layout, axes: tuple[str, ...], itemsize: int, count: float
) -> Iterator[Collective]:
    """The gradients of what was looked up in a table, brought together."""
    assert facts.model
    if axes:
        ways = layout.size(*axes)
        size = tokens(facts, layout) * ways * facts.model.embed * itemsize
        yield Collective("all-gather", axes, ways, size, count, "activations")


def _without(axes: tuple[str, ...], axis: str) -> tuple[str, ...]:
    return tuple(each for each in axes if each != axis)


def layers_here(leaf: Leaf, layout: Layout) -> int:
    """Layers of it on a device; 1 for an array of one."""
    return leaf.stacked // layout.stages if leaf.stacked else 1


def shared_over(leaf: Leaf, layout: Layout, mesh: AbstractMesh) -> tuple[str, ...]:
    """The axes over whose tokens its gradient is summed: all that cut tokens, and not the array itself."""
    own = leaf.axes(mesh, fsdp=False)
    return tuple(a for a in AXES if a in TOKEN_AXES and layout.size(a) > 1 and a not in own)


def is_table(leaf: Leaf) -> bool:
    """Whether rows of it are looked up."""
    return leaf.dims in (("vocab", "embed"), ("position", "embed"))


def is_expert(leaf: Leaf) -> bool:
    """Whether it is a mixture's, whose products run on each device's block (moe.Mixture)."""
    return bool(leaf.dims and "experts" in leaf.dims)


def is_head(facts: Facts, leaf: Leaf) -> bool:
    """Whether the logits are a product with it."""
    tied = facts.model is not None and facts.model.tied
    return leaf.dims == (("vocab", "embed") if tied else ("embed", "vocab"))


# ---- activations


def forwards(layout: Layout) -> int:
    """How often attention runs forward for each microbatch: its kernel keeps more than any remat does."""
    return 1 + (layout.remat != "none") + (layout.stages > 1)


def blocks(facts: Facts, layout: Layout) -> int:
    """Times that a device runs a block in a step, counted forward without what is computed anew."""
    assert facts.model
    return facts.model.layers // layout.stages * layout.accumulate


def _of_tensor(facts: Facts, layout: Layout) -> Iterator[Collective]:
    """Of tensor and sequence parallelism."""
    model, ways, here = facts.model, layout.size("tensor"), tokens(facts, layout)
    assert model
    size, again = here * model.embed * facts.compute, layout.stages > 1
    anew = layout.remat in ("named", "full")  # the attention's output, for what comes after it
    mixture = bool(model.experts.num)
    of_block = 4 + anew + 2 * again - 2 * mixture
    # And of the table, which a pipeline looks up twice, and of the head.
    sums = blocks(facts, layout) * of_block + (2 + again) * layout.accumulate

    def each(kind: str, bytes: float, count: int) -> Collective:
        return Collective(kind, ("tensor",), ways, bytes, count, "activations")

    if layout.sequence_parallel:
        gathers = (4 if layout.remat == "none" else 6) + 2 * again
        yield each("reduce-scatter", size, sums)
        count = blocks(facts, layout) * gathers + (2 + again) * layout.accumulate
        yield each("all-gather", size, count)
    else:
        yield each("all-reduce", size, sums)
    if mixture:
        count = blocks(facts, layout) * (3 + again)
        yield each("all-reduce", here * model.embed * WIDE, count)
    yield each("all-reduce", here * 4, 3 * layout.accumulate)


def _of_context(facts: Facts, layout: Layout) -> Iterator[Collective]:
    """Of attention to a sequence that devices share."""
    model, ways, num = facts.model, layout.size("context"), blocks(facts, layout)
    assert model
    # Bytes for each element of a head on a device: its tokens, times its width.
    each = tokens(facts, layout) / layout.size("tensor") * model.width
    kv, q = each * model.num_kv_heads * facts.compute, each * model.heads * facts.compute
    passes = forwards(layout) + 1  # and the backward
    if layout.context == "ulysses":
        kept = (
            layout.remat == "named" and "attended" in layout.saved
        )  # the way back need not be made anew
        for size, count in ((q, 2 * passes - kept), (kv, 2 * passes)):
            yield Collective("all-to-all", ("context",), ways, size, num * count, "activations")
        return

    def sent(bytes: float, count: float, what: str) -> Collective:
        return Collective("collective-permute", ("context",), ways, bytes, num * count, what)

    yield sent(kv, 2 * (ways - 1) * passes, "keys and values")
    yield sent(kv * WIDE / facts.compute, 2 * ways, "keys and values")
    # In halves, of which two devices keep one where they are.
    moved = 2 * passes * (1 if ways == 2 else 2)
    yield sent(kv / 2, moved, "activations")
    yield sent(q / 2, moved, "activations")


def _of_experts(facts: Facts, layout: Layout) -> Iterator[Collective]:
    """Of the exchange of a mixture's rows."""
    model, ways = facts.model, layout.size("expert")
    assert model
    rows = tokens(facts, layout) * model.experts.top_k * model.embed * facts.compute
    trips = 2 * (3 + (layout.stages > 1)) * min(ROUNDS, ways)
    count = blocks(facts, layout) * trips
    yield Collective("all-to-all", ("expert",), ways, rows, count, "rows")


def _of_stages(facts: Facts, layout: Layout) -> Iterator[Collective]:
    """Of a pipeline: what flows between its stages, and what virtual ones take from others."""
    model, ways, mesh = facts.model, layout.stages, abstract_mesh(layout.mesh)
    assert model
    size = tokens(facts, layout) * model.embed * facts.compute
    size /= layout.size("tensor") if layout.sequence_parallel else 1
    permute = ("collective-permute", (STAGE,), ways)
    yield Collective(*permute, size, 2 * layout.ticks, "microbatches")
    if layout.virtual == 1:
        return
    turns = moving_turns(ways, layout.virtual)
    for leaf in facts.params:
        if leaf.stacked:  # a chunk in each turn, as it lies, and its gradient back
            chunk = leaf.bytes(mesh, fsdp=layout.zero == 3) * leaf.widening / layout.virtual
            yield Collective(*permute, chunk, turns, "chunks")
            chunk = leaf.bytes(mesh, fsdp=True) * leaf.widening / layout.virtual
            yield Collective(*permute, chunk, turns, "chunks")


def moving_turns(stages: int, virtual: int) -> int:
    """Of the turns in which virtual stages get their chunks, those in which not all are where they belong."""
    return sum(
        any(sent % stages != stage for stage, sent in enumerate(turn))
        for turn in exchange_turns(stages, virtual)
    )
