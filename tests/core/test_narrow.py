"""Parameters below float32: rounding against numpy, types of sums and states, the layers' gradients."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import spmd
from spmd import tasks
from spmd.core import narrow
from spmd.models.cnn import CNN
from spmd.models.layers import Conv, Dense
from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig
from tests.command import final_state

pytestmark = pytest.mark.usefixtures("devices")
KEYS = 4096


def neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bfloat16 values on both sides of each float32, towards zero first, and the share of the other."""
    bits = x.view(np.uint32)
    low = bits & np.uint32(0xFFFF)
    inner = bits - low
    outer = inner + np.where(low > 0, np.uint32(0x10000), np.uint32(0))
    return inner.view(np.float32), outer.view(np.float32), low / 2**16


def test_rounding_is_unbiased_and_between_neighbours():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(200) * 10.0 ** rng.integers(-20, 20, 200)).astype(np.float32)
    x = np.concatenate([x, np.float32([1 + 2**-9, -1 - 2**-16, 255.99, -3e38, 2**-126 * 1.001])])
    keys = jax.random.split(jax.random.key(3), KEYS)
    round_all = jax.vmap(lambda key: narrow.stochastic_round(jnp.asarray(x), jnp.bfloat16, key))
    got = np.asarray(jax.jit(round_all)(keys).astype(jnp.float32))
    inner, outer, share = neighbours(x)
    assert ((got == inner) | (got == outer)).all()
    went_out = np.where(inner == outer, 0, got == outer).mean(0)
    deviation = np.sqrt(share * (1 - share) / KEYS)
    assert (np.abs(went_out - share) <= 5 * deviation + 1e-9).all()
    # The mean of all is x, where one rounding to the nearest is off by up to half a step.
    mean = got.astype(np.float64).mean(0)
    step = np.abs(outer.astype(np.float64) - inner)
    assert np.all(np.abs(mean - x) <= 5 * deviation * step + 1e-12 * np.abs(x))


def test_what_bfloat16_has_is_kept():
    exact = np.float32([0.0, -0.0, 1.0, -1.5, 2**-133, 3.3895314e38, np.inf, -np.inf, np.nan])
    got = narrow.stochastic_round(jnp.asarray(exact), jnp.bfloat16, jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(got.astype(jnp.float32)), exact)
    np.testing.assert_array_equal(np.signbit(got.astype(jnp.float32)), np.signbit(exact))
    with pytest.raises(
        ValueError, match=r"float16 cannot be updated: .* use --param-dtype bfloat16"
    ):
        narrow.stochastic_round(jnp.asarray(exact), jnp.float16, jax.random.key(0))


@pytest.mark.parametrize("spec", [P("data"), P("fsdp", "data"), P(None, ("data", "fsdp"))])
def test_random_bits_belong_to_elements_not_to_devices(spec):
    """However an array is cut; another leaf, step or replica draws others."""
    cut = mesh.make(MeshConfig(data=2, fsdp=4), jax.devices())
    new = {"a": jnp.linspace(1, 2, 64 * 16, dtype=jnp.float32).reshape(64, 16)}
    new["b"] = new["a"]
    like = jax.tree.map(lambda x: x.astype(jnp.bfloat16), new)
    run = jax.jit(lambda new, key, part: narrow.round_like(new, like, key, part))
    key = jax.random.key(1)
    want = run(new, key, 0)
    got = run(jax.device_put(new, NamedSharding(cut, spec)), key, 0)
    assert got["a"].dtype == jnp.bfloat16 and len(got["a"].devices()) == 8
    for name in new:
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(want[name]))
    differs = lambda a, b: (np.asarray(a) != np.asarray(b)).mean()
    for other in (want["b"], run(new, jax.random.key(2), 0)["a"], run(new, key, 1)["a"]):
        assert 0.1 < differs(want["a"], other) < 0.6


def test_float32_leaves_are_left_alone():
    params = {"w": jnp.ones((4, 4)), "n": jnp.int32(3)}
    text = str(jax.make_jaxpr(narrow.at_least_float32)(params).eqns)
    assert text == "[]" and not narrow.any_narrow(params)


