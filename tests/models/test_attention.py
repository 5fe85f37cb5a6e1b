"""Attention against JAX's own, and what is said where an implementation cannot run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd.models.attention import attend
from spmd.parallel import scope


def inputs(dtype=jnp.float32, head_dim=8):
    """Four query heads, two of keys and values; two documents and padding."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 12, heads, head_dim)), dtype) for heads in (4, 2, 2))
    segments = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], 4, axis=1), jnp.int32)
    return q, k, v, segments


@pytest.mark.parametrize("packed", [False, True])
def test_equals_dot_product_attention(packed):
    q, k, v, segments = inputs()
    mask = (segments[:, :, None] == segments[:, None, :])[:, None] if packed else None
    want = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)
    got = attend(q, k, v, segments if packed else None, "xla")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_products_of_bfloat16_stay_in_it_backward_too():
    q, k, v, segments = inputs(jnp.bfloat16)
    loss = lambda *qkv: attend(*qkv, segments, "xla").astype(jnp.float32).sum()
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    products = [eqn for eqn in eqns(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(products) == 6
    assert {x.aval.dtype for eqn in products for x in eqn.invars} == {jnp.dtype("bfloat16")}
    softmax = [eqn for eqn in eqns(jaxpr.jaxpr) if eqn.primitive.name == "exp"]
    assert softmax and all(eqn.outvars[0].aval.dtype == jnp.float32 for eqn in softmax)


def eqns(jaxpr):
    """The equations, of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                yield from eqns(inner) if hasattr(inner, "eqns") else ()


@pytest.mark.parametrize(
    "implementation,platform,dtype,head_dim,message",
    [
        ("cudnn", "cpu", "bfloat16", 8, "runs on NVIDIA GPUs, this run is on cpu; use"),
        ("cudnn", "gpu", "float32", 8, "given float32; set --model.dtype bfloat16, or use"),
        ("cudnn", "gpu", "bfloat16", 12, "multiple of 8 and at most 256, given 12"),
        ("splash", "gpu", "bfloat16", 8, "runs on TPUs, this run is on gpu; use --model.attention"),
        ("splash", "tpu", "bfloat16", 8, "a multiple of 128 tokens, given 12"),
    ],
)
def test_asked_for_by_name_it_fails_loudly(implementation, platform, dtype, head_dim, message):
    with scope.bind(platform=platform), pytest.raises(ValueError, match=message):
        attend(*inputs(jnp.dtype(dtype), head_dim), implementation)
