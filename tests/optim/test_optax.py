"""Any optax transformation: what a run recognises it by, how its state is sharded, mistakes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spmd import optim
from spmd.core import tree
from spmd.optim.transformed import source_digest
from spmd.parallel import mesh, sharding
from spmd.parallel.mesh import MeshConfig


def test_is_the_transformation_of_its_schedule():
    params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    config = optim.Optax(
        build=lambda rate: optax.adabelief(rate), learning_rate=0.1, schedule="constant"
    )
    ours, theirs = config.transformation(5, {"w": True, "b": False}), optax.adabelief(0.1)
    with jax.numpy_dtype_promotion("standard"):
        got = ours.update(params, ours.init(params), params)[0]
        want = theirs.update(params, theirs.init(params), params)[0]
    for name in params:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6)


def make(b1):
    return lambda rate: optax.adam(rate, b1)


def test_a_function_is_recognised_by_its_source_and_constants():
    one = lambda rate: optax.sgd(rate)
    other = lambda rate: optax.sgd(
        rate  # another layout
    )
    assert source_digest(one) == source_digest(other)
    assert source_digest(one) != source_digest(lambda rate: optax.sgd(2 * rate))
    assert source_digest(make(0.8)) == source_digest(make(0.8)) != source_digest(make(0.9))
    partial = functools.partial(optax.adam, b1=0.8)
    assert source_digest(partial) == source_digest(functools.partial(optax.adam, b1=0.8))
    assert source_digest(partial) != source_digest(functools.partial(optax.adam, b1=0.9))
    with pytest.raises(ValueError, match="has no source"):
        source_digest(eval("lambda rate: rate"))


KINDS = {
    "lbfgs": lambda rate: optax.scale_by_lbfgs(memory_size=2),
    "sm3": lambda rate: optax.sm3(0.1),
    "adabelief": lambda rate: optax.adabelief(rate),
}


def shardings_of(build, sizes, num):
    tx = optim.Optax(build=build).transformation(5, {"w": True})
    params = {"w": jax.ShapeDtypeStruct((1024, 512), jnp.float32)}
    cut = mesh.make(sizes, jax.devices()[:num])
    placed = sharding.param_shardings(params, {"w": ("embed", "mlp")}, cut, fsdp=True)
    state = jax.eval_shape(tx.init, params)
    shardings = sharding.opt_shardings(tx, state, params, placed, cut)
    return tree.named_leaves(state), tree.named_leaves(shardings), placed["w"]


@pytest.mark.parametrize("kind", ["adabelief", "sm3"])
def test_state_is_sharded_as_the_parameters(devices, kind):
    """With optax's placeholders, and (sm3) by the names of the leaves."""
    state, placed, weight = shardings_of(KINDS[kind], MeshConfig(data=1, fsdp=4), 4)
    large = [name for name, leaf in state.items() if leaf.size == 1024 * 512]
    assert large and all(placed[name] == weight for name in large)


@pytest.mark.parametrize("build", [lambda rate: optax.flatten(optax.adam(rate)), KINDS["lbfgs"]])
def test_a_large_leaf_is_not_replicated_silently(devices, build):
    shardings_of(build, MeshConfig(), 4)  # parameters are replicated too
    for sizes in (MeshConfig(data=1, fsdp=4), MeshConfig(data=1, tensor=4)):
        with pytest.raises(ValueError, match=r"optimizer state .*float32\[.* MiB\).* would hold"):
            shardings_of(build, sizes, 4)


def test_mistakes():
    params = {"w": True}
    with pytest.raises(ValueError, match=r"weight decay 0\.1 has no effect on an Optax"):
        optim.Optax(build=optax.adam, weight_decay=0.1).transformation(5, params)
    with pytest.raises(ValueError, match=r"must return an optax\.GradientTransformation, not int"):
        optim.Optax(build=lambda rate: 3).transformation(5, params)
    with pytest.raises(ValueError, match="Optax takes a function"):
        optim.named("optax")
