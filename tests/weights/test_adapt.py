"""Adapters and frozen arrays: the same numbers on every mesh, and none computed that nobody needs."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from spmd import optim, tasks
from spmd.core import tree
from spmd.models.mlp import MLP
from spmd.models.transformer import Transformer
from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import AllReduce, Auto, base
from spmd.weights import adapters as adapt
from spmd.weights.config import InitConfig

BATCH, TIME, VOCAB, STEPS = 8, 16, 64, 4
MODEL = Transformer(
    vocab=VOCAB, length=TIME, layers=3, embed=32, heads=4, kv_heads=2, mlp=64, dropout=0.1
)
LORA = InitConfig(lora=2, lora_alpha=6)
LAYOUTS = {
    "fsdp2xtensor2": (Auto(), MeshConfig(data=1, fsdp=2, tensor=2), 4),
    "data2xfsdp2xtensor2": (Auto(), MeshConfig(data=2, fsdp=2, tensor=2), 8),
    "zero1_4": (Auto(zero=1), MeshConfig(data=1, fsdp=4), 4),
    "psum4": (AllReduce(), MeshConfig(), 4),
}


def batch_at(step):
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, VOCAB, (BATCH, TIME + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "example_id": np.arange(BATCH, dtype=np.int32) + step * BATCH,
        "weight": np.ones(BATCH, np.float32),
    }


def built(config, strategy, sizes, num_devices, *, dtype="float32", accumulate=1):
    task = adapt.adapt(tasks.LanguageModel().build(MODEL, dtype), config)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    optimizer = optim.AdamW(learning_rate=0.01, clip_norm=1.0, ema=0.9)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch_at(0).items()}
    parts = base.Parts(
        task=task,
        tx=optimizer.transformation(STEPS, optim.decay_mask(params, task.dims), task.dims),
        rate=optimizer.rate(STEPS),
        mesh=mesh.make(sizes, jax.devices()[:num_devices]),
        batch=batch,
        accumulate=accumulate,
        ema=optimizer.ema,
    )
    return task, strategy.build(parts)


def trained(config, *layout, **options):
    """(losses, the final state's leaves, the strategy's shardings)."""
    _, strategy = built(config, *layout, **options)
    state = strategy.init(jax.random.key(0))
    losses = []
    for step in range(STEPS):
        state, metrics = strategy.step(
            state, jax.device_put(batch_at(step), strategy.batch_shardings)
        )
        losses.append(float(metrics["loss"]))
    leaves = {name: np.array(leaf) for name, leaf in tree.named_leaves(state).items()}
    return losses, leaves, tree.named_leaves(strategy.state_shardings)


OPTIONS = {"dtype": "float64", "accumulate": 2}


@functools.cache
def reference(config):
    return trained(config, Auto(), MeshConfig(), 1, **OPTIONS)


FREEZE = InitConfig(freeze=("blocks/mlp/*", "embed/table"))
QUICK = {("psum4", LORA)}
CASES = [
    pytest.param(
        layout, config, marks=pytest.mark.gate if (layout, config) in QUICK else pytest.mark.slow
    )
    for config in (LORA, FREEZE)
    for layout in LAYOUTS
]


@pytest.mark.parametrize("layout,config", CASES)
def test_equals_one_device(layout, config):
    with jax.enable_x64(True):
        losses, want, _ = reference(config)
        got_losses, got, _ = trained(config, *LAYOUTS[layout], **OPTIONS)
    np.testing.assert_allclose(got_losses, losses, rtol=1e-10)
    assert got.keys() == want.keys()
    for name, leaf in want.items():
        np.testing.assert_allclose(got[name], leaf, rtol=1e-7, atol=1e-9, err_msg=name)
    assert losses[0] != losses[-1]


@pytest.mark.slow
def test_adapters_of_stacked_heads_and_where_they_lie():
    _, leaves, placed = trained(LORA, *LAYOUTS["fsdp2xtensor2"])
    shapes = {
        "query": ((3, 32, 2), (3, 2, 4, 8)),
        "value": ((3, 32, 2), (3, 2, 2, 8)),
        "out": ((3, 4, 8, 2), (3, 2, 32)),
    }
    for name, (a, b) in shapes.items():
        kernel = f"params/blocks/attention/{name}/kernel"
        assert leaves[f"{kernel}/lora_a"].shape == a and leaves[f"{kernel}/lora_b"].shape == b
    tensor = lambda name: "tensor" in placed[name].spec
    assert tensor("params/blocks/attention/query/kernel/lora_b")
    assert tensor("params/blocks/attention/out/kernel/lora_a")
    assert not tensor("params/blocks/attention/query/kernel/lora_a")
    assert tensor("model_state/frozen/blocks/attention/query/kernel")
    trains = {n.split("/")[2] for n in leaves if n.startswith("params/")}
    assert trains == {"attention", "mlp"}  # neither the embedding nor the head
    table = [n for n in leaves if n.endswith("embed/table")]
    assert table == ["model_state/frozen/embed/table"]


@pytest.mark.gate
def test_merged_is_what_is_evaluated():
    """By numpy: each layer's kernel plus alpha / rank times the product, and the same predictions."""
    task, strategy = built(LORA, Auto(), MeshConfig(), 1)
    state = strategy.init(jax.random.key(0))
    for step in range(3):
        state, _ = strategy.step(state, batch_at(step))
    variables = strategy.eval_variables(state)
    plain = tasks.LanguageModel().build(MODEL)
    params, model_state = task.plain(*variables)
    out = lambda tree_: np.array(tree_["blocks"]["attention"]["out"]["kernel"])
    adapter = variables[0]["blocks"]["attention"]["out"]["kernel"]
    product = np.einsum("lhkr,lrd->lhkd", *map(np.array, (adapter["lora_a"], adapter["lora_b"])))
    assert abs(product).max() > 1e-3
    np.testing.assert_allclose(out(params), out(variables[1]["frozen"]) + 3 * product, atol=1e-6)
    want = plain.predict(params, model_state, batch_at(0))
    np.testing.assert_array_equal(task.predict(*variables, batch_at(0)), want)


