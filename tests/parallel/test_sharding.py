"""Where every array lies: parameters by rules and size, optimizer state leaf by leaf."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from spmd import optim, tasks
from spmd.core import tree
from spmd.models.mlp import MLP
from spmd.parallel import mesh, sharding
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import Auto, base


def cut(**sizes):
    return mesh.make(
        MeshConfig(**{"data": 1} | sizes), jax.devices()[: int(np.prod(list(sizes.values())))]
    )


def spec(shape, dims, **sizes):
    return sharding.spec_of("w", shape, dims, cut(**sizes), fsdp=True)


def test_fsdp_takes_the_largest_free_dim_that_divides():
    assert spec((64, 256), None, fsdp=4) == P(None, "fsdp")
    assert spec((256, 62), ("embed", "mlp"), fsdp=4) == P("fsdp", None)
    assert spec((63, 61), None, fsdp=4) == P(None, None)
    assert spec((64, 256), ("embed", "mlp"), fsdp=2, tensor=2) == P("fsdp", "tensor")
    assert spec((8, 64, 32), ("layers", "embed", "embed"), fsdp=2) == P(None, "fsdp", None)
    assert spec((16,), ("embed",), fsdp=4) == P(None)  # too small to be worth a gather


@pytest.mark.parametrize(
    "shape,dims,message",
    [
        ((64, 64), ("mlp", "heads"), "both want mesh axis 'tensor'"),
        ((63, 64), ("mlp", "embed"), "does not divide by mesh.tensor=2"),
        ((64, 64), ("mpl", "embed"), "Did you mean 'mlp'"),
        ((64, 64), ("mlp",), "1 logical dims"),
    ],
)
def test_rules_that_cannot_be_met_are_errors(shape, dims, message):
    with pytest.raises(ValueError, match=message):
        spec(shape, dims, tensor=2)


OPTIMIZERS = {
    "sgd": optim.SGD(),
    "plain_sgd": optim.SGD(momentum=0.0),
    "adamw": optim.AdamW(clip_norm=1.0),
    "lion": optim.Lion(weight_decay=0.1),
    "muon": optim.Muon(),
    "adafactor": optim.Adafactor(momentum=0.9),  # too small to be factored: see below
}


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_leaf_by_leaf(name, zero):
    config = OPTIMIZERS[name]
    task = tasks.Classification().build(MLP(inputs=64, hidden=(64, 32)))
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    batch = {"image": jax.ShapeDtypeStruct((8, 64), jnp.float32)}
    parts = base.Parts(
        task=task,
        tx=config.transformation(10, optim.decay_mask(params, task.dims), task.dims),
        rate=config.rate(10),
        mesh=cut(fsdp=4),
        batch=batch,
    )
    built = Auto(zero=zero).build(parts)
    state = built.init(jax.random.key(0))
    cut_kernel = P("fsdp", None)
    want_params = cut_kernel if zero == 3 else P(None, None)
    assert state.params["layers"][0]["kernel"].sharding.spec == want_params
    moments = {"layers/0/kernel": 0, "layers/1/kernel": 0}
    for path, leaf in tree.named_leaves(state.opt_state).items():
        assert leaf.sharding == tree.named_leaves(built.state_shardings.opt_state)[path]
        kernel = "/".join(path.split("/")[-3:])
        if kernel in moments and leaf.ndim == 2:
            moments[kernel] += 1
            assert leaf.sharding.spec == cut_kernel, path
            assert leaf.addressable_shards[0].data.size == leaf.size // 4
        elif leaf.ndim < 2:  # counts, biases (too small to be cut), optax's placeholders
            assert leaf.sharding.is_fully_replicated, path
    first, hidden = {
        "sgd": (1, 1),
        "plain_sgd": (0, 0),
        "adamw": (2, 2),
        "lion": (1, 1),
        "muon": (2, 1),  # the first layer has AdamW's two moments
        "adafactor": (2, 2),
    }[name]
    assert list(moments.values()) == [first, hidden]


@pytest.mark.parametrize(
    "shape,rows,columns",
    [
        ((128, 256), P("fsdp"), P("tensor")),
        ((256, 128), P("tensor"), P("fsdp")),  # rows: what is left without the largest dim
        ((128, 128), P("fsdp"), P("tensor")),
        ((3, 128, 128), P(None, "fsdp"), P(None, "tensor")),
    ],
)
def test_factored_moments_drop_the_reduced_dim(shape, rows, columns):
    params = {"w": jnp.ones(shape), "b": jnp.ones(4)}
    tx = optim.Adafactor(min_dim_factored=64).transformation(10, {"w": True, "b": False})
    mesh_ = cut(fsdp=2, tensor=2)
    dims = {"w": ("layers", "embed", "mlp")[-len(shape) :], "b": None}
    placed = sharding.param_shardings(params, dims, mesh_, fsdp=True)
    gradient = {
        "w": np.random.default_rng(0).normal(size=shape).astype(np.float32),
        "b": jnp.ones(4),
    }
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(tx.update)(gradient, tx.init(params), params)[1]
    specs = tree.named_leaves(sharding.opt_shardings(tx, state, params, placed, mesh_))
    for name, leaf in tree.named_leaves(state).items():
        want = {"v_row/w": rows, "v_col/w": columns}.get("/".join(name.split("/")[-2:]))
        assert specs[name].spec in ([want] if want else [P(), P(None)]), name
        if want:  # the dim that is missing is the one that optax has reduced
            axis = want[-1]
            (reduced,) = [i for i, a in enumerate(placed["w"].spec) if a and a != axis]
            np.testing.assert_allclose(leaf, np.square(gradient["w"]).mean(reduced), rtol=1e-5)


def test_a_model_without_dims_is_cut_by_size():
    class Plain(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.a = nnx.Linear(64, 128, rngs=rngs)

        def __call__(self, x):
            return self.a(x)

    task = tasks.Classification().build(Plain)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    placed = sharding.param_shardings(params, task.dims, cut(fsdp=8), fsdp=True)
    assert placed["a"]["kernel"].spec == P(None, "fsdp")
    assert placed["a"]["bias"].spec == P(None)
