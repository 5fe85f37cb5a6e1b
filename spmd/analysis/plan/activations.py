"""Collectives of activations: tensor, context, expert and pipeline parallelism (see comms)."""

# KV: of keys or values, Q: of queries, on one device

from __future__ import annotations

from collections.abc import Iterator

from spmd.analysis.plan.collective import EstimatedCollective
from spmd.analysis.plan.facts import FLOAT32_BYTES, Facts, abstract_mesh
from spmd.analysis.plan.layout import Layout, tokens
from spmd.strategies.grads.pipeline.arrays import STAGE, exchange_turns

# Rounds in which a mixture of experts exchanges its rows: one round has room for even loads only, and loads
# are never quite even.
ROUNDS = 2


def forward_passes(layout: Layout) -> int:
    """Times that attention runs forward per microbatch: remat repeats it, as its kernel saves more than any
    remat policy keeps, and so does a pipeline's backward pass.
    """
    return 1 + (layout.remat != "none") + (layout.stages > 1)


def block_runs(facts: Facts, layout: Layout) -> int:
    """Times that a device runs a block forward in a step, recomputation not counted."""
    assert facts.model
    return facts.model.layers // layout.stages * layout.accumulate


def tensor_collectives(facts: Facts, layout: Layout) -> Iterator[EstimatedCollective]:
    """Collectives of tensor and sequence parallelism."""
    model, group, local_tokens = facts.model, layout.size("tensor"), tokens(facts, layout)
    assert model
    size, piped = local_tokens * model.embed * facts.compute, layout.stages > 1
    recomputes = layout.remat in ("named", "full")  # the attention output
    mixture = bool(model.experts.num)
    per_block = 4 + recomputes + 2 * piped - 2 * mixture
    # And those of the table, which a pipeline looks up twice, and of the head.
    sums = block_runs(facts, layout) * per_block + (2 + piped) * layout.accumulate

    def over_tensor(kind: str, bytes: float, count: int) -> EstimatedCollective:
        return EstimatedCollective(kind, ("tensor",), group, bytes, count, "activations")

    if layout.sequence_parallel:
        gathers = (4 if layout.remat == "none" else 6) + 2 * piped
        yield over_tensor("reduce-scatter", size, sums)
        count = block_runs(facts, layout) * gathers + (2 + piped) * layout.accumulate
        yield over_tensor("all-gather", size, count)
    else:
        yield over_tensor("all-reduce", size, sums)
    if mixture:
        count = block_runs(facts, layout) * (3 + piped)
        yield over_tensor("all-reduce", local_tokens * model.embed * FLOAT32_BYTES, count)
    yield over_tensor("all-reduce", local_tokens * 4, 3 * layout.accumulate)


def context_collectives(facts: Facts, layout: Layout) -> Iterator[EstimatedCollective]:
    """Collectives of attention to a sequence that is sharded over devices."""
    model, group, num = facts.model, layout.size("context"), block_runs(facts, layout)
    assert model
    per_head = tokens(facts, layout) / layout.size("tensor") * model.width  # elements on a device
    kv_bytes = per_head * model.num_kv_heads * facts.compute
    q_bytes = per_head * model.heads * facts.compute
    passes = forward_passes(layout) + 1  # and the backward pass
    if layout.context == "ulysses":
        # With the result saved, the all-to-all that returns it is not recomputed.
        saved = layout.remat == "named" and "attended" in layout.saved
        for size, count in ((q_bytes, 2 * passes - saved), (kv_bytes, 2 * passes)):
            yield EstimatedCollective(
                "all-to-all", ("context",), group, size, num * count, "activations"
            )
        return

    def permute(bytes: float, count: float, payload: str) -> EstimatedCollective:
        return EstimatedCollective(
            "collective-permute", ("context",), group, bytes, num * count, payload
        )

    yield permute(kv_bytes, 2 * (group - 1) * passes, "keys and values")
    yield permute(kv_bytes * FLOAT32_BYTES / facts.compute, 2 * group, "keys and values")
    if model.mask == "full":
        return
    # Sequences are reordered in halves; with two devices, each keeps one of its halves.
    reorders = 2 * passes * (1 if group == 2 else 2)
    yield permute(kv_bytes / 2, reorders, "activations")
    yield permute(q_bytes / 2, reorders, "activations")


def expert_collectives(facts: Facts, layout: Layout) -> Iterator[EstimatedCollective]:
    """All-to-alls of the rows that a mixture of experts sends to its experts."""
    model, group = facts.model, layout.size("expert")
    assert model
    size = tokens(facts, layout) * model.experts.top_k * model.embed * facts.compute
    trips = 2 * (3 + (layout.stages > 1)) * min(ROUNDS, group)
    count = block_runs(facts, layout) * trips
    yield EstimatedCollective("all-to-all", ("expert",), group, size, count, "rows")


def stage_collectives(facts: Facts, layout: Layout) -> Iterator[EstimatedCollective]:
    """Permutes between the stages of a pipeline, and those that bring weights to virtual stages."""
    model, stages, mesh = facts.model, layout.stages, abstract_mesh(layout.mesh)
    assert model
    size = tokens(facts, layout) * model.embed * facts.compute
    size /= layout.size("tensor") if layout.sequence_parallel else 1
    permute = ("collective-permute", (STAGE,), stages)
    yield EstimatedCollective(*permute, size, 2 * layout.ticks, "microbatches")
    if layout.virtual == 1:
        return
    turns = moving_turns(stages, layout.virtual)
    for leaf in facts.params:
        if leaf.stacked:  # a chunk per turn, sharded as the parameter is, and its gradient back
            chunk = leaf.bytes(mesh, fsdp=layout.zero == 3) * leaf.widening / layout.virtual
            yield EstimatedCollective(*permute, chunk, turns, "chunks")
            chunk = leaf.bytes(mesh, fsdp=True) * leaf.widening / layout.virtual
            yield EstimatedCollective(*permute, chunk, turns, "chunks")


def moving_turns(stages: int, virtual: int) -> int:
    """Turns of the exchange of chunks in which some stage receives a chunk that it does not hold already."""
    return sum(
        any(sent % stages != stage for stage, sent in enumerate(turn))
        for turn in exchange_turns(stages, virtual)
    )