def digits_step(config):
    task = adapt.adapt(tasks.Classification().build(MLP(inputs=64, hidden=(512, 512))), config)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    tx = optim.AdamW().transformation(STEPS, optim.decay_mask(params, task.dims), task.dims)
    batch = {
        "image": jax.ShapeDtypeStruct((64, 8, 8, 1), "uint8"),
        "label": jax.ShapeDtypeStruct((64,), "int32"),
        "example_id": jax.ShapeDtypeStruct((64,), "int32"),
        "weight": jax.ShapeDtypeStruct((64,), "float32"),
    }
    parts = base.Parts(
        task=task,
        tx=tx,
        rate=lambda _: 0.0,
        mesh=mesh.make(MeshConfig(), jax.devices()[:1]),
        batch=batch,
    )
    strategy = Auto().build(parts)
    state = jax.eval_shape(strategy.init, jax.random.key(0))
    return strategy.step.lower(state, batch).compile()


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state():
    full, frozen = (digits_step(c) for c in (InitConfig(), InitConfig(freeze=("layers/*",))))
    flops = lambda step: step.cost_analysis()["flops"]
    assert flops(frozen) < 0.45 * flops(full)  # one product of three, and the head
    num_bytes = 4 * (64 * 512 + 512 * 512)
    arguments = lambda step: step.memory_analysis().argument_size_in_bytes
    assert arguments(full) > 3 * num_bytes and arguments(frozen) < 1.1 * num_bytes
    temporary = lambda step: step.memory_analysis().temp_size_in_bytes
    assert temporary(full) - temporary(frozen) > 0.5 * num_bytes  # the gradients
    adapters = digits_step(InitConfig(lora=4))
    assert arguments(adapters) < 1.2 * num_bytes