@pytest.mark.parametrize("layer", ["dense", "conv"])
def test_gradients_of_narrow_products_are_summed_in_the_kernels_type(layer):
    """8,192 rows whose gradients a sum in bfloat16 would lose: each is a 4,096th of the first."""
    make = {
        "dense": lambda: Dense(nnx.Rngs(0), (1, 1), ("embed", "mlp"), dtype="bfloat16"),
        "conv": lambda: Conv(nnx.Rngs(0), 1, 1, 1, dtype="bfloat16"),
    }[layer]
    rows = np.full(8192, 2.0**-12, np.float32)
    rows[0] = 1
    x = rows.reshape(-1, 1) if layer == "dense" else rows.reshape(-1, 1, 1, 1)
    graph, params = nnx.split(make())

    def total(params):
        return nnx.merge(graph, params)(jnp.asarray(x)).astype(jnp.float32).sum()

    found = nnx.as_pure(jax.grad(total)(params))
    assert found["kernel"].dtype == jnp.float32
    assert float(found["kernel"].sum()) == pytest.approx(rows.sum(), rel=1e-6)
    if layer == "dense":
        assert float(found["bias"].sum()) == 8192


class Foreign(nnx.Module):
    """A model of a user, which has no field for its compute type."""

    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x.reshape(x.shape[0], -1))


def test_statistics_stay_wide_and_foreign_models_compute_in_float32():
    built = tasks.Classification().build(CNN(features=(4,)), "bfloat16")
    params, state = jax.eval_shape(built.init, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    built = tasks.Classification().build(Foreign, "bfloat16")
    params, state = built.init(jax.random.key(0))
    batch = {"image": jnp.linspace(0, 1, 128).reshape(2, 64)}
    assert params["layer"]["kernel"].dtype == jnp.bfloat16
    seen = built.predict(params, state, batch)
    wide = built.predict(narrow.at_least_float32(params), state, batch)
    assert seen.dtype == jnp.float32
    np.testing.assert_array_equal(seen, wide)


DIGITS = ("--param-dtype", "bfloat16", "--optimizer", "adamw", "--optimizer.learning-rate", "1e-4")


def digits(directory, *words):
    """(summary of the run's metrics) of digits with AdamW at 1e-4, whose steps the nearest bfloat16 loses."""
    words = [*DIGITS, "--run.dir", str(directory), *map(str, words)]
    return spmd.load("digits", words).train().metrics


@pytest.mark.gate
def test_a_stopped_run_goes_on_bit_by_bit(tmp_path):
    """The bits of a step come from its number: nothing of them is in the checkpoint."""
    words = ("--train.steps", 12, "--checkpoint.every", 4, "--checkpoint.keep", 9)
    words = (*words, "--optimizer.ema", 0.9, "--simulate", 1)
    first, then = tmp_path / "first", tmp_path / "then"
    digits(first, *words)
    shutil.copytree(first, then)
    (then / "summary.json").unlink()
    for later in (8, 12):
        shutil.rmtree(then / f"checkpoints/{later}")
    digits(then, *words)
    want, got = (final_state(d, *DIGITS, *map(str, words)) for d in (first, then))
    assert {str(want[k].dtype) for k in want if k.startswith("params")} == {"bfloat16"}
    for name, leaf in want.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)


@pytest.mark.gate
def test_digits_learn_as_in_float32(tmp_path):
    """Ten epochs; rounded to the nearest, the loss is at 2.2 then and stays there."""
    words = ("--train.epochs", 10, "--simulate", 1)
    narrow_loss = digits(tmp_path / "narrow", *words)["eval/loss"]
    wide_loss = digits(tmp_path / "wide", *words, "--param-dtype", "float32")["eval/loss"]
    assert wide_loss < 1.9
    assert narrow_loss == pytest.approx(wide_loss, rel=0.02)


@pytest.mark.slow
def test_digits_reach_their_accuracy(tmp_path):
    words = ("--train.epochs", 60, "--simulate", 1, "--seed")
    found = [digits(tmp_path / str(seed), *words, seed)["eval/accuracy"] for seed in range(3)]
    assert np.mean(found) >= 0.94, found
