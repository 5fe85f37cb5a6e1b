"""Closed forms: what a person would count by hand."""

# B batch, T time, D embed, H heads, K head_dim, F mlp, L layers, V vocab

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import spmd
from spmd.hardware import flops
from spmd.models.transformer import Transformer
from spmd.tasks import Classification, LanguageModel

f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def total(function, *shapes):
    return flops.count_call(function, *map(f32, shapes)).total()


def test_the_step_of_an_mlp():
    program = spmd.load("digits", ["--data.batch-size", "32"]).build(jax.devices()[:1])
    counted = flops.count_step(program.task, program.abstract_batch())
    products = 64 * 256 + 256 * 128 + 128 * 10
    assert counted == {"float32": 3 * 2 * 32 * products}


def test_it_is_the_same_under_the_strategy_that_runs_it():
    """Three times the forward pass, against the jaxpr of the real step: only the first layer's input
    needs no gradient.
    """
    program = spmd.load("digits", []).build(jax.devices()[:1])
    batch = program.abstract_batch()
    step = flops.count_call(program.strategy.step, program.abstract_state(), batch).total()
    assert flops.count_step(program.task, batch).total() - step == 2 * 64 * 64 * 256


class Net(nnx.Module):
    """Two convolutions, one of them grouped, and a classifier."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), feature_group_count=4, padding="VALID", rngs=rngs)
        self.last = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.second(self.first(x)).mean((1, 2)))


def test_the_step_of_a_cnn():
    batch = {
        "image": f32((4, 16, 16, 3)),
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
        "weight": f32((4,)),
        "example_id": jax.ShapeDtypeStruct((4,), jnp.int32),
    }
    counted = flops.count_step(Classification().build(Net), batch)
    forward = 4 * (8 * 8 * 8 * 9 * 3 + 6 * 6 * 16 * 9 * (8 // 4) + 16 * 10)
    assert counted == {"float32": 3 * 2 * forward}


def test_batch_dims_of_attention():
    def scores(q_BTHK, k_BTHK):
        return jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK)

    assert total(scores, (2, 16, 4, 8), (2, 16, 4, 8)) == 2 * 2 * 4 * 16 * 16 * 8


@pytest.mark.parametrize("remat", [False, True])
def test_a_scanned_stack_counts_each_layer_once(remat):
    def stack(x_BD, w_LDF, v_LFD):
        def block(x, layer):
            w, v = layer
            return x + jax.nn.relu(x @ w) @ v, None

        return jax.lax.scan(jax.checkpoint(block) if remat else block, x_BD, (w_LDF, v_LFD))[0]

    assert total(stack, (4, 8), (6, 8, 32), (6, 32, 8)) == 6 * 2 * (2 * 4 * 8 * 32)


@pytest.mark.parametrize(
    "form", [{}, {"scan": False}, {"remat": "full"}, {"remat": "dots", "scan": False}]
)
@pytest.mark.parametrize("chunks", [1, 4])
def test_a_language_model_in_any_form(form, chunks):
    """6 N B T, N without the embedding that is looked up, and 12 L B H K T^2; remat counts once."""
    B, T, V, L, D, F = 2, 16, 64, 3, 32, 48
    model = Transformer(vocab=V, length=T, layers=L, embed=D, heads=4, kv_heads=2, mlp=F, **form)
    token = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = {"tokens": token, "targets": token, "segments": token, "positions": token}
    batch |= {"example_id": jax.ShapeDtypeStruct((B,), jnp.int32), "weight": f32((B,))}
    products = L * (2 * D * D + 2 * D * D // 2 + 3 * D * F) + D * V
    counted = flops.count_step(LanguageModel(chunks=chunks).build(model), batch)
    assert counted == {"float32": 6 * B * T * products + 12 * L * B * D * T * T}


def test_a_transposed_convolution_skips_the_zeros_between():
    def up(x, w):
        return jax.lax.conv_transpose(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    # each input pixel meets each tap once
    assert total(up, (2, 8, 8, 3), (4, 4, 3, 5)) == 2 * 2 * 8 * 8 * 3 * 5 * 16


def test_calls_branches_and_loops():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    one = 2 * 8**3
    square = ((8, 8), (8, 8))
    assert total(jax.jit(product), *square) == one
    assert (
        total(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x), *square)
        == 2 * one
    )
    assert total(lambda x, w: jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x), *square) == 5 * one
    assert total(lambda x, w: x + w, *square) == 0


def test_ragged_products_of_experts():
    def experts(x, w, sizes):
        return jax.lax.ragged_dot(x, w, sizes)

    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    assert (
        flops.count_call(experts, f32((32, 8)), f32((4, 8, 16)), sizes).total() == 2 * 32 * 8 * 16
    )


def test_what_each_device_does_is_summed(devices):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    split = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    assert total(split, (64, 8), (8, 4)) == 2 * 64 * 8 * 4


def test_dtypes_are_kept_apart():
    def mixed(x, w):
        return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32) @ w

    assert flops.count_call(mixed, f32((4, 8)), f32((8, 8))) == {"bfloat16": 512, "float32": 512}
