"""Bytes on each device, by part, in closed form.

State and batch are exact: they are sharded by the same rules as in a run. The rest is a model of the compiled
step:

- Gradients have the dtype of the parameters, at least float32. ZeRO-3 holds them sharded, ZeRO-1 complete
  (see comms). With accumulation their sum is held beside those of a microbatch.
  Where a task combines the gradients of its loss terms, there are as many as terms.
- Saved activations: the input of each block, and what model.remat saves of it (`saved_per_token`); for a
  model without closed forms the residuals of jax.vjp, all sharded by examples.
- Temporaries: the larger of two moments. In the loss: the logits of a chunk in float32, a fraction of their
  gradient (LOGITS), and the gathered head with its gradient. In the backward pass of a block: all activations
  of the block (their gradients reuse the memory of those no longer needed), and the largest two of its
  gathered weights and of its gradients before the reduction: the one in use and the next.
- With attention=xla, scores [T, T] of each head: in float32, and in the compute dtype. A ring has those of
  one pair of chunks at a time, and saves a copy of its inputs and outputs in zigzag order.
- In a pipeline: the inputs and gradients that its schedule keeps, two being sent and two being received; what
  the blocks of a chunk save of a microbatch; beside the sum of the gradients (sharded as under ZeRO-3) those
  of a chunk (sharded as its parameters), of table and head, which are added to the sum. interleaved has a
  second copy of its weights, in the order of its chunks.
- With expert parallelism, the buffers of a round instead of what the layer would save.
- The update runs in place (the state is donated), array by array; its float32 values of narrow parameters are
  fused away.

Not modelled: fragmentation, and what the compiler decides to keep or to rematerialise itself.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh

from spmd.analysis.plan import tables
from spmd.analysis.plan.activations import stream_bytes
from spmd.analysis.plan.blocks import Blocks
from spmd.analysis.plan.facts import FLOAT32_BYTES, Facts, StateArray, abstract_mesh
from spmd.analysis.plan.layout import Layout, tokens
from spmd.analysis.plan.shardings import GROUPS, OTHER
from spmd.analysis.plan.weights import is_head, layers_per_device
from spmd.hardware.chips import Chip
from spmd.parallel.mesh import BATCH_AXES
from spmd.strategies.grads.pipeline import schedules

# Fraction of the gradient of the logits, in the compute dtype, that is stored: the compiler stores from none
# to all of it, since the matmuls that consume it may recompute it. Between what GPT-2 on TPUs shows
# (docs/plan.md).
LOGITS = 0.75
IN_FLIGHT = 2  # weights that are held gathered: the one in use, and the next
# Memory that the runtime keeps for itself. A CUDA context with the buffers of its collectives is of this
# order.
RESERVED = 0.5 * 2**30


class EstimatedMemory(NamedTuple):
    """Bytes on a device, by part."""

    parameters: int
    optimizer: int
    average: int
    model_state: int
    batch: int
    gradients: float
    activations: float
    temporaries: float
    strategy: int = 0
    tables: int = 0

    @property
    def state(self) -> int:
        """Bytes of what a checkpoint stores."""
        arrays = self.parameters + self.optimizer + self.average + self.model_state
        return arrays + self.strategy + self.tables

    @property
    def peak(self) -> float:
        """Bytes needed at once, at most."""
        return float(sum(self))

    def json(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {**self._asdict(), "peak": self.peak}


def step_memory(facts: Facts, layout: Layout) -> EstimatedMemory:
    """Memory of a step; ValueError if a dim does not divide over its mesh axes."""
    mesh = abstract_mesh(layout.mesh)
    sums = _groups(facts.leaves, mesh, layout.zero)
    gradients, stacked = _gradients(facts.leaves, mesh, layout.zero == 3 or layout.stages > 1)
    gradients *= facts.gradients
    saved, loss, block = _activations(facts, layout)
    peak_gradients, in_loss = gradients, 0.0  # bytes of gradients, at most and during the loss
    if layout.stages > 1:
        # Those of a chunk are sharded as its parameters.
        chunks = _gradients(facts.leaves, mesh, layout.zero == 3)[1]
        peak_gradients, in_loss = 2 * gradients - stacked + chunks / layout.virtual, gradients
        saved += chunks if layout.virtual > 1 else 0
    elif layout.accumulate > 1:  # during the loss only the sum of earlier microbatches exists
        peak_gradients, in_loss = 2 * gradients, gradients
    return EstimatedMemory(
        parameters=sums[GROUPS["params"]],
        optimizer=sums[GROUPS["opt_state"]],
        average=sums[GROUPS["ema"]],
        model_state=sums[GROUPS["model_state"]] + sums[OTHER],
        batch=facts.batch_bytes // layout.size(*BATCH_AXES),
        gradients=peak_gradients,
        activations=saved,
        temporaries=max(in_loss + loss, peak_gradients + block) - peak_gradients,
        tables=sums[GROUPS["tables"]],
    )


def on_chip(
    memory: EstimatedMemory, facts: Facts, layout: Layout, chip: Chip | None
) -> EstimatedMemory:
    """`memory` with what the chip adds: TPUs pad the lines of tables."""
    if not tables.is_tpu(chip):
        return memory
    padding = sum(each.padding(layout.num_devices) for each in facts.tables)
    return memory._replace(tables=memory.tables + padding)


def with_state(
    facts: Facts, layout: Layout, state: Mapping[str, int], replicas: int
) -> EstimatedMemory:
    """Memory of a step under a strategy that lays out its state itself.

    state: bytes on a device by field of TrainState. replicas: of strategy `local` on a device; each has
    gradients. Parameters that strategy `server` shards are gathered for a step. The temporaries of
    compression are not counted.
    """
    auto = step_memory(facts, layout)
    gathered = max(auto.parameters - state["params"], 0)
    rest = ("step", "key", "strategy_state")
    return auto._replace(
        parameters=state["params"],
        optimizer=state["opt_state"],
        average=state["ema"],
        model_state=state["model_state"],
        gradients=auto.gradients * replicas,
        temporaries=auto.temporaries + gathered,
        strategy=sum(state[name] for name in rest),
        tables=state["tables"],
    )


def state_bytes(facts: Facts, layout: Layout) -> int:
    """EstimatedMemory.state, which depends on the mesh and the ZeRO level only."""
    return sum(_groups(facts.leaves, abstract_mesh(layout.mesh), layout.zero).values())


@functools.lru_cache(maxsize=64)  # a search visits one mesh after the other
def _groups(leaves: tuple[StateArray, ...], mesh: AbstractMesh, zero: int) -> dict[str, int]:
    """Bytes of the state by group."""
    sums = dict.fromkeys((*GROUPS.values(), OTHER), 0)
    weights = (GROUPS["params"], GROUPS["model_state"])
    for leaf in leaves:
        sums[leaf.group] += leaf.bytes(mesh, fsdp=zero == 3 if leaf.group in weights else zero > 0)
    return sums


@functools.lru_cache(maxsize=64)
def _gradients(leaves: tuple[StateArray, ...], mesh: AbstractMesh, fsdp: bool) -> tuple[int, int]:
    """Bytes of the gradients, and of those that are stacked by layers."""
    params = [leaf for leaf in leaves if leaf.group == GROUPS["params"]]
    sizes = {leaf: leaf.bytes(mesh, fsdp=fsdp) * leaf.widening for leaf in params}
    return sum(sizes.values()), sum(size for leaf, size in sizes.items() if leaf.stacked)


@functools.lru_cache(maxsize=2**10)
def slots(
    kind: schedules.Kind, stages: int, microbatches: int, virtual: int, stacks: int = 1
) -> int:
    """Inputs and gradients that a stage keeps at once."""
    # Except under gpipe, the number stops growing at 2 x stages microbatches.
    num = microbatches if kind == "gpipe" else min(microbatches, 2 * stages)
    table = schedules.make(kind, stages, num, virtual, stacks=stacks)
    _, inputs, gradients = schedules.program(table)
    return inputs + gradients


def usable(chip_memory: float) -> float:
    """Bytes of a device's memory that a program can use."""
    return chip_memory - RESERVED


