"""How long a step takes: a roofline of matmuls, memory traffic, and every network that the mesh crosses.

    step = matmuls + elementwise + update + bubble + the part of the collectives that is not overlapped

A program compiled for a TPU brings its compiler's cycles; they take the place of matmuls, elementwise and
update (`compiled_seconds`). Without one:

- matmuls: executed FLOPs (recomputation included) at MATMUL_SHARE of the peak, or the bytes of their operands
  at the bandwidth of the memory, whichever takes longer. Attention with a short head leaves part of a TPU's
  matrix unit idle (Chip.tile). Splash and cuDNN skip what the causal mask hides, and have five matmuls
  instead of two in the backward pass (Dao et al. 2022); XLA's attention computes all, and four instead of
  two.
- elementwise: norms, residuals, rotary angles, activation functions, scores of XLA's attention, the loss;
  each reads and writes the memory once, fused with its neighbours, and does not overlap with anything. The
  backward pass moves twice as much, recomputation as much as a forward pass.
- lookups: random reads and writes of rows of sparse tables, at the bandwidth of the memory.
- update: parameters, optimizer state and moving average are read and written; gradients are read twice, once
  for their norm.
- collectives: gathers of weights and reductions of gradients overlap with matmuls, up to HIDEABLE of their
  time and no longer than the matmuls take (reductions: those of the backward pass). The exchanges of tensor
  parallelism and the new parameters of ZeRO-1 do not overlap: the next matmul waits for them. Neither do the
  exchanges between the stages of a pipeline, nor the rows of a mixture of experts. The keys and values of a
  ring travel while attention works on the previous ones, and overlap up to the time of the attention.
- bubble: a stage waits S - 1 of m + S - 1 ticks (interleaved: of v m + S - 1), which costs matmuls, memory
  traffic and the collectives of a microbatch. A tick takes as long as its busiest stage: the last one has the
  head, but runs its layers once less, since its forward pass is part of its backward pass.

The constants are few, the same for every row of the tables in docs/plan.md, and each has its reason beside
it. For a model without closed forms, FLOPs come from its jaxpr, and memory traffic from the residuals of its
backward pass.

Not modelled: the input pipeline, dispatch (small models), stragglers, congestion between jobs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from spmd.analysis.plan import comms, network
from spmd.analysis.plan import memory as memories
from spmd.analysis.plan.collective import PAYLOADS, EstimatedCollective
from spmd.analysis.plan.facts import Facts
from spmd.analysis.plan.layout import Layout, check_fits
from spmd.analysis.plan.memory import EstimatedMemory
from spmd.analysis.plan.tables import lookup_seconds
from spmd.analysis.plan.work import BANDWIDTH_SHARE, Work, step_work, update_seconds
from spmd.core import tree
from spmd.core.fields import check
from spmd.hardware import hlo
from spmd.hardware.chips import Chip
from spmd.hardware.targets import Target

# Fraction of the gathers of weights and reductions of gradients that overlaps with matmuls: the first gather,
# the last reduction and the joints between them do not. From Horovod's 90 % for ResNet-101; the other rows of
# docs/plan.md follow.
HIDEABLE = 0.6
PALLAS = "tpu_custom_call"  # target of the custom calls that Pallas kernels become


class Estimate(NamedTuple):
    """A step of `layout`, estimated.

    capacity: bytes of a device that a program can use. seconds: by part. networks: `payload over axes
    (network)` -> (seconds of its collectives, seconds that are not overlapped). flops: of all devices. mfu:
    seconds of the model FLOPs at the peak / seconds of the step, masked attention included.
    """

    layout: Layout
    memory: EstimatedMemory
    capacity: float
    seconds: dict[str, float]
    networks: dict[str, tuple[float, float]]
    model_flops: float
    executed_flops: float
    mfu: float
    tokens_per_second: float

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        """Whether the memory of a device suffices."""
        return self.memory.peak <= self.capacity

    @property
    def bottleneck(self) -> str:
        """A sentence that names what takes longest, and what would help most."""
        return _sentence(self)

    def json(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {
            **self._asdict(),
            "layout": self.layout.json(),
            "memory": self.memory.json(),
            "step_seconds": self.step_seconds,
            "fits": self.fits,
            "bottleneck": self.bottleneck,
        }


def estimate(
    facts: Facts,
    target: Target,
    layout: Layout,
    collectives: list[EstimatedCollective] | None = None,
    weights: list[EstimatedCollective] | None = None,
    memory: EstimatedMemory | None = None,
    program: hlo.CompiledProgram | None = None,
) -> Estimate:
    """Estimates a step; `fits` of the result says whether the memory suffices.

    Args:
        facts: the experiment.
        target: the devices.
        layout: how the experiment is sharded over them.
        collectives: those of a compiled program; by default those of the closed forms.
        weights: weight_collectives of the same layout, if they have been computed.
        memory: where it is not that of the closed forms.
        program: compiled for a TPU; the compiler's cycles replace the closed forms of its computation.

    Raises:
        ValueError: the experiment, the mesh and the target do not fit together.
    """
    chip = target.chip
    check(chip is not None, f"no speed is known for {target.name}: give a TPU or a GPU")
    assert chip
    num = layout.num_devices
    devices = target.num_devices * layout.slices
    check(num == devices, f"mesh of {num} devices for {devices} of {target.name}")
    check_fits(facts, layout)
    levels = network.levels(target, layout.mesh, layout.slices)
    if collectives is None:
        collectives = comms.step_collectives(facts, layout, weights)
    memory = memory or memories.on_chip(memories.step_memory(facts, layout), facts, layout, chip)
    work = step_work(facts, layout, chip)
    # The text of a pipeline does not say in which ticks a stage works.
    if program is not None and program.cycles and chip.clock and layout.stages == 1:
        seconds = compiled_seconds(program, work, chip)
    else:
        seconds = estimated_seconds(facts, layout, memory, work, chip)
    networks, ticking = network_seconds(collectives, levels, work)
    if layout.stages > 1:
        busy = work.matmuls + work.elementwise + ticking
        seconds["bubble"] = busy * (layout.stages - 1) / (layout.chunks * layout.accumulate)
    seconds["collectives"] = sum(exposed for _, exposed in networks.values())
    step = sum(seconds.values())
    peak = sum(count / chip.flops[dtype] for dtype, count in facts.flops.items()) / num
    return Estimate(
        layout=layout,
        memory=memory,
        capacity=memories.usable(chip.memory),
        seconds=seconds,
        networks=networks,
        model_flops=float(sum(facts.flops.values())),
        executed_flops=work.flops * num,
        mfu=peak / step,
        tokens_per_second=facts.tokens / step,
    )


def estimated_seconds(
    facts: Facts, layout: Layout, memory: EstimatedMemory, work: Work, chip: Chip
) -> dict[str, float]:
    """Seconds of a step's computation in closed form, by part."""
    seconds = {
        "matmuls": work.matmuls,
        "elementwise": work.elementwise,
        "update": update_seconds(facts, layout, memory, chip),
    }
    if facts.tables:
        seconds["lookups"] = lookup_seconds(facts.tables, facts.batch_size, layout, chip)
    return seconds


