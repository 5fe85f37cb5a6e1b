"""Attention over a sequence cut over devices equals that of one device, its gradients too."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from spmd import mesh, scope, sharding
from spmd.mesh import MeshConfig
from spmd.models.attention import attend
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("devices")
HEADS = (4, 2)


def inputs(rng, batch, time, heads=HEADS, head_dim=8, dtype=np.float64):
    """Queries, keys, values, the weights of a loss, and segments cut at random; 0 at the end is padding."""
    q, k, v, w = (
        rng.normal(size=(batch, time, n, head_dim)).astype(dtype)
        for n in (heads[0], *heads[1:] * 2, heads[0])
    )
    segments = (rng.random((batch, time)) < rng.random()).cumsum(1) + 1
    padding = np.arange(time) >= rng.integers(1, time + 1, (batch, 1))
    return q, k, v, w, np.where(padding, 0, segments).astype(np.int32)


@functools.cache
def compiled(context, sizes):
    """(output, gradients) on a mesh; sizes: of its axes."""
    number = int(np.prod([size for _, size in sizes]))
    cut = mesh.make(MeshConfig(**{"data": 1} | dict(sizes)), jax.devices()[:number])

    def loss(qkv, w, segments):
        y = attend(*qkv, segments, "xla", context)
        return (y * w).sum(), y

    @jax.jit
    def run(qkv, w, segments):
        with scope.bind(**sharding.placement(cut)):
            (_, y), grads = jax.value_and_grad(loss, has_aux=True)(qkv, w, segments)
        return y, *grads

    return run


ONE = ("ring", ())
CUTS = {
    "ring2": ("ring", (("context", 2),)),
    "ring4": ("ring", (("context", 4),)),
    "ring8": ("ring", (("context", 8),)),
    "ring2_fsdp2_tensor2": ("ring", (("fsdp", 2), ("context", 2), ("tensor", 2))),
    "ulysses2": ("ulysses", (("context", 2),)),
    "ulysses2_data2": ("ulysses", (("data", 2), ("context", 2))),
    "ulysses2_tensor1_fsdp4": ("ulysses", (("fsdp", 4), ("context", 2))),
}


@pytest.mark.parametrize("name", slow_but(("ring4", "ring2_fsdp2_tensor2", "ulysses2_data2"), CUTS))
@hypothesis.given(seed=st.integers(0, 2**31))
@hypothesis.settings(max_examples=6, deadline=None)
def test_equals_one_device(name, seed):
    with jax.enable_x64(True):
        q, k, v, w, segments = inputs(np.random.default_rng(seed), 4, 32)
        want = compiled(*ONE)((q, k, v), w, segments)
        got = compiled(*CUTS[name])((q, k, v), w, segments)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_the_one_device_result_is_of_the_plain_form():
    """The reference above must be no ring."""
    with jax.enable_x64(True):
        q, k, v, w, segments = inputs(np.random.default_rng(0), 2, 16)
        want = attend(q, k, v, segments, "xla")
        text = compiled(*ONE).lower((q, k, v), w, segments).as_text()
        ring = compiled(*CUTS["ring4"]).lower((q, k, v), w, segments).as_text()
        np.testing.assert_allclose(compiled(*ONE)((q, k, v), w, segments)[0], want, rtol=1e-12)
    assert "collective_permute" in ring and "collective_permute" not in text
