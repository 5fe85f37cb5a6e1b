"""Bytes on each device, by part, in closed form.

State and batch are exact: the same rules cut them as in a run. The rest is a model of the compiled step:

- gradients have the parameters' own type. ZeRO-3 holds their shards, ZeRO-1 whole ones (see comms). With
  accumulation their sum is held beside those of a microbatch.
- saved activations: what enters each block, and what model.remat keeps of it (`kept`); of another model, what
  jax.vjp keeps, all of it cut by examples.
- temporaries, the larger of two moments. In the loss: the logits of a chunk in float32, a part of their
  gradient (LOGITS), and the gathered head with its gradient. In the backward pass of a block: all that the
  block makes (their gradients take the place of what is no longer needed), and of its gathered weights and
  of the gradients not yet summed the largest two each: one that is used, one on its way.
- with attention=xla, scores [T, T] of each head: float32, and the compute type.
- the update runs in place (the state is donated), array by array.

Not modelled: fragmentation, and what the compiler chooses to keep or to compute anew on its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from spmd.mesh import BATCH_AXES
from spmd.models.transformer import Transformer
from spmd.plan import comms
from spmd.plan.facts import Facts, abstract_mesh, widths
from spmd.plan.layout import Layout, tokens
from spmd.plan.shardings import GROUPS, OTHER

WIDE = 4  # bytes of what stays float32 in bfloat16 models: logits, scores, norms
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

    @property
    def state(self) -> int:
        """What a checkpoint holds."""
        return self.parameters + self.optimizer + self.average + self.model_state

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
    sums = dict.fromkeys((*GROUPS.values(), OTHER), 0)
    weights = (GROUPS["params"], GROUPS["model_state"])
    gradients = 0
    for leaf in facts.leaves:
        cut = layout.zero == 3 if leaf.group in weights else layout.zero > 0
        sums[leaf.group] += leaf.bytes(mesh, fsdp=cut)
        if leaf.group == GROUPS["params"]:
            gradients += leaf.bytes(mesh, fsdp=layout.zero == 3)
    saved, loss, block = _activations(facts, layout)
    held = gradients * (2 if layout.accumulate > 1 else 1)
    before = (
        gradients if layout.accumulate > 1 else 0
    )  # in the loss only the sum of earlier ones is there
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
    saved = here * model.layers * (enters + each)
    logits = here / facts.chunks * model.rows / tensor * (WIDE + LOGITS * facts.compute)
    block = here * kept(model, facts.length, layout._replace(remat="none"), facts.compute)
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
    if (
        layout.remat == "dots"
    ):  # products with weights: all but attention, and the way back to the residual
        return compute * (sum(made.values()) - made["attended"] + residual)
    # What jax.vjp keeps: float32 in both norms (three arrays and two numbers each), what leaves them (never
    # cut along time) in the place of what enters the block, the activation function's steps (of GELU,
    # jax 0.12 keeps one less).
    norms = WIDE * (6 * residual + 4) + compute * (2 * model.embed - residual)
    activation = 6 * made["up"] * compute
    heads = sum(made[name] for name in ("query", "key", "value", "attended")) * compute
    scores = 0.0
    if model.attention == "xla":
        scores = model.heads / tensor * (length * (WIDE + compute) + 2 * WIDE)
    return norms + heads + activation + scores


def _head(facts: Facts, layout: Layout) -> float:
    """The gathered head, and its gradient before the sum."""
    head = next((leaf for leaf in facts.weights if comms.is_head(facts, leaf)), None)
    if head is None or layout.size("fsdp") == 1 or layout.zero != 3:
        return 0.0
    whole = head.bytes(abstract_mesh(layout.mesh), fsdp=False)
    return whole * (1 + facts.compute / head.itemsize)


def _weights(facts: Facts, layout: Layout) -> float:
    """The largest weights of a block, gathered in the compute type, and their gradients before the sum."""
    if layout.zero != 3 or layout.size("fsdp") == 1:
        return 0.0
    mesh = abstract_mesh(layout.mesh)
    sizes = sorted(
        (leaf.bytes(mesh, fsdp=False) / leaf.stacked, facts.compute / leaf.itemsize)
        for leaf in facts.weights
        if leaf.stacked
    )
    return sum(own * (1 + narrow) for own, narrow in sizes[-ON_THE_WAY:])
