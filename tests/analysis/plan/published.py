"""Published runs that the planner is held against, with the inputs that their sources give."""

from __future__ import annotations

from typing import NamedTuple

import jax

from spmd import Experiment
from spmd.analysis.plan import comms, cost, facts, network, work
from spmd.analysis.plan.blocks import block_model
from spmd.analysis.plan.facts import Facts, StateArray
from spmd.analysis.plan.layout import Layout
from spmd.data.text import Text
from spmd.hardware.chips import Chip, Links
from spmd.hardware.targets import Target
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.parallel.mesh import MeshConfig
from spmd.tasks import LanguageModel
from spmd.train import TrainConfig
from spmd.train.program import Program

SAVED_QKV = ("query", "key", "value")


class Row(NamedTuple):
    """A run of MaxText. rows: sequences on each device; seconds: of a step, as published or from its rate."""

    name: str
    target: str
    layout: Layout
    model: Transformer
    length: int
    rows: int
    seconds: float
    source: str


def _model(**fields) -> Transformer:
    return Transformer(
        **{"dtype": "bfloat16", "rope_theta": 10_000.0, "attention": "splash"} | fields
    )


# MaxText's base.yml times its global_parameter_scale of 32: gated, heads of 128.
_32B = _model(vocab=32_000, length=2048, layers=32, embed=8192, heads=64, mlp=28672)
_52B = _model(
    vocab=32_768,
    length=1024,
    layers=32,
    embed=12288,
    heads=32,
    head_dim=256,
    mlp=49152,
    activation="gelu",  # it is relu: two matmuls either way
    tied=True,
    attention="xla",
)
_LLAMA2_70B = _model(
    vocab=32_000, length=4096, layers=80, embed=8192, heads=64, kv_heads=8, mlp=28672
)
_LLAMA3 = {"vocab": 128_256, "length": 8192, "kv_heads": 8}
_LLAMA3_8B = _model(**_LLAMA3, layers=32, embed=4096, heads=32, mlp=14336)
_LLAMA3_70B = _model(**_LLAMA3, layers=80, embed=8192, heads=64, mlp=28672)


def flops_of(model: Transformer, rows: int, length: int) -> int:
    """Model FLOPs of a step."""
    tokens = jax.ShapeDtypeStruct((rows, length), "int32")
    blocks = block_model(model, [tokens], model.rows)
    assert blocks
    return blocks.flops(rows)


def _seconds(model: Transformer, length: int, rows: int, tera: float) -> float:
    """Seconds of a step, from the published TFLOP/s of a device, masked attention included."""
    return flops_of(model, rows, length) / (tera * 1e12)


MAXTEXT = [
    Row(
        "32B, v5p-128 (64 chips)",
        "v5p:4x4x4",
        Layout({"fsdp": 16, "tensor": 4}, sequence_parallel=True, remat="dots"),
        _32B,
        2048,
        7,
        _seconds(_32B, 2048, 7, 328),
        "configs/v5p: README.md (328 TFLOP/s, 71.5 %), 32b.sh",
    ),
    Row(
        "32B, v5e-256",
        "v5e:16x16",
        Layout({"fsdp": 256}, remat="full"),
        _32B,
        2048,
        4,
        _seconds(_32B, 2048, 4, 132),
        "configs/v5e: README.md (132 TFLOP/s, 66.9 %), 32b.sh",
    ),
    Row(
        "52B, 2 x v4-384 (384 chips)",
        "v4:4x4x12",
        Layout({"replica": 2, "fsdp": 192}, remat="full", slices=2),
        _52B,
        1024,
        10,
        _seconds(_52B, 1024, 10, 162),
        "configs/v4/README.md (162 TFLOP/s, 58.9 %), configs/2xv4-384.sh and base.yml of that time",
    ),
    Row(
        "Llama 2 70B, v5p-512 (256 chips)",
        "v5p:4x8x8",
        Layout({"fsdp": 256}, remat="named", saved=(*SAVED_QKV, "out")),
        _LLAMA2_70B,
        4096,
        4,
        4 * 4096 / 692,
        "tiering.md (692 tokens/s/device), configs/v5p/llama2_70b.sh",
    ),
    Row(
        "Llama 3.1 8B, v6e-256",
        "v6e:16x16",
        Layout({"fsdp": 256}, remat="named", saved=(*SAVED_QKV, "out")),
        _LLAMA3_8B,
        8192,
        4,
        4.546,
        "tiering.md (7,207 tokens/s/device), tpu-recipes: Llama3.1-8B-MaxText/v6e-256",
    ),
    Row(
        "Llama 3.1 70B, v6e-256",
        "v6e:16x16",
        Layout({"fsdp": 256}, remat="named", saved=SAVED_QKV),
        _LLAMA3_70B,
        8192,
        5,
        42.656,
        "tiering.md (960 tokens/s/device), tpu-recipes: Llama3.1-70B-MaxText",
    ),
]


