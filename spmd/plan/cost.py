"""How long a step takes: a roofline of products, memory traffic, and every network that the mesh crosses.

    step = products + elementwise + update + what collectives take beyond what they can hide behind

- products: executed FLOPs (with what remat computes anew) at PRODUCT_SHARE of the peak, or the bytes of
  their operands at the bandwidth of the memory, whichever is longer. Attention with a short head leaves part
  of a TPU's matrix unit idle (Chip.tile). Splash and cuDNN skip what the causal mask hides, and multiply five
  times for two in the backward pass (Dao et al. 2022); XLA's attention computes all, and four for two.
- elementwise: norms, residuals, rotary angles, activation functions, scores of XLA's attention, the loss;
  each reads and writes the memory once, fused with its neighbours, and nothing runs beside it. The backward
  pass moves twice as much, what remat computes anew once more.
- update: parameters, optimizer state and average are read and written; gradients are read twice, once for
  their norm.
- collectives: what gathers weights or sums gradients can hide behind products, up to HIDEABLE of it and no
  longer than those take (sums: than the backward pass's). What tensor parallelism exchanges, and the new
  parameters of ZeRO-1, hide behind nothing: the next product waits for them.

The constants are few, the same for every row of the tables in docs/plan.md, and each has its reason beside
it. Of an unknown model, FLOPs come from its jaxpr, and its memory traffic from what its backward pass keeps.

Not modelled: the input pipeline, dispatch (small models), stragglers, congestion between jobs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from spmd import tree
from spmd.fields import check
from spmd.hardware import Chip
from spmd.plan import comms, memory, network
from spmd.plan.facts import Facts, abstract_mesh, products, widths
from spmd.plan.layout import Layout, check_fits, tokens
from spmd.plan.memory import WIDE, Memory
from spmd.plan.shardings import GROUPS
from spmd.plan.targets import Target

# Of the peak, what large products reach. TPU: MaxText's runs with full remat execute 4 / 3 of their model
# FLOPs, so 58.9 % MFU (52B, v4) and 66.9 % (32B, v5e) are 79 % and 89 %; between them. GPU: 790 of 989
# TFLOP/s, measured on an H200.
PRODUCT_SHARE = {"TPU": 0.85, "GPU": 0.8}
# Of what gathers weights or sums gradients, how much hides behind products: the first gather, the last sum
# and the joints between them do not. From Horovod's 90 % for ResNet-101; the other rows follow.
HIDEABLE = 0.6
BANDWIDTH_SHARE = 0.9  # of the memory's, for large arrays: STREAM-like kernels reach 85 to 95 %
BACKWARD = 2 / 3  # of a step's products, without remat
LOGITS_PASSES = (
    8  # over float32 logits: written, maximum, sum, target; gradient: read, written, read twice
)
SCORES_PASSES = (
    4  # over XLA's scores, forward: written, maximum, sum and quotient, read by the second product
)
FUSED = ("splash", "cudnn")


class Estimate(NamedTuple):
    """A step of `layout`. capacity: bytes that a program can have of a device. seconds: by part. networks:
    `what over axes (network)` -> seconds of its collectives, and of those that nothing hides. flops: of all
    devices, of the model and executed. mfu: model FLOPs at the peak / step, attention counted whole.
    """

    layout: Layout
    memory: Memory
    capacity: float
    seconds: dict[str, float]
    networks: dict[str, tuple[float, float]]
    model_flops: float
    executed_flops: float
    mfu: float
    tokens_per_second: float

    @property
    def step_seconds(self) -> float:
        """Of one step."""
        return sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        """Whether the memory of a device is enough."""
        return self.memory.peak <= self.capacity

    @property
    def bottleneck(self) -> str:
        """What takes longest, in one sentence, and what would help most."""
        return _sentence(self)

    def json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            **self._asdict(),
            "layout": self.layout.json(),
            "memory": self.memory.json(),
            "step_seconds": self.step_seconds,
            "fits": self.fits,
            "bottleneck": self.bottleneck,
        }


def estimate(
    facts: Facts, target: Target, layout: Layout, found: list[comms.Collective] | None = None
) -> Estimate:
    """found: the collectives, where a compiled program has told them; else those of the closed form.

    ValueError with the reason when the experiment, the mesh and the target do not go together; whether it
    fits the memory, `fits` says.
    """
    chip = target.chip
    check(chip is not None, f"nothing is known of the speed of {target.name}: give a TPU or a GPU")
    assert chip
    num = layout.num_devices
    devices = target.num_devices * layout.slices
    check(num == devices, f"mesh of {num} devices for {devices} of {target.name}")
    check_fits(facts, layout)
    levels = network.levels(target, layout.mesh, layout.slices)
    found = comms.of(facts, layout) if found is None else found
    held = memory.of(facts, layout)
    work = _work(facts, layout, chip)
    seconds = {
        "products": work.products,
        "elementwise": work.elementwise,
        "update": _update(facts, layout, held, chip),
    }
    networks = crossed(found, levels, work.products, work.backward)
    seconds["collectives"] = sum(shown for _, shown in networks.values())
    step = sum(seconds.values())
    flops = float(sum(facts.flops.values()))
    peak = sum(count / chip.flops[dtype] for dtype, count in facts.flops.items()) / num
    return Estimate(
        layout=layout,
        memory=held,
        capacity=memory.usable(chip.memory),
        seconds=seconds,
        networks=networks,
        model_flops=flops,
        executed_flops=work.flops * num,
        mfu=peak / step,
        tokens_per_second=facts.tokens / step,
    )


# ---- networks


def crossed(
    found: list[comms.Collective], levels: network.Levels, compute: float, backward: float
) -> dict[str, tuple[float, float]]:
    """`what over axes (network)` -> seconds of its collectives, and those of them that nothing hides.

    compute, backward: seconds of products in a step, and of those in its backward pass. Gathers hide first.
    """
    times: dict[tuple[str, str], float] = {}
    for each in found:
        joined = network.join(levels, each.axes)
        name = f"{' x '.join(each.axes)} ({' + '.join(level.network for level in joined)})"
        spent = each.count * network.seconds(joined, each.kind, each.bytes)
        times[(each.what, name)] = times.get((each.what, name), 0.0) + spent
    room = {"parameters": compute, "gradients": backward}
    shown = {}
    for (what, name), spent in sorted(times.items(), key=lambda item: comms.WHAT.index(item[0][0])):
        hidden = min(HIDEABLE * spent, max(room.get(what, 0.0), 0.0))
        room = {key: min(left, compute) - hidden for key, left in room.items()}
        shown[f"{what} over {name}"] = (spent, spent - hidden)
    return shown


# ---- work


class Work(NamedTuple):
    """Of one device in one step: seconds, and executed FLOPs."""

    products: float
    backward: float
    elementwise: float
    flops: float


def product_share(chip: Chip) -> float:
    """Of the chip's peak."""
    return PRODUCT_SHARE["TPU" if chip.links and chip.links.axes else "GPU"]


