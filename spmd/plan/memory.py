"""Bytes on each device, by part, in closed form.

State and batch are exact: the same rules cut them as in a run. The rest is a model of the compiled step:

- gradients have the parameters' own type, float32 at least. ZeRO-3 holds their shards, ZeRO-1 whole ones (see
  comms). With accumulation their sum is held beside those of a microbatch.
- saved activations: what enters each block, and what model.remat keeps of it (`kept`); of another model, what
  jax.vjp keeps, all of it cut by examples.
- temporaries, the larger of two moments. In the loss: the logits of a chunk in float32, a part of their
  gradient (LOGITS), and the gathered head with its gradient. In the backward pass of a block: all that the
  block makes (their gradients take the place of what is no longer needed), and of its gathered weights and
  of the gradients not yet summed the largest two each: one that is used, one on its way.
- with attention=xla, scores [T, T] of each head: float32, and the compute type. A ring has those of one pair
  of chunks at a time, and keeps a copy of what enters and leaves it, in its own order.
- of a pipeline: the inputs and gradients that its schedule keeps, two that are sent and two that arrive; what
  the blocks of one chunk save of one microbatch; beside the sum of the gradients, which lie as ZeRO-3's,
  those of a chunk (which lie as its parameters), of table and head, which are added to it. interleaved has
  its weights a second time, in the order of its chunks.
- of a mixture whose experts are elsewhere, a round's buffers instead of what the layer would keep.
- the update runs in place (the state is donated), array by array; what it holds in float32 of narrow
  parameters is fused away.

Not modelled: fragmentation, and what the compiler chooses to keep or to compute anew on its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh

from spmd.mesh import BATCH_AXES
from spmd.models.transformer import Transformer
from spmd.pipeline import schedules
from spmd.plan import comms
from spmd.plan.comms import WIDE
from spmd.plan.facts import Facts, Leaf, abstract_mesh, widths
from spmd.plan.layout import Layout, tokens
from spmd.plan.shardings import GROUPS, OTHER

# Of the gradient of the logits, in the compute type: the compiler stores from none to all of it, since the
# products that it goes into may make it anew. Between what GPT-2 on TPUs shows (docs/plan.md).
LOGITS = 0.75
ON_THE_WAY = 2  # weights that are held gathered: the one that is used, and the next
# Beside a program: what the runtime keeps. A CUDA context with its collectives' buffers is of this order.
RESERVED = 0.5 * 2**30


class Memory(NamedTuple):
    """Bytes on one device. peak: all together."""

    parameters: int
    optimizer: int
    average: int
    model_state: int
    batch: int
    gradients: float
    activations: float
    temporaries: float
    strategy: int = 0

    @property
    def state(self) -> int:
        """What a checkpoint holds."""
        held = self.parameters + self.optimizer + self.average + self.model_state
        return held + self.strategy

    @property
    def peak(self) -> float:
        """The most that is needed at once."""
        return float(sum(self))

    def json(self) -> dict[str, Any]:
        """As JSON types."""
        return {**self._asdict(), "peak": self.peak}


def of(facts: Facts, layout: Layout) -> Memory:
    """Memory of a step; ValueError where a dim does not divide."""
    mesh = abstract_mesh(layout.mesh)
    sums = _groups(facts.leaves, mesh, layout.zero)
    gradients, stacked = _gradients(facts.leaves, mesh, layout.zero == 3 or layout.stages > 1)
    saved, loss, block = _activations(facts, layout)
    held, before = gradients, 0.0
    if layout.stages > 1:
        lies = _gradients(facts.leaves, mesh, layout.zero == 3)[1]  # as the parameters do
        held, before = 2 * gradients - stacked + lies / layout.virtual, gradients
        saved += lies if layout.virtual > 1 else 0
    elif layout.accumulate > 1:  # in the loss only the sum of earlier ones is there
        held, before = 2 * gradients, gradients
    over = max(before + loss, held + block) - held
    return Memory(
        parameters=sums[GROUPS["params"]],
        optimizer=sums[GROUPS["opt_state"]],
        average=sums[GROUPS["ema"]],
        model_state=sums[GROUPS["model_state"]] + sums[OTHER],
        batch=facts.batch_bytes // layout.size(*BATCH_AXES),
        gradients=held,
        activations=saved,
        temporaries=over,
    )


def of_program(facts: Facts, layout: Layout, state: Mapping[str, int], replicas: int) -> Memory:
    """With the state of a strategy that has its own way to hold it. state: bytes by field of TrainState.
    replicas: of `local`, that one device has; each has gradients. A server's parameters are gathered for a
    step. What compression computes is not counted.
    """
    whole = of(facts, layout)
    gathered = max(whole.parameters - state["params"], 0)
    rest = ("step", "key", "strategy_state")
    return whole._replace(
        parameters=state["params"],
        optimizer=state["opt_state"],
        average=state["ema"],
        model_state=state["model_state"],
        gradients=whole.gradients * replicas,
        temporaries=whole.temporaries + gathered,
        strategy=sum(state[name] for name in rest),
    )


def state(facts: Facts, layout: Layout) -> int:
    """Memory.state alone: of the mesh and the ZeRO level."""
    return sum(_groups(facts.leaves, abstract_mesh(layout.mesh), layout.zero).values())


@functools.lru_cache(maxsize=64)  # a search asks for one mesh after the other
def _groups(leaves: tuple[Leaf, ...], mesh: AbstractMesh, zero: int) -> dict[str, int]:
    """Bytes of the state by group."""
    sums = dict.fromkeys((*GROUPS.values(), OTHER), 0)
    weights = (GROUPS["params"], GROUPS["model_state"])
    for leaf in leaves:
        sums[leaf.group] += leaf.bytes(mesh, fsdp=zero == 3 if leaf.group in weights else zero > 0)
    return sums


@functools.lru_cache(maxsize=64)
def _gradients(leaves: tuple[Leaf, ...], mesh: AbstractMesh, cut: bool) -> tuple[int, int]:
    """Bytes of the gradients, and of those that are stacked by layers."""
    params = [leaf for leaf in leaves if leaf.group == GROUPS["params"]]
    held = {leaf: leaf.bytes(mesh, fsdp=cut) * leaf.widening for leaf in params}
    return sum(held.values()), sum(size for leaf, size in held.items() if leaf.stacked)


@functools.lru_cache(maxsize=2**10)
def slots(kind: schedules.Kind, stages: int, microbatches: int, virtual: int) -> int:
    """Inputs and gradients that a stage keeps at once; but for gpipe, more microbatches need no more."""
    num = microbatches if kind == "gpipe" else min(microbatches, 2 * stages)
    _, inputs, gradients = schedules.program(schedules.make(kind, stages, num, virtual))
    return inputs + gradients


def usable(chip_memory: float) -> float:
    """Of a device's memory, what a program can have."""
    return chip_memory - RESERVED


