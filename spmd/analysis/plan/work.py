"""Seconds of computation on a device: matmuls, and memory traffic beside them (see cost)."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from spmd.analysis.plan.facts import FLOAT32_BYTES, Facts, abstract_mesh, matmul_flops, widths
from spmd.analysis.plan.layout import Layout, tokens
from spmd.analysis.plan.memory import EstimatedMemory
from spmd.analysis.plan.shardings import GROUPS
from spmd.hardware.chips import Chip
from spmd.models.transformer import Transformer

# Fraction of the peak that large matmuls reach. TPU: MaxText's runs with full remat execute 4 / 3 of their
# model FLOPs, so that 58.9 % MFU (52B, v4) and 66.9 % (32B, v5e) are 79 % and 89 %; this is between them.
# GPU: 790 of 989 TFLOP/s, measured on an H200.
MATMUL_SHARE = {"TPU": 0.85, "GPU": 0.8}
BANDWIDTH_SHARE = 0.9  # of the memory's, for large arrays: STREAM-like kernels reach 85 to 95 %
# Passes over float32 logits: write, maximum, sum, target; their gradient: read, write, read twice.
LOGITS_PASSES = 8
# Passes over the scores of XLA's attention, forward: write, maximum, sum and quotient, read by the second
# matmul.
SCORES_PASSES = 4
FUSED = ("splash", "cudnn")


class Work(NamedTuple):
    """Computation of one device in one step: seconds, and executed FLOPs. ring: seconds of attention during
    which the keys and values of a ring can travel.
    """

    matmuls: float
    backward: float
    elementwise: float
    flops: float
    ring: float = 0.0


def matmul_share(chip: Chip) -> float:
    """Fraction of the chip's peak that large matmuls reach."""
    return MATMUL_SHARE["TPU" if chip.links and chip.links.axes else "GPU"]


def backward_share(gradients: int = 1) -> float:
    """Fraction of a step's matmuls in its backward passes, one for each gradient, without remat."""
    return 2 * gradients / (1 + 2 * gradients)


def step_work(facts: Facts, layout: Layout, chip: Chip) -> Work:
    """Computation of a device in a step."""
    if facts.model is not None:
        return _transformer(facts, layout, chip)
    num, bandwidth = layout.num_devices, chip.bandwidth * BANDWIDTH_SHARE
    busy = sum(count / chip.flops[dtype] for dtype, count in facts.flops.items()) / num
    busy /= matmul_share(chip)
    # What the backward pass saves is written and read twice, and so are its gradients.
    traffic = 6 * facts.saved / num / bandwidth
    backward = busy * backward_share(facts.gradients)
    return Work(busy, backward, traffic, sum(facts.flops.values()) / num)


def update_seconds(facts: Facts, layout: Layout, memory: EstimatedMemory, chip: Chip) -> float:
    """Seconds of the update: each device updates the parameters whose optimizer state it holds."""
    mesh = abstract_mesh(layout.mesh)
    updated = sum(
        leaf.bytes(mesh, fsdp=layout.zero > 0)
        for leaf in facts.leaves
        if leaf.group == GROUPS["params"]
    )
    updated = min(updated, memory.parameters)  # under strategy server a device holds no more
    moved = 2 * (updated + memory.optimizer + memory.average) + 2 * updated
    return moved / (chip.bandwidth * BANDWIDTH_SHARE)


def recomputed_matmuls(facts: Facts, layout: Layout) -> set[str]:
    """Matmuls of a block that the backward pass recomputes, by the names of facts.matmul_flops. The backward
    pass does not need the last one, `down`; but with expert parallelism each round is recomputed completely.
    """
    block = {"query", "key", "value", "attended", "out", "up", "gate"}
    experts = {"up", "gate"} if facts.model and facts.model.experts.num else set[str]()
    saved = {
        "none": block,
        "dots": block - {"attended"} - experts,
        "named": set(layout.saved) - experts,
        "full": set[str](),
    }
    rounds = experts | {"down"} if experts and layout.size("expert") > 1 else set[str]()
    return (block - saved[layout.remat]) | rounds


def pipeline_seconds(layout: Layout, forward: float, rest: float, head: float) -> float:
    """Seconds of a step in which all stages wait for the busiest one at each tick.

    Args:
        layout: the layout, with its pipeline schedule.
        forward: seconds of the forward pass of a stage's layers.
        rest: seconds of their backward pass, with the forward pass that it contains.
        head: seconds of the head.

    Without stages there is no forward pass beside that of the backward pass.
    """
    if layout.stages == 1:
        return rest + head
    if layout.pipeline == "gpipe":  # a tick is either forward or backward
        return forward + rest + head
    return forward + rest + max(head - forward / layout.virtual, 0.0)


# ---- the transformer