def _activations(facts: Facts, layout: Layout) -> tuple[float, float, float]:
    """(bytes saved for the backward pass, further bytes in the loss, further bytes in the backward pass of a
    block).
    """
    model, local_tokens = facts.model, tokens(facts, layout)
    if model is None:
        saved = facts.saved / layout.size(*BATCH_AXES) / layout.accumulate
        return saved, 0.0, saved / 2  # their gradients, which replace them one by one
    tensor = layout.size("tensor")
    inputs = model.embed * facts.compute / (tensor if layout.sequence_parallel else 1)
    saved, in_block = {stack.name: 0.0 for stack in model.stacks}, 0.0
    without_remat = layout._replace(remat="none")
    for blocks in model.blocks:
        num = tokens(facts, layout, blocks.length)
        per_token = inputs + saved_per_token(blocks, layout, facts.compute)
        saved[blocks.stack] += num * blocks.num_blocks * per_token
        block = num * saved_per_token(blocks, without_remat, facts.compute)
        in_block = max(in_block, block + _transient(facts, layout, blocks))
    if layout.stages == 1:
        total = sum(saved.values())
    else:  # of a chunk, and the microbatches that the schedule keeps or sends
        total = max(saved.values()) / (layout.stages * layout.virtual)
        sizes = layout.stages, layout.accumulate, layout.virtual, layout.stacks
        num_slots = slots(layout.pipeline, *sizes) + IN_FLIGHT + IN_FLIGHT
        total += stream_bytes(facts, layout) * num_slots
    logits = local_tokens / facts.chunks * model.rows / tensor
    logits *= FLOAT32_BYTES + LOGITS * facts.compute
    return total, logits + _head(facts, layout), in_block + _weights(facts, layout)


