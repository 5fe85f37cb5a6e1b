"""Published runs that the planner is held against, with the inputs that their sources give."""

from __future__ import annotations

from typing import NamedTuple

import jax

from spmd import Experiment
from spmd.data.text import Text
from spmd.mesh import MeshConfig
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.plan import facts
from spmd.plan.facts import Facts
from spmd.plan.layout import Layout
from spmd.tasks import LanguageModel
from spmd.train import TrainConfig

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
    activation="gelu",  # it is relu: two products either way
    tied=True,
    attention="xla",
)
_LLAMA2_70B = _model(
    vocab=32_000, length=4096, layers=80, embed=8192, heads=64, kv_heads=8, mlp=28672
)
_LLAMA3 = {"vocab": 128_256, "length": 8192, "kv_heads": 8}
_LLAMA3_8B = _model(**_LLAMA3, layers=32, embed=4096, heads=32, mlp=14336)
_LLAMA3_70B = _model(**_LLAMA3, layers=80, embed=8192, heads=64, mlp=28672)


def _seconds(model: Transformer, length: int, rows: int, tera: float) -> float:
    """Of a step, from the published TFLOP/s of a device, attention counted whole."""
    return sum(facts.transformer_flops(model, rows, length).values()) / (tera * 1e12)


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


def known(model: Transformer, length: int, batch_size: int, **task: int) -> Facts:
    """Facts of an experiment with that model, AdamW in float32."""
    experiment = Experiment(
        name="published",
        model=model,
        task=LanguageModel(**task),
        data=Text(name="stdlib_source", sequence_length=length, batch_size=batch_size),
        optimizer=AdamW(clip_norm=1.0),
        mesh=MeshConfig(data=1),
        train=TrainConfig(steps=100),
    )
    program = experiment.build(jax.devices()[:1], source=())
    return facts.of(program, model, chunks=experiment.task.chunks)