def _work(facts: Facts, layout: Layout, chip: Chip) -> Work:
    if facts.model is not None:
        return _transformer(facts, layout, chip)
    num, bandwidth = layout.num_devices, chip.bandwidth * BANDWIDTH_SHARE
    busy = sum(count / chip.flops[dtype] for dtype, count in facts.flops.items()) / num
    busy /= product_share(chip)
    # What the backward pass keeps was written and read twice, and its gradients as well.
    traffic = 6 * facts.saved / num / bandwidth
    return Work(busy, busy * BACKWARD, traffic, sum(facts.flops.values()) / num)


def _transformer(facts: Facts, layout: Layout, chip: Chip) -> Work:
    model = facts.model
    assert model
    tensor = layout.size("tensor")
    here = tokens(facts, layout) * layout.accumulate
    made = products(model, facts.length)
    passes = 3 if facts.chunks == 1 else 4  # the logits of a chunk are made anew
    logits = passes * made.pop("logits")
    fused = model.attention in FUSED
    attended = made.pop("attended")
    anew = recomputed(layout)
    weights = sum(made.values()) * 3 + sum(made[name] for name in made if name in anew)
    forward = attended / 2 if fused else attended
    kernel = forward * ((3.5 if fused else 3) + ("attended" in anew or (fused and bool(anew))))
    idle = max(chip.tile / model.width, 1.0)
    flops = here / tensor * (model.layers * (weights + kernel) + logits)
    rate = chip.flops[model.dtype or "float32"] * product_share(chip)
    busy = here / tensor * (model.layers * (weights + kernel * idle) + logits) / rate
    first = here / tensor * (model.layers * (sum(made.values()) + forward * idle) + logits / passes)
    bandwidth = chip.bandwidth * BANDWIDTH_SHARE
    busy = max(busy, _operands(facts, layout) / bandwidth)
    elementwise = here * _traffic(facts, layout) / bandwidth
    return Work(busy, busy - min(first / rate, busy / 3), elementwise, flops)