def saved_per_token(blocks: Blocks, layout: Layout, compute: int) -> float:
    """Bytes per token and block that `layout.remat` saves on a device, beside the input of the block."""
    config, tensor = blocks.config, layout.size("tensor")
    all_widths = blocks.widths()
    residual = all_widths.pop("residual") / (tensor if layout.sequence_parallel else 1)
    width = {name: size / tensor for name, size in all_widths.items()}
    if layout.remat == "full":
        return 0.0
    if layout.remat == "named":
        return compute * sum(width[name] for name in layout.saved if name in width)
    mixture, sharded = blocks.mixture, layout.size("expert") > 1
    up, gate = width["up"], width.get("gate", 0)
    if (
        layout.remat == "dots"
    ):  # matmuls with weights: not attention, but the projections to the residual
        experts = up + gate if mixture else 0
        outputs = blocks.attentions * residual
        if config.norm_at != "input":  # the norm after the last layer reads what that returns
            outputs += residual
        return compute * (sum(width.values()) - width["attended"] - experts + outputs)
    # The residuals of jax.vjp: float32 in the norms (three arrays and two numbers each); their outputs
    # (never sharded along time) instead of the input of the block; the intermediate values of the activation
    # function (of GELU, jax 0.12 saves one less).
    norms = FLOAT32_BYTES * blocks.norms * (3 * residual + 2)
    norms += compute * (blocks.layers * config.embed - residual)
    if config.qk_norm:
        num = (config.heads + config.num_kv_heads) / tensor
        num = 2 if config.qk_norm_over == "all" else num
        norms += FLOAT32_BYTES * (3 * (width["query"] + width["key"]) + 2 * num)
    activation = (8 if config.activation == "geglu" else 6) * up * compute
    if mixture:  # and the rows routed to the experts
        rows = 2 * config.experts.top_k * config.embed * compute
        activation = 0 if sharded else activation + rows
    heads = sum(width[name] for name in ("query", "key", "value", "attended")) * compute
    scores = 0.0
    if layout.size("context") > 1 and layout.context == "ring":
        scores = (2 * width["query"] + 2 * width["key"]) * compute
        scores += blocks.attentions * config.heads / tensor * FLOAT32_BYTES
    elif config.attention == "xla":
        keys = blocks.length + blocks.memory
        capped = (
            2 * FLOAT32_BYTES if config.score_cap else 0
        )  # the hyperbolic tangent, and its square
        per_head = keys * (FLOAT32_BYTES + compute + capped)
        per_head += blocks.attentions * 2 * FLOAT32_BYTES
        scores = config.heads / tensor * per_head
    return norms + heads + activation + scores


def _transient(facts: Facts, layout: Layout, blocks: Blocks) -> float:
    """Bytes that a block needs beside what its backward pass would save: a ring's scores of two chunks with
    their gradients, a round of an exchange between experts.
    """
    config, local_tokens = blocks.config, tokens(facts, layout, blocks.length)
    tensor, context, size = layout.size("tensor"), layout.size("context"), 0.0
    if context > 1 and layout.context == "ring":
        per_key = local_tokens * config.heads / tensor / context
        # two chunks of 2 n, or of n
        keys = blocks.length / (4 if config.mask == "causal" else 1)
        size += per_key * max(keys, blocks.memory) * 2 * (FLOAT32_BYTES + facts.compute)
    if blocks.mixture and layout.size("expert") > 1:
        rows = local_tokens * config.experts.top_k
        per_row = 4 * config.embed + 6 * config.mlp_width / tensor
        size += rows * per_row * facts.compute + 2 * local_tokens * config.embed * FLOAT32_BYTES
    return size


def _head(facts: Facts, layout: Layout) -> float:
    """Bytes of the gathered head, and of its gradient before the reduction."""
    head = next((leaf for leaf in facts.weights if is_head(facts, leaf)), None)
    if head is None or layout.size("fsdp") == 1 or layout.zero != 3:
        return 0.0
    gathered = head.bytes(abstract_mesh(layout.mesh), fsdp=False)
    return gathered * (head.widening + facts.compute / head.itemsize)


def _weights(facts: Facts, layout: Layout) -> float:
    """Bytes of the largest weights of a block, gathered, and of their gradients before the reduction."""
    if layout.zero != 3 or layout.size("fsdp") == 1:
        return 0.0
    mesh = abstract_mesh(layout.mesh)
    sizes = sorted(
        (
            leaf.bytes(mesh, fsdp=False) / layers_per_device(leaf, layout),
            leaf.widening + facts.compute / leaf.itemsize,
        )
        for leaf in facts.weights
        if leaf.stacked
    )
    return sum(size * ratio for size, ratio in sizes[-IN_FLIGHT:])