def _activations(facts: Facts, layout: Layout) -> tuple[float, float, float]:
    """Bytes saved for the backward pass, and beside them in the loss and in the backward pass of a block."""
    model, here = facts.model, tokens(facts, layout)
    if model is None:
        saved = facts.saved / layout.size(*BATCH_AXES) / layout.accumulate
        return saved, 0.0, saved / 2  # their gradients, which replace them as it goes on
    tensor = layout.size("tensor")
    enters = model.embed * facts.compute / (tensor if layout.sequence_parallel else 1)
    each = kept(model, facts.length, layout, facts.compute)
    saved = here * model.layers / (layout.stages * layout.virtual) * (enters + each)
    if layout.stages > 1:
        num = slots(layout.pipeline, layout.stages, layout.accumulate, layout.virtual)
        saved += here * enters * (num + ON_THE_WAY + ON_THE_WAY)
    logits = here / facts.chunks * model.rows / tensor * (WIDE + LOGITS * facts.compute)
    block = here * kept(model, facts.length, layout._replace(remat="none"), facts.compute)
    block += _passing(facts, layout)
    return saved, logits + _head(facts, layout), block + _weights(facts, layout)


def kept(model: Transformer, length: int, layout: Layout, compute: int) -> float:
    """Bytes for each token and block that `layout.remat` keeps beside what enters it, on one device."""
    tensor = layout.size("tensor")
    wide = widths(model)
    residual = wide.pop("residual") / (tensor if layout.sequence_parallel else 1)
    made = {name: width / tensor for name, width in wide.items()}
    if layout.remat == "full":
        return 0.0
    if layout.remat == "named":
        return compute * sum(made[name] for name in layout.saved if name in made)
    mixture, away = model.experts.num > 0, layout.size("expert") > 1
    up, gate = made["up"], made.get("gate", 0)
    if (
        layout.remat == "dots"
    ):  # products with one matrix: not attention, but the way back to the residual
        experts = up + gate if mixture else 0
        return compute * (sum(made.values()) - made["attended"] - experts + residual)
    # What jax.vjp keeps: float32 in both norms (three arrays and two numbers each), what leaves them (never
    # cut along time) in the place of what enters the block, the activation function's steps (of GELU,
    # jax 0.12 keeps one less).
    norms = WIDE * (6 * residual + 4) + compute * (2 * model.embed - residual)
    activation = 6 * up * compute
    if mixture:  # and the rows that enter
        activation = 0 if away else activation + 2 * model.experts.top_k * model.embed * compute
    heads = sum(made[name] for name in ("query", "key", "value", "attended")) * compute
    scores = 0.0
    if layout.size("context") > 1 and layout.context == "ring":
        scores = (2 * made["query"] + 2 * made["key"]) * compute + model.heads / tensor * WIDE
    elif model.attention == "xla":
        scores = model.heads / tensor * (length * (WIDE + compute) + 2 * WIDE)
    return norms + heads + activation + scores