def _transformer(facts: Facts, layout: Layout, chip: Chip) -> Work:
    model = facts.model
    assert model
    tensor, piped = layout.size("tensor"), layout.stages > 1
    local_tokens = tokens(facts, layout) * layout.accumulate / tensor
    layers = model.layers / layout.stages
    flops = _flops(facts, layout)
    idle = max(chip.tile / model.width, 1.0)  # a short head leaves part of the matrix unit idle
    rate = chip.flops[model.dtype or "float32"] * matmul_share(chip)
    forward = local_tokens * layers * (flops.dense + flops.attention * idle) / rate
    rest = local_tokens * layers * (flops.weights + flops.kernel * idle) / rate
    head = local_tokens * flops.logits / rate
    busy = pipeline_seconds(layout, forward, rest, flops.logits_passes * head)
    bandwidth = chip.bandwidth * BANDWIDTH_SHARE
    busy = max(busy, _operand_bytes(facts, layout) / bandwidth)
    backward = busy - (forward if piped else min(forward + head, busy / 3))
    block, loss = (local_tokens * tensor * n / bandwidth for n in _traffic(facts, layout))
    passes = 3 if layout.remat == "none" else 4
    elementwise = pipeline_seconds(layout, layers * block, passes * layers * block, loss)
    # Forward passes beside that of the backward pass; the last stage of a pipeline has none.
    forwards = 1 - 1 / (layout.stages * layout.virtual) if piped else 0.0
    executed = (
        layers * (flops.weights + flops.kernel + forwards * (flops.dense + flops.attention))
        + flops.logits_passes * flops.logits / layout.stages
    )
    context = layout.size("context")
    ring = local_tokens * layers * idle * (flops.kernel + flops.attention * piped) / rate
    return Work(
        busy, backward, elementwise, local_tokens * executed, ring * (context - 1) / context
    )


class _Flops(NamedTuple):
    """FLOPs per token of a block. dense, attention: of a forward pass. weights, kernel: the same of the
    backward pass with all that it recomputes, and of the forward pass. logits: of one of `logits_passes`.
    """

    dense: float
    attention: float
    weights: float
    kernel: float
    logits: float
    logits_passes: int


def _flops(facts: Facts, layout: Layout) -> _Flops:
    model = facts.model
    assert model
    matmuls = matmul_flops(model, facts.length)
    logits = matmuls.pop("logits")
    matmuls.pop("attended")
    attention, fused = attention_flops(facts, layout)
    rematerialised = recomputed_matmuls(facts, layout)
    dense = sum(matmuls.values())
    weights = dense * 3 + sum(matmuls[name] for name in matmuls if name in rematerialised)
    kernel = attention * (
        (3.5 if fused else 3) + ("attended" in rematerialised or (fused and layout.remat != "none"))
    )
    # With several chunks, the backward pass recomputes the logits of each.
    return _Flops(dense, attention, weights, kernel, logits, 3 if facts.chunks == 1 else 4)


def attention_flops(facts: Facts, layout: Layout) -> tuple[float, bool]:
    """(forward FLOPs per token that attention executes, whether a kernel recomputes the scores in the
    backward pass instead of saving them).
    """
    model = facts.model
    assert model
    per_key, length = 4.0 * model.heads * model.width, facts.length
    if layout.size("context") > 1 and layout.context == "ring":
        return per_key * length * ring_share(model, layout), True
    if model.attention not in FUSED:
        return per_key * length, False
    return per_key * _computed_keys(model, length), True


def ring_share(model: Transformer, layout: Layout) -> float:
    """Fraction of the pairs of queries and keys that a ring computes: all, or 2 n + 1 of 4 n pairs of chunks
    under a causal mask.
    """
    context = layout.size("context")
    return (2 * context + 1) / (4 * context) if model.mask == "causal" else 1.0


def _computed_keys(model: Transformer, length: int) -> float:
    """Mean number of keys per query that a fused kernel computes, over all blocks."""
    seen = [model.keys_seen(block, length) for block in range(model.layers)]
    if model.mask == "full":
        skips = model.attention == "splash"  # cuDNN skips beyond windows to the left only
        computed = seen if skips else [length] * len(seen)
    else:  # the first queries of a row have fewer
        computed = [keys * (1 - keys / (2 * length)) for keys in seen]
    return statistics.fmean(computed)


def _operand_bytes(facts: Facts, layout: Layout) -> float:
    """Bytes that the matmuls of a step read and write: weights per microbatch, and activations."""
    model, mesh = facts.model, abstract_mesh(layout.mesh)
    assert model
    passes = 3 + (len(recomputed_matmuls(facts, layout)) > 0) + (layout.stages > 1)
    weights = sum(
        leaf.bytes(mesh, fsdp=False) * facts.compute / leaf.itemsize for leaf in facts.weights
    )
    per_token = 2 * sum(widths(model).values()) * facts.compute / layout.size("tensor")
    layers = model.layers / layout.stages
    return layout.accumulate * passes * (weights + tokens(facts, layout) * layers * per_token)


def _traffic(facts: Facts, layout: Layout) -> tuple[float, float]:
    """Bytes per token of memory traffic beside the matmuls: of a block forward, and of the loss."""
    model, tensor = facts.model, layout.size("tensor")
    assert model
    width = widths(model)
    residual = width["residual"] / (tensor if layout.sequence_parallel else 1)
    moved = 10 * residual  # two norms (read, write) and two additions (two reads, a write)
    heads = width["query"] + width["key"]
    moved += 2 * heads / tensor * (1 if model.position == "rope" else 0)
    moved += (3 if "gate" in width else 2) * width["up"] / tensor
    if model.experts.num:  # rows and their results: taken, sorted, sorted back, added
        moved += 6 * model.experts.top_k * model.embed
    block = moved * facts.compute
    if model.attention == "xla":
        context = layout.size("context")
        ring = ring_share(model, layout) if context > 1 and layout.context == "ring" else 1
        scores = model.heads / tensor * facts.length * ring
        block += scores * (SCORES_PASSES * FLOAT32_BYTES + 2 * facts.compute)
    return block, LOGITS_PASSES * FLOAT32_BYTES * model.rows / tensor
