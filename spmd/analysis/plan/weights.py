"""Collectives of the weights: all-gathers of parameters, reductions of gradients (see comms)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jax.sharding import AbstractMesh

from spmd.analysis.plan.collective import EstimatedCollective, merge_equal
from spmd.analysis.plan.facts import Facts, StateArray, abstract_mesh, head_dims
from spmd.analysis.plan.layout import Layout, tokens
from spmd.analysis.plan.shardings import GROUPS
from spmd.parallel.mesh import AXES, BATCH_AXES
from spmd.strategies.grads.pipeline.arrays import STAGE
from spmd.strategies.grads.pipeline.execute import MANUAL_BATCH

TOKEN_AXES = (*BATCH_AXES, "context")  # axes that shard the tokens which a gradient is summed over


def weight_collectives(facts: Facts, layout: Layout) -> list[EstimatedCollective]:
    """Collectives of parameters and gradients; they depend on mesh, ZeRO level and microbatches only.

    With K gradients there are K backward passes, each of which gathers parameters and reduces gradients.
    """
    mesh, num = abstract_mesh(layout.mesh), facts.gradients
    passes = {"gradients": num, "parameters": (1 + num) / 2}
    return merge_equal(
        dataclasses.replace(each, count=each.count * passes.get(each.payload, 1))
        for leaf in facts.weights
        for each in _leaf_collectives(facts, layout, mesh, leaf)
    )


def layers_per_device(leaf: StateArray, layout: Layout) -> int:
    """Layers of a stacked array on a device; 1 for an array that is not stacked."""
    return leaf.stacked // layout.stages if leaf.stacked else 1


def gradient_axes(leaf: StateArray, layout: Layout, mesh: AbstractMesh) -> tuple[str, ...]:
    """Axes over which the gradient is summed: those that shard tokens and not the array itself."""
    sharded_over = leaf.axes(mesh, fsdp=False)
    return tuple(
        a for a in AXES if a in TOKEN_AXES and layout.size(a) > 1 and a not in sharded_over
    )


def is_table(leaf: StateArray) -> bool:
    """Whether rows of the array are looked up: an embedding table."""
    return leaf.dims in (("vocab", "embed"), ("position", "embed"))


def is_expert(leaf: StateArray) -> bool:
    """Whether it belongs to a mixture of experts, whose matmuls run on each device's block
    (moe.ExpertMixture)."""
    return bool(leaf.dims and "experts" in leaf.dims)


def is_head(facts: Facts, leaf: StateArray) -> bool:
    """Whether the logits are computed by a matmul with the array."""
    return leaf.dims == head_dims(facts.model is not None and facts.model.tied)


def _leaf_collectives(
    facts: Facts, layout: Layout, mesh: AbstractMesh, leaf: StateArray
) -> Iterator[EstimatedCollective]:
    """Collectives of one array and its gradient."""
    fsdp = layout.size("fsdp")
    sharded = "fsdp" in leaf.axes(mesh, fsdp=True)
    if sharded and layout.zero == 3:
        yield from _gathers(facts, layout, mesh, leaf)
    if leaf.group != GROUPS["params"]:  # frozen
        return
    if sharded and layout.zero == 1:
        size = _layer_bytes(layout, mesh, leaf) * layers_per_device(leaf, layout)
        yield EstimatedCollective("all-gather", ("fsdp",), fsdp, size, 1, "new parameters")
    # Under a pipeline, summed gradients are sharded as under ZeRO-3, whatever the ZeRO level.
    sharded = sharded and (layout.zero == 3 or layout.stages > 1)
    yield from _reductions(facts, layout, mesh, leaf, sharded)


def _layer_bytes(layout: Layout, mesh: AbstractMesh, leaf: StateArray) -> float:
    """Bytes of one layer of the array on a device, gathered over fsdp."""
    return leaf.bytes(mesh, fsdp=False) / layers_per_device(leaf, layout)


def _is_matrix(leaf: StateArray) -> bool:
    return len(leaf.shape) > 1 + bool(leaf.stacked)


def _loss_chunks(facts: Facts, leaf: StateArray) -> int:
    return facts.chunks if facts.model is not None and is_head(facts, leaf) else 1


def _gathers(
    facts: Facts, layout: Layout, mesh: AbstractMesh, leaf: StateArray
) -> Iterator[EstimatedCollective]:
    """All-gathers of an array under ZeRO-3."""
    micro, piped = layout.accumulate, layout.stages > 1
    size = _layer_bytes(layout, mesh, leaf)
    if _is_matrix(leaf):
        size = size * facts.compute / leaf.itemsize
    chunks = _loss_chunks(facts, leaf)
    count = (1 if chunks == 1 else 2 * chunks) * micro if is_head(facts, leaf) else 0
    count += (2 * micro if piped else 1) if is_table(leaf) else 0
    count = count or (3 if piped else 2) * layers_per_device(leaf, layout) * micro
    yield EstimatedCollective(
        "all-gather", ("fsdp",), layout.size("fsdp"), size, count, "parameters"
    )


def _reductions(
    facts: Facts, layout: Layout, mesh: AbstractMesh, leaf: StateArray, sharded: bool
) -> Iterator[EstimatedCollective]:
    """Reductions of an array's gradient. sharded: whether the sum is sharded over fsdp."""
    fsdp, micro, piped = layout.size("fsdp"), layout.accumulate, layout.stages > 1
    layers = layers_per_device(leaf, layout)
    size = _layer_bytes(layout, mesh, leaf) * leaf.widening
    chunks, table = _loss_chunks(facts, leaf), is_table(leaf)
    axes = gradient_axes(leaf, layout, mesh)
    per_microbatch = tuple(axis for axis in axes if not piped or axis not in MANUAL_BATCH)
    # (whether a matmul makes the gradient, count); a tied table has a gradient of either kind.
    parts = [(False, micro)] if table else []
    if not table or is_head(facts, leaf):
        parts.append((_is_matrix(leaf) and not is_expert(leaf), layers * micro * chunks))
    for by_matmul, count in parts:
        if piped and table and not by_matmul:
            yield from _row_gathers(
                facts, layout, per_microbatch, leaf.itemsize * leaf.widening, count
            )
            continue
        bytes, rest = size, per_microbatch
        if sharded and by_matmul:
            yield EstimatedCollective("reduce-scatter", ("fsdp",), fsdp, size, count, "gradients")
            bytes, rest = size / fsdp, _without(per_microbatch, "fsdp")
        if by_matmul and "context" in rest:  # separately, and once for all chunks of the loss
            yield from _all_reduce(layout, ("context",), bytes, count / chunks)
            rest = _without(rest, "context")
        yield from _all_reduce(layout, rest, bytes, count)
    if piped:
        per_step = tuple(axis for axis in axes if axis in MANUAL_BATCH)
        per_step += () if leaf.stacked else (STAGE,)
        yield from _all_reduce(layout, per_step, size * layers / (fsdp if sharded else 1), 1)


def _all_reduce(
    layout: Layout, axes: tuple[str, ...], bytes: float, count: float
) -> Iterator[EstimatedCollective]:
    if axes:
        yield EstimatedCollective("all-reduce", axes, layout.size(*axes), bytes, count, "gradients")


def _row_gathers(
    facts: Facts, layout: Layout, axes: tuple[str, ...], itemsize: int, count: float
) -> Iterator[EstimatedCollective]:
    """All-gathers of the gradients of rows that were looked up in a table; each device then adds those of its
    own shard of the table.
    """
    assert facts.model
    if axes:
        group = layout.size(*axes)
        for length in facts.model.lengths:
            size = tokens(facts, layout, length) * group * facts.model.embed * itemsize
            yield EstimatedCollective("all-gather", axes, group, size, count, "activations")


def _without(axes: tuple[str, ...], axis: str) -> tuple[str, ...]:
    return tuple(each for each in axes if each != axis)
