"""Seconds of computation on a device: matmuls, and memory traffic beside them (see cost)."""

from __future__ import annotations

from typing import NamedTuple

from spmd.analysis.plan.blocks import Blocks
from spmd.analysis.plan.facts import FLOAT32_BYTES, Facts, abstract_mesh
from spmd.analysis.plan.layout import Layout, tokens
from spmd.analysis.plan.memory import EstimatedMemory
from spmd.analysis.plan.shardings import GROUPS
from spmd.hardware.chips import Chip
from spmd.models.blocks import BlockConfig

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
    which the keys and values of a ring can travel. kernels: seconds of the matmuls inside Pallas kernels
    (splash attention, grouped matmuls of experts), of which a compiler counts nothing.
    """

    matmuls: float
    backward: float
    elementwise: float
    flops: float
    ring: float = 0.0
    kernels: float = 0.0


def matmul_share(chip: Chip) -> float:
    """Fraction of the chip's peak that large matmuls reach."""
    return MATMUL_SHARE["TPU" if chip.links and chip.links.axes else "GPU"]


def backward_share(gradients: int = 1) -> float:
    """Fraction of a step's matmuls in its backward passes, one for each gradient, without remat."""
    return 2 * gradients / (1 + 2 * gradients)


def step_work(facts: Facts, layout: Layout, chip: Chip) -> Work:
    """Computation of a device in a step."""
    if facts.model is not None:
        return _block_work(facts, layout, chip)
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


def recomputed_matmuls(blocks: Blocks, layout: Layout) -> set[str]:
    """Matmuls of a block that the backward pass recomputes, by the names of Blocks.matmul_flops. The backward
    pass does not need the last one, `down`; but with expert parallelism each round is recomputed completely.
    """
    block = {"query", "key", "value", "attended", "out", "up", "gate"}
    experts = {"up", "gate"} if blocks.mixture else set[str]()
    saved = {
        "none": block,
        "dots": block - {"attended"} - experts,
        "named": set(layout.saved) - experts,
        "full": set[str](),
    }
    rounds = experts | {"down"} if experts and layout.size("expert") > 1 else set[str]()
    return (block - saved[layout.remat or "none"]) | rounds


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
    return forward + rest + max(head - forward / layout.chunks, 0.0)


# ---- models made of blocks


def _block_work(facts: Facts, layout: Layout, chip: Chip) -> Work:
    model = facts.model
    assert model
    rate, bandwidth = chip.flops[model.dtype] * matmul_share(chip), chip.bandwidth * BANDWIDTH_SHARE
    tensor, piped = layout.size("tensor"), layout.stages > 1
    remats = layout.remat not in ("none", "")
    # Forward passes beside that of the backward pass; the last stage of a pipeline has none.
    forwards = 1 - 1 / (layout.stages * layout.chunks) if piped else 0.0
    forward = rest = executed = ring = moved = kernels = 0.0
    for blocks in model.blocks:
        local_tokens = tokens(facts, layout, blocks.length) * layout.accumulate
        num = (
            local_tokens / tensor * (blocks.num_blocks / layout.stages)
        )  # runs of a block by a token
        flops = _flops(blocks, layout)
        idle = max(
            chip.tile / blocks.config.width, 1.0
        )  # a short head leaves part of the unit idle
        forward += num * (flops.dense + flops.attention * idle) / rate
        rest += num * (flops.weights + flops.kernel * idle) / rate
        executed += num * (
            flops.weights + flops.kernel + forwards * (flops.dense + flops.attention)
        )
        ring += num * idle * (flops.kernel + flops.attention * piped) / rate
        kernels += num * (idle * flops.kernel * flops.fused + flops.experts) / rate
        moved += (
            local_tokens * blocks.num_blocks / layout.stages * _block_traffic(facts, layout, blocks)
        )
    local_tokens = tokens(facts, layout) * layout.accumulate
    logits = local_tokens / tensor * model.logits_flops
    # With several chunks, the backward pass recomputes the logits of each.
    logits_passes = 3 if facts.chunks == 1 else 4
    busy = pipeline_seconds(layout, forward, rest, logits_passes * logits / rate)
    busy = max(busy, _operand_bytes(facts, layout) / bandwidth)
    backward = busy - (forward if piped else min(forward + logits / rate, busy / 3))
    loss = local_tokens * LOGITS_PASSES * FLOAT32_BYTES * model.rows / tensor / bandwidth
    moved /= bandwidth
    elementwise = pipeline_seconds(layout, moved, (4 if remats else 3) * moved, loss)
    executed += logits_passes * logits / layout.stages
    context = layout.size("context")
    return Work(busy, backward, elementwise, executed, ring * (context - 1) / context, kernels)


