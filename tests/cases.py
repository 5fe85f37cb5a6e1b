"""Cases that several test modules share: models with their batches, layouts, compressions.

A new mesh axis or strategy joins LAYOUTS; it does not get a copy of a test.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

import spmd
from spmd import Experiment, optim, tasks
from spmd.analysis.plan import facts
from spmd.analysis.plan.layout import Layout
from spmd.data import Arrays
from spmd.models.attention import RopeScaling
from spmd.models.cnn import CNN
from spmd.models.dlrm import DLRM
from spmd.models.encoder import Encoder
from spmd.models.encoder_decoder import EncoderDecoder
from spmd.models.mlp import MLP
from spmd.models.moe import Experts
from spmd.models.recommenders import MatrixFactorization, TwoTower
from spmd.models.resnet import ResNet
from spmd.models.sasrec import SASRec
from spmd.models.segmenter import Segmenter
from spmd.models.transformer import Transformer
from spmd.models.unet import UNet
from spmd.models.vit import ViT
from spmd.models.wide_resnet import WideResNet
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import AllReduce, Auto, Compression, Local, Server, base
from spmd.train import TrainConfig

STEPS = 50
BATCH = 32
MODELS = {
    "mlp": MLP(inputs=64, hidden=(64, 64), dropout=0.3),
    "cnn": CNN(features=(8, 16), dropout=0.3),  # batch norm: statistics over the global batch
    "lm": Transformer(
        vocab=64, length=16, layers=2, embed=32, heads=4, kv_heads=2, mlp=64, dropout=0.1, tied=True
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preferring(Transformer):
    """A decoder that learns preferences, beside a frozen copy of itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student(Transformer):
    """A decoder that learns from a frozen teacher."""


