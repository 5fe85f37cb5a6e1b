"""A pipeline's gradient is that of one device, leaf by leaf, whatever the schedule and the mesh beside it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from spmd.core import tree
from spmd.models.cnn import CNN
from spmd.models.layers import BatchNorm
from spmd.models.mlp import MLP
from spmd.models.moe import Experts
from spmd.models.stack import LayerStack
from spmd.models.transformer import Transformer
from spmd.parallel import mesh, scope, sharding
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import base
from spmd.strategies.grads.direct import Trained
from tests import cases
from tests.cases import TASKS, assert_same_values, data_of
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("devices")

MODELS = {
    "mlp": MLP(inputs=64, hidden=(16,) * 9, dropout=0.3, stacked=True),
    # Tied, packed documents, dropout, z-loss, a loss in chunks (TASKS).
    "lm": Transformer(
        vocab=64, length=16, layers=8, embed=16, heads=4, kv_heads=2, mlp=32, dropout=0.1, tied=True
    ),
    "gpt": Transformer(
        vocab=64,
        length=16,
        layers=8,
        embed=16,
        heads=2,
        activation="gelu",
        norm="layer",
        position="learned",
        bias=True,
        scan=False,
        remat="full",
    ),
}


MODELS["moe"] = dataclasses.replace(MODELS["lm"], experts=Experts(num=8, top_k=2))
MODELS["unlike"] = dataclasses.replace(
    MODELS["lm"], experts=Experts(num=8, top_k=2, every=2), window=(0, 0)
)
MODELS["pairs"] = dataclasses.replace(cases.MODELS["pairs"], encoder_layers=4, layers=8)
MODELS["deep"] = MLP(inputs=64, hidden=(16,) * 17, dropout=0.3, stacked=True)


def parts_of(name, sizes, microbatches, kind="1f1b", virtual=2):
    num = int(np.prod(list(sizes.values())))
    model = MODELS[name] if isinstance(name, str) else name
    return base.Parts(
        task=cases.task_of(model).build(model, "float64"),
        tx=None,
        rate=None,
        mesh=mesh.make(MeshConfig(**{"data": 1} | sizes), jax.devices()[:num]),
        batch=None,
        accumulate=microbatches,
        pipeline=kind,
        virtual_stages=virtual,
    )


def lowered(parts, model):
    """The jitted gradient function, its parameters (drawn by numpy) and its batch."""
    task, cut = parts.task, parts.mesh
    shapes, _ = base.abstract_params(parts)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape) * 0.3, shapes)
    placed = sharding.param_shardings(shapes, task.dims, cut, fsdp=True)
    grads_of = base.grads_of(parts)

    def run(params, batch, key):
        with scope.bind(**sharding.placement(cut)):
            scale = task.scale(task.weigh(batch))
            key = jax.random.wrap_key_data(key)
            grads, sums, _ = grads_of(Trained(params, {}), {}, batch, key, scale)
            return grads.params, sums

    rows = NamedSharding(cut, sharding.batch_spec())
    jitted = jax.jit(run, in_shardings=(placed, rows, None), out_shardings=(placed, None))
    return jitted, (params, data_of(model)(0), np.array([0, 7], np.uint32))


def gradients(name, sizes, microbatches, *schedule):
    with jax.enable_x64(True):
        jitted, args = lowered(parts_of(name, sizes, microbatches, *schedule), MODELS[name])
        return {k: np.asarray(v) for k, v in tree.named_leaves(jitted(*args)).items()}


def assert_same(got, want):
    """Leaf by leaf, the norm of the difference and its largest element; the gradient of the keys' bias is
    zero but for rounding, and counts against the largest.
    """
    assert_same_values(got, want)
    norms = {leaf: np.linalg.norm(value) for leaf, value in want.items()}
    floor = 1e-6 * max(norms.values())
    for leaf, value in want.items():
        error = np.linalg.norm(got[leaf] - value)
        assert error <= 1e-9 * max(norms[leaf], floor), leaf


one_device = functools.cache(lambda name, microbatches: gradients(name, {}, microbatches))

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2)]
CASES = [
    (name, kind, stages, data, tensor)
    for name in ("mlp", "lm", "gpt")
    for kind, virtual in SCHEDULES
    for stages in (2, 4, 8)
    for data in (1, 2)
    for tensor in (1, 2)
    if stages * data * tensor <= 8 and stages * virtual <= 8 and not (name == "mlp" and tensor > 1)
]
CASES.append(("deep", "interleaved", 8, 1, 1))
QUICK = [("mlp", "interleaved", 4, 2, 1), ("lm", "1f1b", 2, 2, 2)]


@pytest.mark.parametrize("name,kind,stages,data,tensor", slow_but(QUICK, CASES))
def test_gradients_are_those_of_one_device(name, kind, stages, data, tensor):
    sizes = {"stage": stages, "data": data, "tensor": tensor}
    microbatches = 8 if stages == 8 else 4
    want = one_device(name, microbatches)
    got = gradients(name, sizes, microbatches, kind)
    assert_same(got, want)


BESIDE = {
    "fsdp": {"stage": 2, "fsdp": 2},
    "fsdp_tensor": {"stage": 2, "fsdp": 2, "tensor": 2},
    "replica_data": {"stage": 2, "replica": 2, "data": 2},
    "context2": {"stage": 2, "context": 2},
    "context4": {"stage": 2, "context": 4},
    "stage4_context2": {"stage": 4, "context": 2},
    "data_context2": {"stage": 2, "data": 2, "context": 2},
    "context2_tensor": {"stage": 2, "context": 2, "tensor": 2},
    "expert2": {"stage": 2, "expert": 2},
    "expert4": {"stage": 2, "expert": 4},
    "stage4_expert2": {"stage": 4, "expert": 2},
    "data_expert2": {"stage": 2, "data": 2, "expert": 2},
    "context2_expert2": {"stage": 2, "context": 2, "expert": 2},
}
OTHERS = [
    (name, "1f1b", beside)
    for name, kinds in (
        ("mlp", ("fsdp", "replica_data")),
        ("lm", tuple(name for name in BESIDE if "expert" not in name)),
        ("moe", tuple(name for name in BESIDE if "expert" in name)),
    )
    for beside in kinds
]
# Two stacks: chunks of the encoder, then of the decoder, with a memory that travels along.
PAIRS = ("fsdp", "fsdp_tensor", "replica_data", "context2", "context2_tensor", "stage4_context2")
OTHERS += [("pairs", "1f1b", beside) for beside in PAIRS]
OTHERS += [("pairs", kind, "fsdp_tensor") for kind in ("gpipe", "interleaved")]
# Two kinds of blocks in a period, the experts of one of them sharded.
UNLIKE = ("fsdp_tensor", "expert2", "data_expert2", "context2_expert2")
OTHERS += [("unlike", "1f1b", beside) for beside in UNLIKE]
OTHERS += [("unlike", "interleaved", "expert2")]
OTHERS += [("lm", kind, "context2") for kind in ("gpipe", "interleaved")]
OTHERS += [("moe", kind, "expert2") for kind in ("gpipe", "interleaved")]


@pytest.mark.parametrize("name,kind,beside", slow_but([("mlp", "1f1b", "fsdp")], OTHERS))
def test_beside_other_axes(name, kind, beside):
    assert_same(gradients(name, BESIDE[beside], 4, kind), one_device(name, 4))


ROWS, WIDTH = 1024, 64  # of a microbatch, and of a layer


def compiled(kind, stages, microbatches):
    """A gradient function whose memory is that of the inputs of its stages, and the bytes of its batch."""
    model = MLP(inputs=64, hidden=(WIDTH,) * (stages + 1), stacked=True)
    jitted, (params, batch, key) = lowered(
        parts_of(model, {"stage": stages}, microbatches, kind), model
    )
    batch = {
        name: jax.ShapeDtypeStruct((ROWS * microbatches, *x.shape[1:]), x.dtype)
        for name, x in batch.items()
    }
    return jitted.lower(params, batch, key).compile(), tree.num_bytes(batch)


@pytest.mark.slow
def test_1f1b_keeps_the_inputs_of_a_stage_for_a_few_microbatches_only():
    """GPipe keeps m inputs, 1F1B in slot form 2 S - 3 (the first stage looks its input up again): about m - S
    less, and no more for more microbatches, but for the batch itself.
    """
    stages, unit = 4, ROWS * WIDTH * 8
    temp, batch = {}, {}
    with jax.enable_x64(True):
        for kind, microbatches in (("gpipe", 64), ("1f1b", 64), ("1f1b", 16)):
            made, batch[microbatches] = compiled(kind, stages, microbatches)
            temp[kind, microbatches] = made.memory_analysis().temp_size_in_bytes
    saved = (temp["gpipe", 64] - temp["1f1b", 64]) / unit
    assert saved == pytest.approx(64 - (2 * stages - 3), rel=1e-3)
    assert saved == pytest.approx(64 - stages, rel=0.05)
    assert temp["1f1b", 64] - temp["1f1b", 16] <= batch[64] - batch[16] < 8 * unit


def test_mistakes_say_what_works():
    def refused(name, sizes, microbatches, *schedule):
        with jax.enable_x64(True), pytest.raises(ValueError) as error:
            base.grads_of(parts_of(name, sizes, microbatches, *schedule))
        return str(error.value)

    assert "mesh.stage=3 does not divide the 8 layers of the model; use mesh.stage=2 or 4 or 8" in (
        refused("mlp", {"stage": 3}, 4)
    )
    text = refused("mlp", {"stage": 4}, 4, "interleaved", 4)
    assert "mesh.stage=4 x train.virtual_stages=4 does not divide the 8 layers" in text
    assert "use mesh.stage=2, or 16 layers" in text
    text = refused(CNN(), {"stage": 2}, 4)
    assert "spmd.models.cnn" in text and "no enter, through, leave, logits, stream" in text
    assert "model.stacked" in refused(MLP(inputs=64, hidden=(16,) * 5), {"stage": 2}, 4)
    text = refused("pairs", {"stage": 8}, 8)
    assert "does not divide the 4 layers of encoder; use mesh.stage=2 or 4, or 8 layers" in text
    text = refused("pairs", {"stage": 4}, 6)
    assert "6 microbatches: a model of 2 stacks takes them in groups of mesh.stage=4; use 4" in text
    with pytest.raises(ValueError, match=r"keeps a state that is not of its layers .*: norm/mean"):
        TASKS[MLP].build(Statistics).staged()


class Statistics(nnx.Module):
    """The parts of a pipeline, and batch statistics."""

    stream = ("batch", "mlp")
    stacks = (LayerStack(name="layers", layers=2),)
    enter = through = leave = logits = lambda self: None

    def __init__(self, rngs):
        self.norm = BatchNorm(8)
