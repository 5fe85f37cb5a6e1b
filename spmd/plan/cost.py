"""How long a step takes: a roofline of products, memory traffic, and every network that the mesh crosses.

    step = products + elementwise + update + bubble + what collectives take beyond what they can hide behind

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
  parameters of ZeRO-1, hide behind nothing: the next product waits for them. Neither does what a pipeline's
  stages exchange at each tick, nor the rows of a mixture. A ring's keys and values travel while attention
  works on those that came before, and hide up to what it takes.
- bubble: a stage waits S - 1 of m + S - 1 times (interleaved: of v m + S - 1), for products, memory traffic
  and what collectives of a microbatch take. A tick lasts as long as the busiest stage works: the last one
  has the head, but runs its layers once less, since its forward is part of its backward.

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
from spmd.plan.comms import WIDE
from spmd.plan.facts import Facts, abstract_mesh, products, widths
from spmd.plan.layout import Layout, check_fits, tokens
from spmd.plan.memory import Memory
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
    facts: Facts,
    target: Target,
    layout: Layout,
    found: list[comms.Collective] | None = None,
    weights: list[comms.Collective] | None = None,
    held: Memory | None = None,
) -> Estimate:
    """found: the collectives, where a compiled program has told them; else those of the closed form, of which
    `weights` may be known (comms.of_weights). held: where it is not that of the closed form.

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
    found = comms.of(facts, layout, weights) if found is None else found
    held = held or memory.of(facts, layout)
    work = _work(facts, layout, chip)
    seconds = {
        "products": work.products,
        "elementwise": work.elementwise,
        "update": _update(facts, layout, held, chip),
    }
    networks, ticking = crossed(found, levels, work)
    if layout.stages > 1:
        busy = work.products + work.elementwise + ticking
        seconds["bubble"] = busy * (layout.stages - 1) / (layout.virtual * layout.accumulate)
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
    found: list[comms.Collective], levels: network.Levels, work: Work
) -> tuple[dict[str, tuple[float, float]], float]:
    """`what over axes (network)` -> seconds of its collectives, and those that nothing hides; what of these
    is a part of each microbatch's work. A ring hides first, then gathers.
    """
    times: dict[tuple[str, bool, str], float] = {}
    for each in found:
        joined = network.join(levels, each.axes)
        name = f"{' x '.join(each.axes)} ({' + '.join(level.network for level in joined)})"
        spent = each.count * network.seconds(joined, each.kind, each.bytes)
        key = (each.what, each.ticking, name)
        times[key] = times.get(key, 0.0) + spent
    room = {"parameters": work.products, "gradients": work.backward}
    shown, ticking = {}, 0.0
    for (what, ticks, name), spent in sorted(
        times.items(), key=lambda x: comms.WHAT.index(x[0][0])
    ):
        if what == "keys and values":
            hidden = min(spent, work.ring)
        else:
            hidden = min(HIDEABLE * spent, max(room.get(what, 0.0), 0.0))
        room = {key: min(left, work.products) - hidden for key, left in room.items()}
        shown[f"{what} over {name}"] = (spent, spent - hidden)
        ticking += (spent - hidden) * ticks
    return shown, ticking


# ---- work


class Work(NamedTuple):
    """Of one device in one step: seconds, and executed FLOPs. ring: of attention, while keys and values go
    round.
    """

    products: float
    backward: float
    elementwise: float
    flops: float
    ring: float = 0.0


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
    here = tokens(facts, layout) * layout.accumulate / layout.size("tensor")
    layers = model.layers / layout.stages
    made = products(model, facts.length)
    passes = 3 if facts.chunks == 1 else 4  # the logits of a chunk are made anew
    logits = made.pop("logits")
    once, fused = _attention(facts, layout, made.pop("attended"))
    anew = recomputed(facts, layout)
    dense = sum(made.values())
    weights = dense * 3 + sum(made[name] for name in made if name in anew)
    kernel = once * (
        (3.5 if fused else 3) + ("attended" in anew or (fused and layout.remat != "none"))
    )
    idle = max(chip.tile / model.width, 1.0)
    rate = chip.flops[model.dtype or "float32"] * product_share(chip)
    first = here * layers * (dense + once * idle) / rate  # a forward alone
    rest = here * layers * (weights + kernel * idle) / rate
    head = here * logits / rate
    busy = paced(layout, first, rest, passes * head)
    bandwidth = chip.bandwidth * BANDWIDTH_SHARE
    busy = max(busy, _operands(facts, layout) / bandwidth)
    backward = busy - (first if layout.stages > 1 else min(first + head, busy / 3))
    block, loss = (here * layout.size("tensor") * n / bandwidth for n in _traffic(facts, layout))
    again = 3 if layout.remat == "none" else 4
    elementwise = paced(layout, layers * block, again * layers * block, loss)
    # Beside the backward's own.
    forwards = 1 - 1 / (layout.stages * layout.virtual) if layout.stages > 1 else 0.0
    flops = (
        layers * (weights + kernel + forwards * (dense + once)) + passes * logits / layout.stages
    )
    steps = layout.size("context")
    ring = here * layers * idle * (kernel + once * (layout.stages > 1)) / rate
    return Work(busy, backward, elementwise, here * flops, ring * (steps - 1) / steps)