SMALL: Any = {"vocab": 64, "length": 16, "embed": 32, "heads": 4, "kv_heads": 2, "mlp": 64}
MODELS["preferring"] = Preferring(**SMALL, layers=2, dropout=0.1)
MODELS["student"] = Student(**SMALL, layers=2, dropout=0.1, tied=True)
MODELS["encoder"] = dataclasses.replace(MODELS["lm"], mask="full", position="learned")
MODELS["texts"] = Encoder(
    vocab=64, length=16, classes=10, layers=2, embed=32, heads=4, mlp=64, dropout=0.1, bias=False
)
# BERT's heads: tokens hidden, tokens tagged; packed texts, token types, the pooler, pairs of neighbours.
MODELS["masked"] = dataclasses.replace(MODELS["texts"], classes=0, types=3, output="vocab")
MODELS["tagged"] = dataclasses.replace(MODELS["texts"], types=3, output="tokens")
MODELS["pooled"] = dataclasses.replace(MODELS["texts"], types=3, pool="tanh", bigrams=64)
MODELS["windowed"] = dataclasses.replace(MODELS["lm"], mask="full", window=(3,))
MODELS["pattern"] = dataclasses.replace(MODELS["lm"], layers=4, window=(3, 0))
MODELS["sliding"] = dataclasses.replace(MODELS["lm"], window=(3,))
# The fields of Gemma 2 and 3, then those of OLMo 2, Qwen 2.5 and Llama 3.1.
MODELS["gemma"] = dataclasses.replace(
    MODELS["pattern"],
    norm_at="both",
    norm_offset=1.0,
    activation="geglu",
    qk_norm=True,
    score_width=5,
    score_cap=4.0,
    logit_cap=6.0,
    embed_scale=True,
    rope_theta_window=1e4,
    rope_scaling=RopeScaling(kind="linear"),
)
MODELS["olmo"] = dataclasses.replace(
    MODELS["lm"],
    norm_at="output",
    qk_norm=True,
    qk_norm_over="all",
    qkv_bias=True,
    rope_scaling=RopeScaling(kind="llama3", length=32),
)
MODELS["pairs"] = EncoderDecoder(
    vocab=64, encoder_layers=2, layers=2, embed=32, heads=4, kv_heads=2, mlp=64, dropout=0.1
)
# T5: relative bias, no scaling, ReLU.
MODELS["t5"] = dataclasses.replace(
    MODELS["pairs"], kv_heads=4, position="relative", buckets=8, distance=12, score_width=1,
    activation="relu", head_scale=True,
)  # fmt: skip
# Shared experts, the loss by sequence and the offsets: both kinds of balance at once.
MODELS["moe"] = dataclasses.replace(
    MODELS["lm"], experts=Experts(num=8, top_k=2, shared=1, bias_rate=0.01)
)
# Dense blocks between those with experts.
MODELS["unlike"] = dataclasses.replace(
    MODELS["lm"], layers=4, experts=Experts(num=8, top_k=2, every=2, bias_rate=0.01)
)
# Without them: local steps have the mean of each loss over a replica's examples, and offsets of their own.
MODELS["moe_local"] = dataclasses.replace(
    MODELS["lm"], experts=Experts(num=8, top_k=2, shared=1, balance=0.0)
)
MODELS["resnet"] = ResNet(depth=20, width=4, channels=1)
MODELS["bottlenecks"] = ResNet(depth=50, width=4, channels=1)
MODELS["wide"] = WideResNet(depth=10, widen=1, channels=1, dropout=0.1)
MODELS["unet"] = UNet(widths=(4, 8), channels=1, classes=3, norm="group", groups=2)
# 16 patches and a token: padded where context shards them. A bias of keys has no gradient but rounding.
MODELS["vit"] = ViT(
    image=8, patch=2, channels=1, classes=10, layers=4, embed=32, heads=4, mlp=64, dropout=0.1,
    bias=False,
)  # fmt: skip
MODELS["segmenter"] = Segmenter(
    image=8, patch=2, channels=1, classes=3, encoder_layers=2, decoder_layers=2, embed=32, heads=4, mlp=64,
    dropout=0.1, bias=False,
)  # fmt: skip
MODELS["vit_mean"] = dataclasses.replace(MODELS["vit"], patch=4, pool="mean", activation="gelu")
# Of tables: rows of the smaller ones are on every device, those of the others on one each.
MODELS["mf"] = MatrixFactorization(users=40, items=60, dim=8)
MODELS["towers"] = TwoTower(users=40, items=60, dim=8, hidden=(16,))
MODELS["dlrm"] = DLRM(ids=(40, 60), numbers=3, dim=8, bottom=(8,), top=(16, 8), placement="rows")
MODELS["dlrm_bins"] = dataclasses.replace(MODELS["dlrm"], placement="tables")
MODELS["sasrec"] = SASRec(items=60, length=8, embed=16, layers=2, dropout=0.1, bias=False)
TASKS: dict[Any, Any] = {
    CNN: tasks.Classification(label_smoothing=0.1),
    MLP: tasks.Classification(label_smoothing=0.1),
    ResNet: tasks.Classification(),
    WideResNet: tasks.Classification(),
    ViT: tasks.Classification(label_smoothing=0.1),
    UNet: tasks.Segmentation(dice=0.5, pixel="focal"),
    Segmenter: tasks.Segmentation(),
    Transformer: tasks.LanguageModel(z_loss=1e-2, chunks=2),
    Encoder: tasks.TextClassification(label_smoothing=0.1),
    "vocab": tasks.MaskedLanguageModel(z_loss=1e-2, chunks=2),
    "tokens": tasks.TokenTagging(label_smoothing=0.1),
    EncoderDecoder: tasks.Translation(z_loss=1e-2, chunks=2),
    Preferring: tasks.DPO(label_smoothing=0.1, beta=0.5, chunks=2),
    Student: tasks.Distillation(
        teacher=tasks.FrozenModel(model=Transformer(**SMALL, layers=1)),
        temperature=2.0,
        z_loss=1e-2,
        chunks=2,
    ),
    MatrixFactorization: tasks.RatingPrediction(),
    TwoTower: tasks.Retrieval(learned=True),
    DLRM: tasks.ClickPrediction(),
    SASRec: tasks.NextItem(),
}
# Where the local steps of replicas are one step.
SYNCHRONOUS: Any = {"period": 1, "outer": "average"}
# Compression at the setting where it leaves nothing out.
ALL = Compression(kind="top-k", keep=1.0)
FULL = Compression(kind="powersgd", rank=1000)
LAYOUTS = {
    "dp2": (Auto(), MeshConfig(), 2),
    "dp4": (Auto(), MeshConfig(), 4),
    "dp8": (Auto(), MeshConfig(), 8),
    "fsdp2": (Auto(), MeshConfig(data=1, fsdp=2), 2),
    "fsdp4": (Auto(), MeshConfig(data=1, fsdp=4), 4),
    "fsdp8": (Auto(), MeshConfig(data=1, fsdp=8), 8),
    "hsdp2x4": (Auto(), MeshConfig(replica=2, data=1, fsdp=4), 8),
    "zero1_2": (Auto(zero=1), MeshConfig(data=1, fsdp=2), 2),
    "zero1_4": (Auto(zero=1), MeshConfig(data=1, fsdp=4), 4),
    "zero1_2x4": (Auto(zero=1), MeshConfig(data=2, fsdp=4), 8),
    "tensor2": (Auto(), MeshConfig(data=2, fsdp=2, tensor=2), 8),
    "sequence2x2": (Auto(sequence_parallel=True), MeshConfig(data=2, fsdp=2, tensor=2), 8),
    "context2": (Auto(), MeshConfig(data=1, context=2), 2),
    "context4": (Auto(), MeshConfig(data=1, context=4), 4),
    "context8": (Auto(), MeshConfig(data=1, context=8), 8),
    "context2x2x2": (Auto(), MeshConfig(data=1, fsdp=2, context=2, tensor=2), 8),
    "context2x2": (Auto(), MeshConfig(data=2, context=2), 4),
    "context2_sequence2": (Auto(sequence_parallel=True), MeshConfig(context=2, tensor=2), 8),
    "expert2": (Auto(), MeshConfig(data=1, expert=2), 2),
    "expert4": (Auto(), MeshConfig(data=1, expert=4), 4),
    "expert8": (Auto(), MeshConfig(data=1, expert=8), 8),
    "expert2x2x2": (Auto(), MeshConfig(data=1, fsdp=2, expert=2, tensor=2), 8),
    "expert4_context2": (Auto(), MeshConfig(data=1, context=2, expert=4), 8),
    "psum1": (AllReduce(), MeshConfig(), 1),
    "psum2": (AllReduce(), MeshConfig(), 2),
    "psum4": (AllReduce(), MeshConfig(), 4),
    "psum2x4": (AllReduce(), MeshConfig(replica=2, data=4), 8),
    "local2": (Local(replicas=2, **SYNCHRONOUS), MeshConfig(replica=2, data=1), 2),
    "local4": (Local(replicas=4, **SYNCHRONOUS), MeshConfig(replica=4, data=1), 4),
    "local8": (Local(replicas=8, **SYNCHRONOUS), MeshConfig(replica=8, data=1), 8),
    "local4x2x2": (
        Local(replicas=4, **SYNCHRONOUS),
        MeshConfig(replica=2, data=1, fsdp=2, tensor=2),
        8,
    ),
    "local_topk4x2": (
        Local(replicas=4, compress=ALL, **SYNCHRONOUS),
        MeshConfig(replica=2, data=2),
        4,
    ),
    "local_powersgd4x2x2": (
        Local(replicas=4, compress=FULL, **SYNCHRONOUS),
        MeshConfig(replica=2, data=1, fsdp=2, tensor=2),
        8,
    ),
    "local2_context2": (
        Local(replicas=2, **SYNCHRONOUS),
        MeshConfig(replica=2, data=1, context=2),
        4,
    ),
    "local4_expert2_fsdp2": (
        Local(replicas=4, **SYNCHRONOUS),
        MeshConfig(replica=2, data=1, fsdp=2, expert=2),
        8,
    ),
    "local_topk2_expert2_context2": (
        Local(replicas=2, compress=ALL, **SYNCHRONOUS),
        MeshConfig(replica=2, data=1, expert=2, context=2),
        8,
    ),
    "ring2": (AllReduce(reduction="ring"), MeshConfig(), 2),
    "ring4": (AllReduce(reduction="ring", bucket_mb=0.01), MeshConfig(), 4),
    "ring2x4": (
        AllReduce(reduction="ring", bidirectional=True, bucket_mb=0.01),
        MeshConfig(replica=2, data=4),
        8,
    ),
    "scatter_gather4": (AllReduce(reduction="reduce_scatter"), MeshConfig(), 4),
    "hierarchical2x4": (AllReduce(reduction="hierarchical"), MeshConfig(replica=2, data=4), 8),
    "server2": (Server(), MeshConfig(), 2),
    "server4": (Server(), MeshConfig(), 4),
    "server2x4": (Server(), MeshConfig(replica=2, data=4), 8),
    "topk4": (AllReduce(compress=ALL), MeshConfig(), 4),
    "powersgd4": (AllReduce(reduction="ring", compress=FULL), MeshConfig(), 4),
    "server_topk4": (Server(compress=ALL), MeshConfig(), 4),
    "server_powersgd4": (Server(compress=FULL), MeshConfig(), 4),
    # Replicas whose devices share a model.
    "psum2_tensor2": (AllReduce(), MeshConfig(tensor=2), 4),
    "psum2x2_fsdp2": (AllReduce(), MeshConfig(replica=2, data=2, fsdp=2), 8),
    "ring2_fsdp2_tensor2": (AllReduce(reduction="ring"), MeshConfig(fsdp=2, tensor=2), 8),
    "server2_fsdp2": (Server(), MeshConfig(fsdp=2), 4),
    "topk2_fsdp4": (AllReduce(compress=ALL), MeshConfig(fsdp=4), 8),
    "server_powersgd2_fsdp2": (Server(compress=FULL), MeshConfig(fsdp=2), 4),
    "psum2_context2": (AllReduce(), MeshConfig(context=2), 4),
    "psum2_expert2": (AllReduce(), MeshConfig(expert=2), 4),
    "ring2_expert2_tensor2": (AllReduce(reduction="ring"), MeshConfig(expert=2, tensor=2), 8),
    "server2_tensor2": (Server(), MeshConfig(tensor=2), 4),
    "server2_expert2_context2": (Server(), MeshConfig(expert=2, context=2), 8),
    "powersgd2_tensor2": (AllReduce(compress=FULL), MeshConfig(tensor=2), 4),
    "server_topk2_context2": (Server(compress=ALL), MeshConfig(context=2), 4),
}