class _Flops(NamedTuple):
    """FLOPs per token of a block. dense, attention: of a forward pass. weights, kernel: the same of the
    backward pass with all that it recomputes, and of the forward pass. fused: whether attention is a kernel.
    experts: the part of `weights` in grouped matmuls.
    """

    dense: float
    attention: float
    weights: float
    kernel: float
    fused: bool
    experts: float


def _flops(blocks: Blocks, layout: Layout) -> _Flops:
    matmuls = blocks.matmul_flops()
    matmuls.pop("attended")
    attention, fused = attention_flops(blocks, layout)
    rematerialised = recomputed_matmuls(blocks, layout)
    dense = sum(matmuls.values())
    backward = lambda name: matmuls[name] * (3 + (name in rematerialised))
    weights = sum(map(backward, matmuls))
    experts = sum(map(backward, ("up", "gate", "down"))) if blocks.mixture else 0.0
    remats = layout.remat not in ("none", "")
    kernel = attention * (
        (3.5 if fused else 3) + ("attended" in rematerialised or (fused and remats))
    )
    in_kernel = fused and blocks.config.attention in FUSED
    return _Flops(dense, attention, weights, kernel, in_kernel, experts)


def attention_flops(blocks: Blocks, layout: Layout) -> tuple[float, bool]:
    """(forward FLOPs per token that attention executes, whether a kernel recomputes the scores in the
    backward pass instead of saving them).
    """
    per_key, length, memory = blocks.flops_per_key, blocks.length, blocks.memory
    if layout.size("context") > 1 and layout.context == "ring":
        return per_key * (length * ring_share(blocks.config, layout) + memory), True
    if blocks.config.attention not in FUSED:
        return per_key * (length + memory), False
    return per_key * blocks.computed_keys(), True


def ring_share(config: BlockConfig, layout: Layout) -> float:
    """Fraction of the pairs of queries and keys that a ring computes: all, or 2 n + 1 of 4 n pairs of chunks
    under a causal mask.
    """
    context = layout.size("context")
    return (2 * context + 1) / (4 * context) if config.mask == "causal" else 1.0


def _operand_bytes(facts: Facts, layout: Layout) -> float:
    """Bytes that the matmuls of a step read and write: weights per microbatch, and activations."""
    model, mesh = facts.model, abstract_mesh(layout.mesh)
    assert model
    recomputes = any(recomputed_matmuls(blocks, layout) for blocks in model.blocks)
    passes = 3 + recomputes + (layout.stages > 1)
    size = sum(
        leaf.bytes(mesh, fsdp=False) * facts.compute / leaf.itemsize for leaf in facts.weights
    )
    for blocks in model.blocks:
        per_token = 2 * sum(blocks.widths().values()) * facts.compute / layout.size("tensor")
        size += tokens(facts, layout, blocks.length) * blocks.num_blocks / layout.stages * per_token
    return layout.accumulate * passes * size


def _block_traffic(facts: Facts, layout: Layout, blocks: Blocks) -> float:
    """Bytes per token of the memory traffic of a block beside its matmuls, forward."""
    config, tensor, width = blocks.config, layout.size("tensor"), blocks.widths()
    residual = width["residual"] / (tensor if layout.sequence_parallel else 1)
    # norms (read, write), and for each layer an addition (two reads, a write)
    moved = (2 * blocks.norms + 3 * blocks.layers) * residual
    heads = (config.heads + config.num_kv_heads) * config.width
    rotary = 1 if facts.model and facts.model.rotary else 0
    moved += 2 * heads / tensor * (rotary + config.qk_norm)
    moved += (3 if "gate" in width else 2) * width["up"] / tensor
    if blocks.mixture:  # rows and their results: taken, sorted, sorted back, added
        moved += 6 * config.experts.top_k * config.embed
    block = moved * facts.compute
    if config.attention == "xla":
        context = layout.size("context")
        ring = ring_share(config, layout) if context > 1 and layout.context == "ring" else 1
        scores = config.heads / tensor * (blocks.length * ring + blocks.memory)
        block += scores * (SCORES_PASSES * FLOAT32_BYTES + 2 * facts.compute)
    return block