def recomputed(layout: Layout) -> set[str]:
    """Products of a block that the backward pass makes anew, by the names of facts.products. The last one,
    `down`, is needed by nobody.
    """
    block = {"query", "key", "value", "attended", "out", "up", "gate"}
    kept = {
        "none": block,
        "dots": block - {"attended"},
        "named": set(layout.saved),
        "full": set[str](),
    }
    return block - kept[layout.remat]


def _operands(facts: Facts, layout: Layout) -> float:
    """Bytes that a step's products read and write: weights for each microbatch, and activations."""
    model, mesh = facts.model, abstract_mesh(layout.mesh)
    assert model
    passes = 3 + (len(recomputed(layout)) > 0)
    weights = sum(
        leaf.bytes(mesh, fsdp=False) * facts.compute / leaf.itemsize for leaf in facts.weights
    )
    wide = widths(model)
    each = 2 * sum(wide.values()) * facts.compute / layout.size("tensor")
    here = tokens(facts, layout)
    return layout.accumulate * passes * (weights + here * model.layers * each)


def _traffic(facts: Facts, layout: Layout) -> float:
    """Bytes for each token that run through memory beside the products, in a step."""
    model, tensor = facts.model, layout.size("tensor")
    assert model
    wide = widths(model)
    residual = wide["residual"] / (tensor if layout.sequence_parallel else 1)
    moved = 10 * residual  # two norms, read and written; two sums, two read and one written
    heads = wide["query"] + wide["key"]
    moved += 2 * heads / tensor * (1 if model.position == "rope" else 0)
    moved += (3 if "gate" in wide else 2) * wide["up"] / tensor
    block = moved * facts.compute
    if model.attention == "xla":
        scores = model.heads / tensor * facts.length
        block += scores * (SCORES_PASSES * WIDE + 2 * facts.compute)
    passes = 3 if layout.remat == "none" else 4
    logits = LOGITS_PASSES * WIDE * model.rows / tensor
    return passes * model.layers * block + logits


def _update(facts: Facts, layout: Layout, held: Memory, chip: Chip) -> float:
    """Each device updates the part of the parameters whose optimizer state it has."""
    mesh = abstract_mesh(layout.mesh)
    part = sum(
        leaf.bytes(mesh, fsdp=layout.zero > 0)
        for leaf in facts.leaves
        if leaf.group == GROUPS["params"]
    )
    moved = 2 * (part + held.optimizer + held.average) + 2 * part
    return moved / (chip.bandwidth * BANDWIDTH_SHARE)


# ---- words

HELP = {
    "products": "fewer FLOPs would help most: less remat (model.remat) where memory allows it",
    "elementwise": "less memory traffic would help most: attention in a fused kernel (model.attention),"
    " sequence parallelism, or a wider model",
    "update": "more tokens for each update would help most: a larger batch, or train.accumulate",
    "parameters": "fewer gathers of the weights would help most: a smaller mesh.fsdp beside mesh.data or"
    " mesh.replica, zero=1, or more tokens for each of them",
    "gradients": "fewer sums of gradients would help most: more tokens on each device, or accumulation with"
    " fewer, larger microbatches",
    "new parameters": "zero=3 would help most, which gathers weights while products run",
    "activations": "a smaller mesh.tensor would help most: its sums hide behind nothing",
}


def _sentence(made: Estimate) -> str:
    step = made.step_seconds
    parts = {name: spent for name, spent in made.seconds.items() if name != "collectives"}
    parts |= {name: shown for name, (_, shown) in made.networks.items()}
    top = max(parts, key=lambda name: parts[name])
    says = HELP[top.split(" over ")[0]]
    if not made.fits:
        over = tree.human_bytes(made.memory.peak - made.capacity)
        return f"It does not fit: {over} more than a device has."
    if top == "products" and made.layout.remat == "none":
        says = "more devices, or a smaller model, would make it faster"
    return f"{top} take {parts[top] / step:.0%} of the step; {says}."