# Of models that are a stack of layers; four microbatches. All schedules: tests/strategies/test_pipeline.py.
PIPELINES = {
    "stage2": (Auto(), MeshConfig(data=1, stage=2), 2),
    "stage2_fsdp2x2": (Auto(), MeshConfig(data=2, fsdp=2, stage=2), 8),
    "stage2_context2": (Auto(), MeshConfig(data=1, stage=2, context=2), 4),
    "stage2_context2x2": (Auto(), MeshConfig(data=2, stage=2, context=2), 8),
    "stage2_context4": (Auto(), MeshConfig(data=1, stage=2, context=4), 8),
    "stage2_context2_tensor2": (Auto(), MeshConfig(data=1, stage=2, context=2, tensor=2), 8),
    "stage2_context2_fsdp2": (Auto(), MeshConfig(data=1, fsdp=2, stage=2, context=2), 8),
    "stage2_expert2": (Auto(), MeshConfig(data=1, stage=2, expert=2), 4),
    "stage2_expert4": (Auto(), MeshConfig(data=1, stage=2, expert=4), 8),
    "stage2_expert2x2": (Auto(), MeshConfig(data=2, stage=2, expert=2), 8),
    "stage2_expert2_fsdp2": (Auto(), MeshConfig(data=1, fsdp=2, stage=2, expert=2), 8),
    "stage2_expert2_tensor2": (Auto(), MeshConfig(data=1, stage=2, expert=2, tensor=2), 8),
    "stage2_expert2_context2": (Auto(), MeshConfig(data=1, stage=2, expert=2, context=2), 8),
    "stage2_psum1": (AllReduce(), MeshConfig(data=1, stage=2), 2),
    "stage2_server1_context2": (Server(compress=ALL), MeshConfig(data=1, stage=2, context=2), 4),
    "stage2_psum2": (AllReduce(), MeshConfig(stage=2), 4),
    "stage2_psum2_fsdp2": (AllReduce(), MeshConfig(fsdp=2, stage=2), 8),
    "stage2_ring2_context2": (AllReduce(reduction="ring"), MeshConfig(stage=2, context=2), 8),
    "stage2_hierarchical2x2": (
        AllReduce(reduction="hierarchical"),
        MeshConfig(replica=2, stage=2),
        8,
    ),
    "stage2_psum2_expert2": (AllReduce(), MeshConfig(stage=2, expert=2), 8),
    "stage2_topk2": (AllReduce(compress=ALL), MeshConfig(stage=2), 4),
    "stage2_server2": (Server(), MeshConfig(stage=2), 4),
    "stage2_server2_tensor2": (Server(), MeshConfig(stage=2, tensor=2), 8),
    "stage2_server2_expert2": (Server(), MeshConfig(stage=2, expert=2), 8),
    "stage2_local2": (
        Local(replicas=2, **SYNCHRONOUS),
        MeshConfig(replica=2, data=1, stage=2),
        4,
    ),
    "stage2_local2x2": (Local(replicas=2, **SYNCHRONOUS), MeshConfig(replica=2, stage=2), 8),
    "stage2_local2_fsdp2": (
        Local(replicas=2, **SYNCHRONOUS),
        MeshConfig(replica=2, data=1, fsdp=2, stage=2),
        8,
    ),
    "stage2_local4": (Local(replicas=4, **SYNCHRONOUS), MeshConfig(data=1, stage=2), 2),
    "stage2_local4_context2": (
        Local(replicas=4, **SYNCHRONOUS),
        MeshConfig(replica=2, data=1, stage=2, context=2),
        8,
    ),
    "stage2_local_topk4_tensor2": (
        Local(replicas=4, compress=ALL, **SYNCHRONOUS),
        MeshConfig(replica=2, data=1, stage=2, tensor=2),
        8,
    ),
    "stage2_local4_expert2": (
        Local(replicas=4, **SYNCHRONOUS),
        MeshConfig(replica=2, data=1, stage=2, expert=2),
        8,
    ),
    "stage2_zero1": (Auto(zero=1), MeshConfig(data=1, fsdp=2, stage=2), 4),
    "stage2_sequence2x2": (
        Auto(sequence_parallel=True),
        MeshConfig(data=2, stage=2, tensor=2),
        8,
    ),
}

