"""Checkpoints: what is saved comes back bit by bit, on any mesh; another model's is refused."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig
from spmd.train import CheckpointConfig
from spmd.train.checkpoint.store import Checkpoints


def state_on(config: MeshConfig, num_devices: int, value: float = 1.0):
    cut = mesh.make(config, jax.devices()[:num_devices])
    shardings = {
        "w": NamedSharding(cut, P("fsdp", "data")),
        "step": NamedSharding(cut, P()),
        "layers": [{"b": NamedSharding(cut, P())}],
    }
    state = {
        "w": jnp.arange(64, dtype=jnp.float32).reshape(8, 8) * value,
        "step": jnp.asarray(3, jnp.int32),
        "layers": [{"b": jnp.full(5, value, jnp.bfloat16)}],
    }
    return jax.device_put(state, shardings), shardings


def shapes(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(epath.Path(tmp_path / "checkpoints"), CheckpointConfig(keep=2))
    yield made
    made.close()


def test_restores_bit_by_bit_onto_another_mesh(checkpoints):
    state, _ = state_on(MeshConfig(data=2, fsdp=4), 8, 0.1)
    want = jax.tree.map(np.array, state)
    checkpoints.save(state, 3, {}, {"data": {"step": 3}})
    checkpoints.wait()
    like, shardings = state_on(MeshConfig(data=1, fsdp=2), 2)
    got = checkpoints.restore(shapes(like), shardings)
    assert got["w"].sharding == shardings["w"]
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_donated_state_does_not_reach_the_file(checkpoints):
    """The step that follows an asynchronous save overwrites the buffers that are being saved."""
    state, shardings = state_on(MeshConfig(fsdp=2), 4)
    state["w"] = jax.device_put(jnp.ones((2048, 1024), jnp.float32), shardings["w"])
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpoints.save(state, 1, {}, {})
    for _ in range(5):
        state = spoil(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    got = checkpoints.restore(shapes(state), shardings)
    np.testing.assert_array_equal(got["w"], 1)


def test_keeps_the_newest_and_the_best(checkpoints):
    state, _ = state_on(MeshConfig(), 1)
    for step, accuracy in enumerate([0.1, 0.9, 0.2, 0.3, 0.4], start=1):
        checkpoints.save(state, step, {"eval/accuracy": accuracy}, {})
    checkpoints.save(state, 6, {}, {})  # without an evaluation: never the best
    checkpoints.wait()
    assert checkpoints.steps() == [2, 5, 6]


def test_another_model_is_refused_with_a_diff(checkpoints):
    state, shardings = state_on(MeshConfig(), 1)
    checkpoints.save(state, 1, {}, {})
    checkpoints.wait()
    like = shapes(state)
    like["w"] = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    like["layers"][0] = {"c": like["layers"][0]["b"]}
    shardings["layers"][0] = {"c": shardings["layers"][0]["b"]}
    with pytest.raises(ValueError, match="another model") as error:
        checkpoints.restore(like, shardings)
    text = str(error.value)
    assert "w: float32[8, 8] in the checkpoint, float32[8, 4] in the model" in text
    assert "layers.0.b: bfloat16[5] in the checkpoint, absent in the model" in text


def test_another_dtype_is_refused_and_not_cast(checkpoints):
    state, shardings = state_on(MeshConfig(), 1)
    checkpoints.save(state, 1, {}, {})
    checkpoints.wait()
    like = shapes(state)
    like["w"] = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16\[8, 8\] in the model"):
        checkpoints.restore(like, shardings)


def test_narrow_moments_of_an_older_version_go_on_in_float32(checkpoints, capsys):
    cut = mesh.make(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    place = {"params": NamedSharding(cut, P("fsdp")), "opt_state": NamedSharding(cut, P("fsdp"))}
    values = jnp.linspace(-1, 1, 8).astype(jnp.bfloat16)
    state = {name: {"w": jax.device_put(values, at)} for name, at in place.items()}
    checkpoints.save(state, 1, {}, {})
    checkpoints.wait()
    like = shapes(state)
    like["opt_state"] = {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}
    shardings = {name: {"w": at} for name, at in place.items()}
    got = checkpoints.restore(like, shardings)
    assert got["opt_state"]["w"].dtype == jnp.float32 and got["params"]["w"].dtype == jnp.bfloat16
    assert got["opt_state"]["w"].sharding == place["opt_state"]
    np.testing.assert_array_equal(got["opt_state"]["w"], np.asarray(values, np.float32))
    assert "1 arrays of optimizer state" in capsys.readouterr().out
    like["params"] = {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}
    with pytest.raises(ValueError, match=r"params.w: bfloat16\[8\] in the checkpoint, float32"):
        checkpoints.restore(like, shardings)


def test_missing_checkpoints_say_what_there_is(checkpoints):
    state, shardings = state_on(MeshConfig(), 1)
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoints.restore(shapes(state), shardings)
    checkpoints.save(state, 4, {}, {})
    checkpoints.wait()
    with pytest.raises(ValueError, match=r"no checkpoint of step 7.*there are: 4"):
        checkpoints.restore(shapes(state), shardings, 7)


def test_data_position_and_configuration_travel_along(checkpoints, tmp_path):
    state, _ = state_on(MeshConfig(), 1)
    checkpoints.save(state, 4, {}, {"data": {"step": 4, "examples": 512}, "config": {"seed": 0}})
    checkpoints.wait()
    files = [
        p.read_text() for p in (tmp_path / "checkpoints" / "4").rglob("*METADATA*") if p.is_file()
    ]
    assert any(
        json.loads(t).get("custom_metadata", {}).get("data") == {"step": 4, "examples": 512}
        for t in files
    )