def _passing(facts: Facts, layout: Layout) -> float:
    """What is made and used up within a block, beside what its backward pass would keep: a ring's scores of
    two chunks with their gradients, a round of a mixture whose experts are elsewhere.
    """
    model, here = facts.model, tokens(facts, layout)
    assert model
    tensor, context, size = layout.size("tensor"), layout.size("context"), 0.0
    if context > 1 and layout.context == "ring":
        size += (
            here * model.heads / tensor * facts.length / (4 * context) * 2 * (WIDE + facts.compute)
        )
    if model.experts.num and layout.size("expert") > 1:
        rows = here * model.experts.top_k
        wide = 4 * model.embed + 6 * (model.mlp or 4 * model.embed) / tensor
        size += rows * wide * facts.compute + 2 * here * model.embed * WIDE
    return size


def _head(facts: Facts, layout: Layout) -> float:
    """The gathered head, and its gradient before the sum."""
    head = next((leaf for leaf in facts.weights if comms.is_head(facts, leaf)), None)
    if head is None or layout.size("fsdp") == 1 or layout.zero != 3:
        return 0.0
    whole = head.bytes(abstract_mesh(layout.mesh), fsdp=False)
    return whole * (head.widening + facts.compute / head.itemsize)


def _weights(facts: Facts, layout: Layout) -> float:
    """The largest weights of a block, gathered in the compute type, and their gradients before the sum."""
    if layout.zero != 3 or layout.size("fsdp") == 1:
        return 0.0
    mesh = abstract_mesh(layout.mesh)
    sizes = sorted(
        (
            leaf.bytes(mesh, fsdp=False) / comms.layers_here(leaf, layout),
            leaf.widening + facts.compute / leaf.itemsize,
        )
        for leaf in facts.weights
        if leaf.stacked
    )
    return sum(own * held for own, held in sizes[-ON_THE_WAY:])