# Compressions that leave something out.
KINDS = {
    "int8": Compression(kind="int8", block=16),
    "top-k": Compression(kind="top-k", keep=0.1),
    "powersgd": Compression(kind="powersgd", rank=2),
}


def batch_at(step: int) -> dict[str, np.ndarray]:
    """An uneven batch: the examples that count are spread unequally over the devices."""
    rng = np.random.default_rng(step)
    weight = np.ones(BATCH, np.float32)
    weight[20:29] = 0
    return {
        "image": rng.integers(0, 256, (BATCH, 8, 8, 1)).astype(np.uint8),
        "label": rng.integers(0, 10, BATCH).astype(np.int32),
        "example_id": np.arange(BATCH, dtype=np.int32) + step * BATCH,
        "weight": weight,
    }


def tokens_at(step: int) -> dict[str, np.ndarray]:
    """Rows with several documents and an uneven amount of padding; the next number is the target."""
    rng = np.random.default_rng(step)
    shape = (BATCH, 16)
    tokens = rng.integers(0, 64, shape)
    starts = (rng.random(shape) < 0.2) | (np.arange(16) == 0)
    segments = starts.cumsum(1)
    first = np.maximum.accumulate(np.where(starts, np.arange(16), 0), axis=1)
    padding = np.arange(16) >= rng.integers(1, 17, (BATCH, 1))
    padding[24:] |= np.arange(16) >= 3  # the last devices have few tokens that count
    whole = {
        "tokens": tokens,
        "targets": np.where(padding, -1, (tokens + 1) % 64),
        "segments": np.where(padding, 0, segments),
        "positions": np.arange(16) - first,
    }
    rest = {k: v for k, v in batch_at(step).items() if k in ("example_id", "weight")}
    return {k: v.astype(np.int32) for k, v in whole.items()} | rest