def compiled_seconds(program: hlo.CompiledProgram, work: Work, chip: Chip) -> dict[str, float]:
    """Seconds of a compiled program's computation, by part.

    counted kernels: the compiler's cycles. uncounted kernels: Pallas kernels, by the FLOPs of their matmuls.
    gathers: what else the compiler does not count, by its bytes.
    """
    pallas = [each for each in program.kernels if each.op.endswith(PALLAS)]
    moved = sum(
        each.bytes * each.count
        for each in program.kernels
        if each.cycles < 0 and not each.op.endswith(PALLAS)
    )
    return {
        "counted kernels": program.cycles / chip.clock,
        "uncounted kernels": work.kernels if pallas else 0.0,
        "gathers": moved / (chip.bandwidth * BANDWIDTH_SHARE),
    }


def network_seconds(
    collectives: list[EstimatedCollective], levels: network.Levels, work: Work
) -> tuple[dict[str, tuple[float, float]], float]:
    """({`payload over axes (network)`: (seconds, seconds that are not overlapped)}, the part of the latter
    that belongs to the work of a microbatch). Rings overlap first, then gathers.
    """
    times: dict[tuple[str, bool, str], float] = {}
    for each in collectives:
        joined = network.join(levels, each.axes)
        name = f"{' x '.join(each.axes)} ({' + '.join(level.network for level in joined)})"
        spent = each.count * network.seconds(joined, each.kind, each.bytes)
        key = (each.payload, each.ticking, name)
        times[key] = times.get(key, 0.0) + spent
    room = {"parameters": work.matmuls, "gradients": work.backward}
    networks, ticking = {}, 0.0
    for (payload, ticks, name), spent in sorted(
        times.items(), key=lambda item: PAYLOADS.index(item[0][0])
    ):
        if payload == "keys and values":
            hidden = min(spent, work.ring)
        else:
            hidden = min(HIDEABLE * spent, max(room.get(payload, 0.0), 0.0))
        room = {key: min(left, work.matmuls) - hidden for key, left in room.items()}
        networks[f"{payload} over {name}"] = (spent, spent - hidden)
        ticking += (spent - hidden) * ticks
    return networks, ticking