def program(model: Transformer, length: int, batch_size: int) -> Program:
    """An experiment with that model and AdamW in float32, built on one device."""
    experiment = Experiment(
        name="published",
        model=model,
        task=LanguageModel(),
        data=Text(name="stdlib_source", sequence_length=length, batch_size=batch_size),
        optimizer=AdamW(clip_norm=1.0),
        mesh=MeshConfig(data=1),
        train=TrainConfig(steps=100),
    )
    return experiment.build(jax.devices()[:1], source=())


def known(model: Transformer, length: int, batch_size: int) -> Facts:
    """The facts of that program."""
    return facts.from_program(program(model, length, batch_size), model)


def residuals(program: Program) -> list[jax.ShapeDtypeStruct]:
    """Residuals that jax saves in the forward pass for the backward pass."""
    task, batch = program.task, program.abstract_batch()
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    scale = jax.eval_shape(lambda b: task.scale(task.weigh(b)), batch)

    def backward(params, *rest):
        return jax.vjp(lambda p: task.loss(p, *rest)[0], params)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.tree.leaves(jax.eval_shape(backward, params, model_state, batch, key, scale))


class Scaling(NamedTuple):
    """A published curve's end. params: of the model, summed in float32; rate: images/s of one GPU; rows:
    images of one GPU in a step; base: GPUs that the share is against; share: the published one.
    """

    name: str
    params: float
    rate: float
    rows: int
    links: Links
    base: int
    num_devices: int
    share: float
    source: str


def _pascal(link: float, host: int, gbit_s: float) -> Links:
    return Links(0, link, 1, host, host, gbit_s * 1e9 / 8 / host, "")


# 128 servers of 4 P100 on PCIe 3 (12 GB/s of 16), 25 Gb/s for each server.
_HOROVOD = _pascal(12e9, 4, 25)
# Big Basin: 8 P100 on NVLink (4 x 20 GB/s), 50 Gb/s for each server.
_BIG_BASIN = _pascal(80e9, 8, 50)
_RATES = "images/s of a P100: tensorflow.org/performance/benchmarks"
SCALING = [
    Scaling(
        "Horovod, ResNet-101",
        44.5e6,
        125.0,  # between the page's 219 (ResNet-50) and 92 (ResNet-152), by their FLOPs
        64,
        _HOROVOD,
        1,
        512,
        0.90,
        f"Sergeev and Del Balso 2018 (arXiv 1802.05799), RDMA; {_RATES}",
    ),
    Scaling(
        "Horovod, VGG-16",
        138.4e6,
        154.0,
        64,
        _HOROVOD,
        1,
        512,
        0.68,
        f"Sergeev and Del Balso 2018 (arXiv 1802.05799), RDMA; {_RATES}",
    ),
    Scaling(
        "Goyal et al., ResNet-50",
        25.6e6,
        32
        / 0.23,  # one hour for 90 epochs with 256 GPUs is 0.256 s for a step, and 0.9 of it with 8
        32,
        _BIG_BASIN,
        8,
        256,
        0.90,
        "Goyal et al. 2017 (arXiv 1706.02677), section 5.4",
    ),
]


def share(row: Scaling, num_devices: int) -> float:
    """Fraction of a step's time with `num_devices` that is computation."""
    chip = Chip("P100", {"float32": 10.6e12}, 16 * 2**30, 732e9, "", row.links)
    levels = network.levels(Target("p100", num_devices, chip), {"data": num_devices})
    whole = StateArray("weights", "parameters", (int(row.params),), 4, (None,), (int(row.params),))
    batch_size = row.rows * num_devices
    facts = Facts(row.name, (whole,), batch_size, batch_size, 1, 0, {}, 0, 4, 1, None)
    compute = row.rows / row.rate
    collectives = comms.step_collectives(facts, Layout({"data": num_devices}))
    computed = work.Work(compute, compute * work.backward_share(), elementwise=0, flops=0)
    networks = cost.network_seconds(collectives, levels, computed)[0].values()
    return compute / (compute + sum(exposed for _, exposed in networks))