def pairs_at(step: int) -> dict[str, np.ndarray]:
    """Rows with several pairs of a source and a target, uneven padding on both sides."""
    batch, rng = tokens_at(step), np.random.default_rng([step, 1])
    source = tokens_at(step + 1000)
    # A row's source has its own bounds; some targets have no source in their row, and see no memory.
    padding = np.arange(16) >= rng.integers(4, 17, (BATCH, 1))
    return batch | {
        "source": source["tokens"],
        "source_positions": source["positions"],
        "source_segments": np.where(padding, 0, source["segments"]).astype(np.int32),
    }


def texts_at(step: int) -> dict[str, np.ndarray]:
    """Texts of uneven length with a class each."""
    tokens, labels = tokens_at(step), batch_at(step)
    padding = np.arange(16) >= np.random.default_rng([step, 2]).integers(1, 17, (BATCH, 1))
    segments = np.where(padding, 0, 1).astype(np.int32)
    texts = {"tokens": tokens["tokens"], "segments": segments, "label": tokens["tokens"][:, 0] % 2}
    return texts | {name: labels[name] for name in ("example_id", "weight")}


def packed_at(step: int) -> dict[str, np.ndarray]:
    """Rows of packed texts with token types, some tokens tagged and some hidden."""
    batch, rng = tokens_at(step), np.random.default_rng([step, 3])
    tokens, shape = batch["tokens"], batch["tokens"].shape
    counted = (rng.random(shape) < 0.3) & (batch["segments"] > 0)
    return batch | {
        "types": rng.integers(0, 3, shape).astype(np.int32),
        "tags": np.where(counted, tokens % 10, -100).astype(np.int32),
        "targets": np.where(counted, tokens, -1).astype(np.int32),
    }


