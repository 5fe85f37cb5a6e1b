"""Every mesh and every strategy computes what one device computes.

A new mesh axis or strategy joins LAYOUTS; it does not get a copy of this test.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from spmd import mesh, optim, tasks, tree
from spmd.mesh import MeshConfig
from spmd.models.cnn import CNN
from spmd.models.mlp import MLP
from spmd.strategies import AllReduce, Auto, base

STEPS = 50
BATCH = 32
MODELS = {
    "mlp": MLP(inputs=64, hidden=(64, 64), dropout=0.3),
    "cnn": CNN(features=(8, 16), dropout=0.3),  # batch norm: statistics over the global batch
}
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
    "psum1": (AllReduce(), MeshConfig(), 1),
    "psum2": (AllReduce(), MeshConfig(), 2),
    "psum4": (AllReduce(), MeshConfig(), 4),
    "psum2x4": (AllReduce(), MeshConfig(replica=2, data=4), 8),
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


def parts_for(model, cut, *, accumulate=1, dtype="float32", optimizer=None):
    optimizer = optimizer or optim.AdamW(learning_rate=3e-3, clip_norm=1.0, warmup_steps=3)
    task = tasks.Classification(label_smoothing=0.1).build(model, dtype)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    tx = optimizer.build(STEPS, optim.decay_mask(params, task.dims))
    abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch_at(0).items()}
    return base.Parts(
        task=task,
        tx=tx,
        rate=optimizer.rate(STEPS),
        mesh=cut,
        batch=abstract,
        accumulate=accumulate,
    )


def trajectory(model, strategy, config, num_devices, *, accumulate=1, dtype="float32", steps=STEPS):
    """Losses by step and the norm of every leaf of the final state."""
    cut = mesh.make(config, jax.devices()[:num_devices])
    built = strategy.build(parts_for(model, cut, accumulate=accumulate, dtype=dtype))
    state = built.init(jax.random.key(0))
    losses = []
    for step in range(steps):
        state, metrics = built.step(state, jax.device_put(batch_at(step), built.batch_shardings))
        losses.append(metrics["loss"])
        jax.block_until_ready(losses[-1])
    norms = {
        k: np.linalg.norm(np.asarray(v, np.float64)) for k, v in tree.named_leaves(state).items()
    }
    return np.array(losses), norms


_REFERENCE: dict[tuple, tuple] = {}


def reference(name, accumulate, dtype):
    key = (name, accumulate, dtype)
    if key not in _REFERENCE:
        _REFERENCE[key] = trajectory(
            MODELS[name], Auto(), MeshConfig(), 1, accumulate=accumulate, dtype=dtype
        )
    return _REFERENCE[key]


CASES = [
    ("mlp", 1, "float32"),
    ("cnn", 2, "float64"),
    pytest.param("mlp", 1, "float64", marks=pytest.mark.slow),
    pytest.param("cnn", 2, "float32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name,accumulate,dtype", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_device(layout, name, accumulate, dtype):
    with jax.enable_x64(dtype == "float64"):
        want_losses, want_norms = reference(name, accumulate, dtype)
        losses, norms = trajectory(
            MODELS[name], *LAYOUTS[layout], accumulate=accumulate, dtype=dtype
        )
    rtol = 1e-5 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(losses, want_losses, rtol=rtol)
    assert norms.keys() == want_norms.keys()
    for leaf, want in want_norms.items():
        np.testing.assert_allclose(norms[leaf], want, rtol=rtol, atol=rtol * 1e-2, err_msg=leaf)


def test_the_reference_learns_and_its_parts_matter():
    """Parity of nothing with nothing would pass too: weights, dropout and accumulation show."""
    losses, _ = reference("mlp", 1, "float32")
    assert losses[-5:].mean() < losses[:5].mean()
    no_dropout, _ = trajectory(MLP(inputs=64, hidden=(64, 64)), Auto(), MeshConfig(), 1, steps=2)
    assert abs(no_dropout[0] - losses[0]) > 1e-4


@pytest.mark.parametrize("strategy", [Auto(), AllReduce()])
def test_scanned_steps_equal_single_steps(strategy):
    cut = mesh.make(MeshConfig(), jax.devices()[:4])
    built = strategy.build(parts_for(MODELS["mlp"], cut))
    single = built.init(jax.random.key(0))
    for step in range(4):
        single, metrics = built.step(single, jax.device_put(batch_at(step), built.batch_shardings))
    many = base.scanned(built)
    stacked = jax.tree.map(lambda *x: np.stack(x), *[batch_at(step) for step in range(4)])
    together, metrics_S = many.step(
        built.init(jax.random.key(0)), jax.device_put(stacked, many.batch_shardings)
    )
    assert metrics_S["loss"].shape == (4,)
    np.testing.assert_allclose(metrics_S["loss"][-1], metrics["loss"], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_nonfinite_step_changes_nothing_but_the_step():
    cut = mesh.make(MeshConfig(), jax.devices()[:2])
    built = Auto().build(parts_for(MODELS["cnn"], cut))
    state = built.init(jax.random.key(0))
    before = jax.tree.map(np.array, state)
    bad = batch_at(0)
    bad["weight"] = np.full(BATCH, np.inf, np.float32)
    state, metrics = built.step(state, jax.device_put(bad, built.batch_shardings))
    assert metrics["finite"] == 0 and state.step == 1
    for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(
        jax.tree.leaves(before.model_state), jax.tree.leaves(state.model_state), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_allreduce_sums_gradients_by_an_explicit_psum():
    cut = mesh.make(MeshConfig(), jax.devices()[:4])
    built = AllReduce().build(parts_for(MODELS["mlp"], cut))
    state = jax.eval_shape(built.init, jax.random.key(0))
    text = built.step.lower(state, parts_for(MODELS["mlp"], cut).batch).as_text()
    assert "stablehlo.all_reduce" in text
    auto = Auto().build(parts_for(MODELS["mlp"], cut))
    assert (
        "stablehlo.all_reduce"
        not in auto.step.lower(state, parts_for(MODELS["mlp"], cut).batch).as_text()
    )