# ---- the bottleneck in words

HELP = {
    "matmuls": "fewer FLOPs would help most: less remat (model.remat) where memory allows it",
    "elementwise": "less memory traffic would help most: attention in a fused kernel (model.attention),"
    " sequence parallelism, or a wider model",
    "counted kernels": "--show kernels ranks them by the compiler's cycles; less remat (model.remat), where"
    " memory allows it, is fewer",
    "uncounted kernels": "shorter sequences, a window, or fewer experts for each token would help most",
    "gathers": "fewer rows that are looked up would help most",
    "update": "more tokens per update would help most: a larger batch, or train.accumulate",
    "parameters": "fewer gathers of the weights would help most: a smaller mesh.fsdp beside mesh.data or"
    " mesh.replica, zero=1, or more tokens per gather",
    "gradients": "fewer reductions of gradients would help most: more tokens per device, or accumulation with"
    " fewer, larger microbatches",
    "new parameters": "zero=3 would help most, which gathers weights while matmuls run",
    "merges": "sending less would help most: strategy.compress, or --strategy local with a longer period",
    "activations": "a smaller {axis} would help most: its exchanges do not overlap with anything",
    "keys and values": "a smaller mesh.context would help most, or fewer key and value heads",
    "rows": "a smaller mesh.expert would help most: the exchange of rows does not overlap with anything",
    "lookups": "fewer rows would help most: bags of fewer ids, narrower tables, or a smaller data.batch_size",
    "microbatches": "fewer stages would help most, or fewer, larger microbatches",
    "chunks": "fewer virtual stages would help most: their weights move in each step",
    "bubble": "more microbatches (train.accumulate), virtual stages, or fewer stages would help most",
}


def _sentence(estimate: Estimate) -> str:
    step = estimate.step_seconds
    parts = {name: spent for name, spent in estimate.seconds.items() if name != "collectives"}
    parts |= {name: exposed for name, (_, exposed) in estimate.networks.items()}
    top = max(parts, key=lambda name: parts[name])
    payload, _, over = top.partition(" over ")
    advice = HELP[payload].format(axis=f"mesh.{over.partition(' (')[0]}")
    if not estimate.fits:
        excess = tree.human_bytes(estimate.memory.peak - estimate.capacity)
        return f"It does not fit: {excess} more than a device has."
    if top == "matmuls" and estimate.layout.remat == "none":
        advice = "more devices, or a smaller model, would make it faster"
    return f"{top} take {parts[top] / step:.0%} of the step; {advice}."