def task_of(model):
    """The task that a model is trained with."""
    output = getattr(model, "output", "")
    return TASKS[output if output in TASKS else type(model)]


def preferences_at(step: int) -> dict[str, np.ndarray]:
    """Rows with two answers, the same tokens before both, of uneven length."""
    batch, rng = tokens_at(step), np.random.default_rng([step, 3])
    first, second = rng.integers(3, 8, (2, BATCH, 1))
    time = np.arange(16)
    segments = np.where(time < first, 1, np.where(time < first + second, 2, 0))
    positions = np.where(segments == 2, time - first, np.where(segments == 1, time, 0))
    targets = np.where((segments > 0) & (positions > 0), (batch["tokens"] + 1) % 64, -1)
    found = {"segments": segments, "positions": positions, "targets": targets}
    return batch | {name: x.astype(np.int32) for name, x in found.items()}


def masks_at(step: int) -> dict[str, np.ndarray]:
    """Images with masks of three classes, some of whose pixels are unlabelled."""
    mask = np.random.default_rng(step + 1000).integers(-1, 3, (BATCH, 8, 8))
    return batch_at(step) | {"mask": mask.astype(np.int32)}


def events_at(step: int) -> dict[str, np.ndarray]:
    """Events of users and items: a rating, a click, and a history that begins late, or not at all."""
    rng = np.random.default_rng([step, 3])
    draw = lambda num, *shape: rng.integers(0, num, (BATCH, *shape)).astype(np.int32)
    late = np.arange(8) < rng.integers(0, 9, (BATCH, 1))
    history = np.where(late, -1, draw(60, 8)).astype(np.int32)
    user, item = draw(40), np.minimum(rng.zipf(1.3, BATCH) - 1, 59).astype(np.int32)
    events = {
        "user": user,
        "item": item,
        "rating": (1 + (user + item) % 5).astype(np.float32),
        "history": history,
        "targets": np.where(late, -1, (history + 1) % 60).astype(np.int32),
        "share": rng.uniform(0.01, 0.1, BATCH).astype(np.float32),
        "negatives": draw(60, 4),
        "numbers": rng.normal(size=(BATCH, 3)).astype(np.float32),
        "category_00": user,
        "category_01": item,
        "label": ((user + item) % 2).astype(np.int32),
    }
    return events | {k: v for k, v in batch_at(step).items() if k in ("example_id", "weight")}


