"""Collectives of activations: tensor, context, expert and pipeline parallelism (see comms)."""

# KV: of keys or values, Q: of queries, on one device

from __future__ import annotations

from collections.abc import Callable, Iterator

from spmd.analysis.plan.blocks import Blocks
from spmd.analysis.plan.collective import EstimatedCollective
from spmd.analysis.plan.facts import FLOAT32_BYTES, Facts, abstract_mesh, head_dims
from spmd.analysis.plan.layout import Layout, tokens
from spmd.strategies.grads.pipeline.arrays import STAGE, exchange_turns

Collective = Callable[..., EstimatedCollective]
# Rounds in which a mixture of experts exchanges its rows: one round has room for even loads only, and loads
# are never quite even.
ROUNDS = 2


def forward_passes(layout: Layout) -> int:
    """Times that attention runs forward per microbatch: remat repeats it, as its kernel saves more than any
    remat policy keeps, and so does a pipeline's backward pass.
    """
    return 1 + (layout.remat not in ("none", "")) + (layout.stages > 1)


def block_runs(blocks: Blocks, layout: Layout) -> int:
    """Times that a device runs such a block forward in a step, recomputation not counted."""
    return blocks.num_blocks // layout.stages * layout.accumulate


def tensor_collectives(facts: Facts, layout: Layout) -> Iterator[EstimatedCollective]:
    """Collectives of tensor and sequence parallelism."""
    model, group, piped = facts.model, layout.size("tensor"), layout.stages > 1
    assert model

    def over_tensor(kind: str, bytes: float, count: float) -> EstimatedCollective:
        return EstimatedCollective(kind, ("tensor",), group, bytes, count, "activations")

    def sums(size: float, count: float) -> EstimatedCollective:
        return over_tensor(
            "reduce-scatter" if layout.sequence_parallel else "all-reduce", size, count
        )

    for blocks in model.blocks:
        runs, num, per_token = (
            block_runs(blocks, layout),
            blocks.layers,
            model.embed * facts.compute,
        )
        size = tokens(facts, layout, blocks.length) * per_token
        recomputes = layout.remat in ("named", "full")  # of all layers of a block but the last
        per_block = 2 * num + recomputes * (num - 1) + piped * num - 2 * blocks.mixture
        yield sums(size, runs * per_block)
        if layout.sequence_parallel:
            gathers = (2 if layout.remat in ("none", "") else 3) * num + num * piped
            yield over_tensor("all-gather", size, runs * gathers)
        if blocks.mixture:
            size = size / facts.compute * FLOAT32_BYTES
            yield over_tensor("all-reduce", size, runs * (3 + piped))
        if blocks.memory:  # its gradients in each block, by its keys and by its values
            yield sums(tokens(facts, layout, blocks.memory) * per_token, 2 * runs)
    yield from _vocabulary_collectives(facts, layout, sums, over_tensor)


def _vocabulary_collectives(
    facts: Facts, layout: Layout, sums: Collective, over_tensor: Collective
) -> Iterator[EstimatedCollective]:
    """Those of the table, which a pipeline looks up twice, of the head, and of the loss."""
    model, piped, micro = facts.model, layout.stages > 1, layout.accumulate
    assert model
    per_token = model.embed * facts.compute
    if any(leaf.dims == head_dims(tied=True) for leaf in facts.weights):
        for length in model.lengths:
            size = tokens(facts, layout, length) * per_token
            yield sums(size, (1 + piped) * micro)
            if layout.sequence_parallel:
                yield over_tensor("all-gather", size, (1 + piped) * micro)
    if model.rows:
        size = tokens(facts, layout) * per_token
        yield sums(size, micro)
        if layout.sequence_parallel:
            yield over_tensor("all-gather", size, micro)
        yield over_tensor("all-reduce", tokens(facts, layout) * 4, 3 * micro)


def context_collectives(facts: Facts, layout: Layout) -> Iterator[EstimatedCollective]:
    """Collectives of attention to sequences that are sharded over devices."""
    assert facts.model
    for blocks in facts.model.blocks:
        q_bytes, kv_bytes = _attention_bytes(facts, layout, blocks, blocks.length)
        reorders = blocks.config.mask == "causal"
        runs, compute = block_runs(blocks, layout), facts.compute
        yield from _attention_collectives(layout, runs, compute, q_bytes, kv_bytes, reorders)
        if blocks.memory:
            _, kv_bytes = _attention_bytes(facts, layout, blocks, blocks.memory)
            yield from _attention_collectives(layout, runs, compute, q_bytes, kv_bytes, False)


def _attention_bytes(
    facts: Facts, layout: Layout, blocks: Blocks, length: int
) -> tuple[float, float]:
    """Bytes on a device of the queries, and of the keys or values, of so many tokens."""
    config = blocks.config
    per_head = tokens(facts, layout, length) / layout.size("tensor") * config.width * facts.compute
    return per_head * config.heads, per_head * config.num_kv_heads


def _attention_collectives(
    layout: Layout, num: int, compute: int, q_bytes: float, kv_bytes: float, reorders: bool
) -> Iterator[EstimatedCollective]:
    """Those of `num` runs of a layer of attention.

    Args:
        layout: the layout.
        num: runs forward, recomputation not counted.
        compute: bytes of an element.
        q_bytes: of the queries on a device.
        kv_bytes: of its keys, or of its values.
        reorders: whether a ring reorders the sequence, so that devices have the same work.
    """
    group = layout.size("context")
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
    yield permute(kv_bytes * FLOAT32_BYTES / compute, 2 * group, "keys and values")
    if reorders:  # in halves; with two devices, each keeps one of its halves
        count = 2 * passes * (1 if group == 2 else 2)
        yield permute(kv_bytes / 2, count, "activations")
        yield permute(q_bytes / 2, count, "activations")


def expert_collectives(facts: Facts, layout: Layout) -> Iterator[EstimatedCollective]:
    """All-to-alls of the rows that a mixture of experts sends to its experts."""
    assert facts.model
    group = layout.size("expert")
    trips = 2 * (3 + (layout.stages > 1)) * min(ROUNDS, group)
    for blocks in facts.model.blocks:
        if blocks.mixture:
            config = blocks.config
            size = tokens(facts, layout, blocks.length) * config.experts.top_k * config.embed
            count = block_runs(blocks, layout) * trips
            yield EstimatedCollective(
                "all-to-all", ("expert",), group, size * facts.compute, count, "rows"
            )


def stream_bytes(facts: Facts, layout: Layout) -> float:
    """Bytes of a microbatch between two stages: of the tokens of all stacks."""
    assert facts.model
    size = tokens(facts, layout, sum(facts.model.lengths)) * facts.model.embed * facts.compute
    return size / (layout.size("tensor") if layout.sequence_parallel else 1)


def stage_collectives(facts: Facts, layout: Layout) -> Iterator[EstimatedCollective]:
    """Permutes between the stages of a pipeline, and those that bring weights to virtual stages."""
    stages, mesh = layout.stages, abstract_mesh(layout.mesh)
    permute = ("collective-permute", (STAGE,), stages)
    size = stream_bytes(facts, layout)
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