def paced(layout: Layout, forward: float, rest: float, head: float) -> float:
    """Seconds that a step's work takes where stages wait for the busiest of each tick: of a stage's layers
    forward, of their backward with its own forward, and of the head. Without stages there is no forward
    beside that of the backward.
    """
    if layout.stages == 1:
        return rest + head
    if layout.pipeline == "gpipe":  # a tick is either forward or backward
        return forward + rest + head
    return forward + rest + max(head - forward / layout.virtual, 0.0)


def _attention(facts: Facts, layout: Layout, whole: float) -> tuple[float, bool]:
    """FLOPs for each token of a forward that the mask leaves to be done, of `whole`; and whether a kernel
    keeps scores to itself, and makes them anew in the backward pass.
    """
    assert facts.model
    context = layout.size("context")
    if context > 1 and layout.context == "ring":  # 2 n + 1 of 4 n pairs of chunks
        return whole * (2 * context + 1) / (4 * context), True
    fused = facts.model.attention in FUSED
    return (whole / 2 if fused else whole), fused


def recomputed(facts: Facts, layout: Layout) -> set[str]:
    """Products of a block that the backward pass makes anew, by the names of facts.products. The last one,
    `down`, is needed by nobody; but where experts are elsewhere, each round is made anew as a whole.
    """
    block = {"query", "key", "value", "attended", "out", "up", "gate"}
    experts = {"up", "gate"} if facts.model and facts.model.experts.num else set[str]()
    kept = {
        "none": block,
        "dots": block - {"attended"} - experts,
        "named": set(layout.saved) - experts,
        "full": set[str](),
    }
    away = experts | {"down"} if experts and layout.size("expert") > 1 else set[str]()
    return (block - kept[layout.remat]) | away


def _operands(facts: Facts, layout: Layout) -> float:
    """Bytes that a step's products read and write: weights for each microbatch, and activations."""
    model, mesh = facts.model, abstract_mesh(layout.mesh)
    assert model
    passes = 3 + (len(recomputed(facts, layout)) > 0) + (layout.stages > 1)
    weights = sum(
        leaf.bytes(mesh, fsdp=False) * facts.compute / leaf.itemsize for leaf in facts.weights
    )
    wide = widths(model)
    each = 2 * sum(wide.values()) * facts.compute / layout.size("tensor")
    here = tokens(facts, layout)
    layers = model.layers / layout.stages
    return layout.accumulate * passes * (weights + here * layers * each)


def _traffic(facts: Facts, layout: Layout) -> tuple[float, float]:
    """Bytes for each token that run through memory beside the products: of a block forward, of the loss."""
    model, tensor = facts.model, layout.size("tensor")
    assert model
    wide = widths(model)
    residual = wide["residual"] / (tensor if layout.sequence_parallel else 1)
    moved = 10 * residual  # two norms, read and written; two sums, two read and one written
    heads = wide["query"] + wide["key"]
    moved += 2 * heads / tensor * (1 if model.position == "rope" else 0)
    moved += (3 if "gate" in wide else 2) * wide["up"] / tensor
    if model.experts.num:  # rows and their results: taken, sorted, sorted back, added up
        moved += 6 * model.experts.top_k * model.embed
    block = moved * facts.compute
    if model.attention == "xla":
        context = layout.size("context")
        ring = (2 * context + 1) / (4 * context) if context > 1 and layout.context == "ring" else 1
        scores = model.heads / tensor * facts.length * ring
        block += scores * (SCORES_PASSES * WIDE + 2 * facts.compute)
    return block, LOGITS_PASSES * WIDE * model.rows / tensor


def _update(facts: Facts, layout: Layout, held: Memory, chip: Chip) -> float:
    """Each device updates the part of the parameters whose optimizer state it has."""
    mesh = abstract_mesh(layout.mesh)
    part = sum(
        leaf.bytes(mesh, fsdp=layout.zero > 0)
        for leaf in facts.leaves
        if leaf.group == GROUPS["params"]
    )
    part = min(part, held.parameters)  # of a server, its own only
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
    "merges": "sending less would help most: strategy.compress, or --strategy local with a longer period",
    "activations": "a smaller {axis} would help most: its exchanges hide behind nothing",
    "keys and values": "a smaller mesh.context would help most, or fewer key and value heads",
    "rows": "a smaller mesh.expert would help most: rows on their way hide behind nothing",
    "microbatches": "fewer stages would help most, or fewer, larger microbatches",
    "chunks": "fewer virtual stages would help most: their weights move in each step",
    "bubble": "more microbatches (train.accumulate), virtual stages, or fewer stages would help most",
}


def _sentence(made: Estimate) -> str:
    step = made.step_seconds
    parts = {name: spent for name, spent in made.seconds.items() if name != "collectives"}
    parts |= {name: shown for name, (_, shown) in made.networks.items()}
    top = max(parts, key=lambda name: parts[name])
    what, _, over = top.partition(" over ")
    says = HELP[what].format(axis=f"mesh.{over.partition(' (')[0]}")
    if not made.fits:
        over = tree.human_bytes(made.memory.peak - made.capacity)
        return f"It does not fit: {over} more than a device has."
    if top == "products" and made.layout.remat == "none":
        says = "more devices, or a smaller model, would make it faster"
    return f"{top} take {parts[top] / step:.0%} of the step; {says}."
