"""A mixture of experts: no token is lost, whatever the router does; exact against a loop, on any cut."""

# B batch, T time, D embed, E experts, F mlp

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from spmd.models.moe import Experts
from spmd.models.moe.dispatch import apply_experts
from spmd.models.moe.grouped import grouped_matmul
from spmd.models.moe.router import choose_experts, sequence_balance
from spmd.models.transformer import Transformer
from spmd.parallel import mesh, scope, sharding
from spmd.parallel.mesh import MeshConfig
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("devices")
B, T, D, E, F, K = 8, 4, 6, 8, 10, 2
ROUTERS = ("even", "one device", "one expert", "random")


def routed(kind, rng):
    """Experts [B, T, k], each token's apart, and shares."""
    order = rng.random((B, T, E)).argsort(-1)
    if kind == "even":
        order = (np.arange(B * T).reshape(B, T, 1) * K + np.arange(E)) % E
    elif kind == "one device":  # all to two experts that lie together
        order = np.broadcast_to(np.arange(E) ^ rng.integers(E), (B, T, E))
    elif kind == "one expert":  # the first choice of all tokens
        order = np.where(order == 0, order[..., :1], order)
        order[..., 0] = 0
    return order[..., :K].astype(np.int32), rng.random((B, T, K))


def by_loop(x_BTD, choice_BTk, share_BTk, up, down, gate):
    silu = lambda x: x / (1 + np.exp(-x))
    out = np.zeros_like(x_BTD)
    for b, t, k in np.ndindex(choice_BTk.shape):
        e, x = choice_BTk[b, t, k], x_BTD[b, t]
        out[b, t] += share_BTk[b, t, k] * (silu(x @ gate[e]) * (x @ up[e])) @ down[e]
    return out


@functools.cache
def compiled(sizes):
    """(output, gradients of x, shares and kernels) on a mesh; None: on no mesh."""
    placement = {}
    if sizes:
        number = int(np.prod([size for _, size in sizes]))
        cut = mesh.make(MeshConfig(**{"data": 1} | dict(sizes)), jax.devices()[:number])
        placement = sharding.placement(cut)

    def loss(x, share, kernels, choice, w):
        y = apply_experts(x, choice, share, *kernels)
        return (y * w).sum(), y

    @jax.jit
    def run(*args):
        with scope.bind(**placement):
            (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*args)
        return y, grads

    return run


CUTS = {
    "one": (),
    "expert2": (("expert", 2),),
    "expert4": (("expert", 4),),
    "expert8": (("expert", 8),),
    "expert4_context2": (("context", 2), ("expert", 4)),
    "expert2_tensor2": (("expert", 2), ("tensor", 2)),
}


@pytest.mark.parametrize("name", slow_but(("one",), CUTS, gate=("expert2_tensor2",)))
@hypothesis.given(kind=st.sampled_from(ROUTERS), seed=st.integers(0, 2**31))
@hypothesis.settings(max_examples=12, deadline=None)
def test_no_token_is_lost(name, kind, seed):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(2, B, T, D))
    choice, share = routed(kind, rng)
    kernels = tuple(rng.normal(size=shape) for shape in ((E, D, F), (E, F, D), (E, D, F)))
    with jax.enable_x64(True):
        y, grads = compiled(CUTS[name])(x, share, kernels, choice, w)
        _, want = compiled(())(x, share, kernels, choice, w)
    np.testing.assert_allclose(y, by_loop(x, choice, share, *kernels), rtol=1e-10, atol=1e-12)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_are_those_of_finite_differences():
    """Of grouped_matmul, whose backward pass is written by hand."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(rng.normal(size=(7, 3))), jnp.asarray(rng.normal(size=(3, 3, 2)))
        run = lambda x, kernel: grouped_matmul(x, kernel, jnp.array([2, 0, 4], jnp.int32))
        check_grads(run, (x, kernel), order=1, modes=["rev"])
        np.testing.assert_array_equal(run(x, kernel)[6], 0)
        np.testing.assert_allclose(run(x, kernel)[2], x[2] @ kernel[2])


def test_the_router():
    scores = jnp.array([[[0.1, 0.4, 0.3, 0.2]]])
    choice, share = choose_experts(scores, 2)
    assert choice.tolist() == [[[1, 2]]]
    np.testing.assert_allclose(share, [[[4 / 7, 3 / 7]]], rtol=1e-6)
    # An offset moves the choice, and the shares of what is chosen stay those of the scores.
    choice, share = choose_experts(scores, 2, jnp.array([0.0, 0.0, 0.0, 0.3]))
    assert choice.tolist() == [[[3, 1]]]
    np.testing.assert_allclose(share, [[[1 / 3, 2 / 3]]], rtol=1e-6)


def test_the_balance_loss_is_of_each_sequence_and_knows_no_padding():
    rng = np.random.default_rng(0)
    scores = jax.nn.softmax(jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32))
    choice, _ = choose_experts(scores, 2)
    segments = jnp.asarray([[1] * 4 + [0] * 2, [1] * 6], jnp.int32)
    balance, counts = sequence_balance(scores, choice, segments)
    unpadded, _ = sequence_balance(scores[:1, :4], choice[:1, :4], None)
    np.testing.assert_allclose(balance[0], unpadded[0], rtol=1e-6)
    assert counts.sum(1).tolist() == [8, 12]
    choice = jnp.arange(8).reshape(1, 4, 2) % 4
    even, _ = sequence_balance(jnp.full((1, 4, 4), 0.25), choice, None)
    np.testing.assert_allclose(even, 1, rtol=1e-6)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"num": 4, "top_k": 5}, "model.experts.top_k=5 must be from 1 to model.experts.num=4"),
        ({"num": -1}, "model.experts.num=-1 must not be negative"),
        ({"shared": 1}, "model.experts.shared=1 needs experts to stand beside"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(ValueError, match=message):
        Experts(**fields)


def test_experts_have_no_biases():
    with pytest.raises(ValueError, match="experts have no biases"):
        Transformer(vocab=8, length=8, bias=True, experts=Experts(num=4))
