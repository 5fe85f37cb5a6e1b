"""The collectives of a step: in closed form, and of a compiled program.

The closed form follows what the TPU compiler emits (read from programs for v5p:2x2x2, checked by
tests/analysis/plan):

- Weights of a block that are sharded over fsdp (ZeRO-3) are all-gathered in the compute dtype twice per
  microbatch, for the forward and the backward pass; norms in their own dtype. The embedding table is gathered
  once per step; the head once per microbatch, or twice per chunk of the loss.
- Gradients are reduced in the dtype of the parameters, at least float32, once per microbatch, those of the
  head once per chunk.
  Matrices under ZeRO-3: a reduce-scatter over fsdp, then an all-reduce of the shard over the other axes that
  shard tokens (HSDP); over context separately, and for the head once for all chunks. Norms, experts (their
  layer is a shard_map, which reduces complete gradients) and the table (its gradient is a scatter): one
  all-reduce over all axes that shard tokens.
  Under ZeRO-1 the compiler emits all-reduces (the scan returns the stacked gradients unsharded) where
  Rajbhandari et al. 2020 have reduce-scatters.
- ZeRO-1 all-gathers the new parameters once per step, in their own dtype.
- tensor: one all-reduce of [tokens, embed] after attention and one after the feed-forward layer, two in the
  backward pass, one more where remat recomputes the attention output; one for the table, one for the head;
  three numbers per token in the loss. Sequence parallelism turns each all-reduce into a reduce-scatter, and
  all-gathers the inputs of attention and feed-forward layer: in the forward pass, again under remat, and the
  gradients of their outputs. A mixture of experts has three sums per block instead of two, in float32.
- context, ring: keys and values are sent n - 1 times in each forward pass and n - 1 times in the backward
  pass, their gradients n times in float32. Queries, keys and values are reordered before each forward pass,
  the result after it, and their gradients likewise. With any remat the backward pass contains a forward pass.
  ulysses: four all-to-alls in each forward pass, and four for the gradients.
- expert: the rows of top_k experts are sent there and back, again where the backward pass recomputes them,
  and their gradients; in ROUNDS rounds, each of complete buffers.
- stage: at each tick of the schedule every stage sends an activation up and a gradient down. Each microbatch
  has one more forward pass, that of its backward pass, which starts from the saved input. What fsdp, expert
  and context share is reduced per microbatch (for the table, rows are gathered instead of the gradient),
  over replica and data once per step, and what belongs to no stage (table, last norm, head) over the stages
  too. Table and head count on every stage, although only one stage computes them. interleaved sends weights
  to their stages once per step, and returns the gradients.

- Sparse tables exchange ids, rows and gradients of rows (see tables).

Not counted: the scalars of loss, metrics and global norm; document ids; routing decisions.
"""

from __future__ import annotations

import dataclasses

from spmd.analysis.plan.activations import (
    ROUNDS,
    context_collectives,
    expert_collectives,
    stage_collectives,
    tensor_collectives,
)
from spmd.analysis.plan.collective import SCALAR, EstimatedCollective, merge_equal
from spmd.analysis.plan.facts import Facts
from spmd.analysis.plan.layout import Layout
from spmd.analysis.plan.tables import PAYLOAD, table_collectives
from spmd.analysis.plan.weights import TOKEN_AXES, weight_collectives
from spmd.hardware import hlo
from spmd.parallel.mesh import BATCH_AXES
from spmd.strategies.grads.pipeline.arrays import STAGE


def step_collectives(
    facts: Facts, layout: Layout, weights: list[EstimatedCollective] | None = None
) -> list[EstimatedCollective]:
    """Every collective of a step, in closed form.

    Args:
        facts: the experiment.
        layout: how it is sharded.
        weights: weight_collectives of the same layout, if they have been computed.

    Raises:
        ValueError: a dim does not divide over its mesh axes.
    """
    collectives = list(weight_collectives(facts, layout) if weights is None else weights)
    if facts.model is not None:
        parts = {
            "tensor": tensor_collectives,
            "context": context_collectives,
            "stage": stage_collectives,
        }
        if facts.model.experts:
            parts["expert"] = expert_collectives
        for axis, part in parts.items():
            if layout.size(axis) > 1:
                collectives += part(facts, layout)
    collectives += table_collectives(facts.tables, facts.batch_size, layout)
    return merge_equal(collectives)


def from_program(
    program: hlo.CompiledProgram, layout: Layout, merges_over: tuple[str, ...] = ()
) -> list[EstimatedCollective]:
    """The collectives of a compiled program with their payload, inferred from kind and axes.

    Gathers over batch axes carry parameters, reductions over axes that share gradients carry gradients,
    everything over axes of `merges_over` only carries merges, all else activations. Groups that are no
    product of mesh axes count for the complete mesh.

    The text of a program does not say how often a branch is taken, nor how many rounds a mixture of experts
    needs: of a pipeline's ticks only those in which a stage works are counted, and ROUNDS rounds.
    """
    all_axes = tuple(axis for axis in layout.mesh if layout.size(axis) > 1)
    collectives = []
    for c in hlo.merge_alike(program.collectives):
        if c.bytes <= SCALAR:
            continue
        axes, count = c.axes or all_axes, c.count
        payload = "merges" if set(axes) <= {*merges_over} else _payload(c.kind, axes, layout)
        if c.source.startswith(_LOOKUPS):
            payload = PAYLOAD
        if payload == "new parameters" and layout.stages > 1 and count % layout.ticks == 0:
            payload = "activations"  # rows of the table, gathered at each tick
        each = EstimatedCollective(c.kind, axes, c.group, c.bytes, count, payload)
        if payload == "rows":
            experts = layout.size("expert")
            count *= ROUNDS if program.endless else min(ROUNDS, experts) / experts
        if layout.stages > 1 and each.ticking:
            count *= layout.accumulate * layout.chunks / layout.ticks
        collectives.append(dataclasses.replace(each, count=count))
    return collectives


# Sources of the collectives of sparse tables.
_LOOKUPS = tuple(f"spmd/parallel/{name}.py" for name in ("sparse", "owners", "routing"))


def _payload(kind: str, axes: tuple[str, ...], layout: Layout) -> str:
    over = set(axes)
    if kind == "collective-permute":
        payloads = {STAGE: "microbatches", "context": "keys and values"}
        # A TPU may gather weights over fsdp, and reduce their gradients, in pieces alongside matmuls.
        payloads |= dict.fromkeys(BATCH_AXES, "parameters")
        return payloads.get(axes[0], "activations") if len(axes) == 1 else "activations"
    if kind == "all-to-all":
        return "rows" if "expert" in over else "activations"
    if kind == "all-gather" and over <= {*BATCH_AXES}:
        return "new parameters" if layout.zero == 1 else "parameters"
    if kind in ("all-reduce", "reduce-scatter") and over <= {*TOKEN_AXES, STAGE}:
        return "gradients"
    return "activations"