def data_of(model):
    """Batch by step."""
    if isinstance(model, MatrixFactorization | TwoTower | DLRM | SASRec):
        return events_at
    if isinstance(model, EncoderDecoder):
        return pairs_at
    if isinstance(model, Preferring):
        return preferences_at
    if isinstance(model, Encoder):
        return texts_at if model.output == "text" else packed_at
    if isinstance(model, UNet | Segmenter):
        return masks_at
    return tokens_at if isinstance(model, Transformer) else batch_at


def parts_for(model, cut, *, accumulate=1, dtype="float32", optimizer=None, privacy=None):
    optimizer = optimizer or optim.AdamW(learning_rate=3e-3, clip_norm=1.0, warmup_steps=3)
    task = task_of(model).build(model, dtype)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    tx = optimizer.transformation(STEPS, optim.decay_mask(params, task.dims), task.dims)
    abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in data_of(model)(0).items()}
    return base.Parts(
        task=task,
        tx=tx,
        rate=optimizer.rate(STEPS),
        mesh=cut,
        batch=abstract,
        accumulate=accumulate,
        ema=optimizer.ema,
        privacy=privacy,
        rows=optimizer.rows,
    )


def assert_same_values(got, want, limit=1e-9):
    """Leaf by leaf, in float64: max |got - want| <= limit * max |want|.

    A leaf that is zero but for rounding (the gradient of a bias before a norm, of the keys' bias) has no
    magnitude of its own: its limit is that of a leaf 1e6 times smaller than the largest.
    """
    assert got.keys() == want.keys()
    largest = {name: np.max(np.abs(leaf), initial=0.0) for name, leaf in want.items()}
    floor = 1e-6 * max(largest.values())
    for name, leaf in want.items():
        error = np.max(np.abs(got[name] - leaf), initial=0.0)
        assert error <= limit * max(largest[name], floor), (name, error, largest[name])


def pairs_experiment(sizes: dict[str, int], accumulate: int = 1, **changes: Any) -> Experiment:
    """An encoder-decoder on pairs of 64 and 128 tokens, 16 to a batch, on a mesh of these sizes."""
    task = dataclasses.replace(TASKS[EncoderDecoder], z_loss=0.0, chunks=1)
    length = lambda name: 64 if "source" in name else 128
    names = (*task.features, "targets")
    model = EncoderDecoder(vocab=512, encoder_layers=2, layers=2, heads=8, mlp=512, tied=False)
    return Experiment(
        name="pairs",
        model=dataclasses.replace(model, **changes),
        task=task,
        data=Arrays(
            train=dict,
            eval=dict,
            features={name: ((length(name),), "int32") for name in names},
            batch_size=16,
        ),
        optimizer=optim.AdamW(clip_norm=1.0),
        mesh=MeshConfig(**{"data": 1} | sizes),
        train=TrainConfig(steps=10, accumulate=accumulate),
    )


def facts_of(name: str, *words: str) -> facts.Facts:
    """Facts about an experiment, for the closed forms of a plan."""
    exp = spmd.load(name, ["--simulate", "1", "--train.steps", "9000", *words]).experiment
    return facts.from_experiment(exp)


def mesh_words(layout: Layout) -> list[str]:
    """Command-line options of a layout's mesh."""
    words = layout.words()
    return words[: words.index("--model.remat")]
