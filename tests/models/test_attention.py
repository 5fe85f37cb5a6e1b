"""Attention against its definition and JAX's own, and what is said where an implementation cannot run."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd.models.attention import Mask, attend
from spmd.models.attention.kernels import KERNELS
from spmd.parallel import scope
from tests import masks


def inputs(dtype=jnp.float32, head_dim=8):
    """Four query heads, two of keys and values; two documents and padding."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 12, heads, head_dim)), dtype) for heads in (4, 2, 2))
    segments = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], 4, axis=1), jnp.int32)
    return q, k, v, segments


def causal(segments):
    return Mask(query_segments_BT=segments, key_segments_BS=segments)


@pytest.mark.parametrize("case", masks.CASES)
def test_every_mask_is_that_of_its_definition(case):
    with jax.enable_x64(True):
        given = masks.inputs_of(case)
        attention = jax.jit(lambda qkv: attend(*qkv, Mask(**given.mask), **given.options))
        np.testing.assert_allclose(attention(given.qkv), masks.expected(given), 1e-6, 1e-12)
        # a query that sees no key has no gradient, which is finite all the same
        gradient = jax.grad(lambda qkv: (attention(qkv) * given.w).sum())(given.qkv)
        assert all(np.isfinite(x).all() for x in gradient)


@pytest.mark.parametrize("packed", [False, True])
def test_equals_dot_product_attention(packed):
    q, k, v, segments = inputs()
    mask = (segments[:, :, None] == segments[:, None, :])[:, None] if packed else None
    want = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)
    got = attend(q, k, v, causal(segments if packed else None))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_products_of_bfloat16_stay_in_it_backward_too():
    q, k, v, segments = inputs(jnp.bfloat16)
    loss = lambda *qkv: attend(*qkv, causal(segments)).astype(jnp.float32).sum()
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
    *qkv, segments = inputs(jnp.dtype(dtype), head_dim)
    with scope.bind(platform=platform), pytest.raises(ValueError, match=message):
        attend(*qkv, causal(segments), implementation=implementation)


def taken(kernel):
    """The cases that a kernel takes, and those that it refuses."""
    needs = {name: needs_of(case) for name, case in masks.CASES.items()}
    return {name: need <= KERNELS[kernel] for name, need in needs.items()}


def needs_of(case):
    apart = case.get("padded") in ("keys", "apart")
    words = {"softcap": "a soft cap", "bias": "a bias", "keys": "cross-attention"}
    needs = {f"a {case['kind']} mask"} | {word for name, word in words.items() if name in case}
    return needs | ({"separate segments of keys"} if apart else set())


@pytest.mark.parametrize("case", masks.CASES)
def test_cudnn_is_given_every_mask_that_it_takes(case, monkeypatch):
    """JAX computes by XLA what it is asked to compute by cuDNN."""
    ask = jax.nn.dot_product_attention
    by_xla = lambda *args, implementation, **options: ask(*args, **options, implementation="xla")
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    given = masks.inputs_of(case, dtype=jnp.bfloat16)
    run = lambda: attend(*given.qkv, Mask(**given.mask), **given.options, implementation="cudnn")
    with scope.bind(platform="gpu"), jax.numpy_dtype_promotion("standard"):
        if not taken("model.attention=cudnn")[case]:
            with pytest.raises(ValueError, match="=cudnn cannot compute a soft cap"):
                run()
            return
        got = np.asarray(run(), np.float64)
    exact = given._replace(qkv=tuple(np.asarray(x, np.float64) for x in given.qkv))
    np.testing.assert_allclose(got, masks.expected(exact), atol=0.03)


@pytest.mark.parametrize("case", masks.CASES)
def test_splash_computes_every_mask_that_it_takes(case, monkeypatch):
    """In Pallas' interpreter."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    make = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", make)
    length = 256 if "keys" in masks.CASES[case] else 128
    given = masks.inputs_of(
        case, batch=1, time=length, heads=(2, 2), head_dim=128, dtype=np.float32
    )
    run = lambda: attend(*given.qkv, Mask(**given.mask), **given.options, implementation="splash")
    with scope.bind(platform="tpu"), jax.numpy_dtype_promotion("standard"):
        if not taken("model.attention=splash")[case]:
            with pytest.raises(ValueError, match="=splash cannot compute"):
                run()
            return
        got = run()
    np.testing.assert_allclose(got, masks.expected(given), atol=2e-5)


@pytest.mark.parametrize(
    "implementation,case,message",
    [
        ("splash", "causal_bias", "compute a bias; .*attention=xla and .*=cudnn can: use"),
        ("splash", "prefix", "compute a prefix mask; model.attention=xla"),
        ("cudnn", "full_softcap_bias", "compute a soft cap; model.attention=xla can: use --model"),
    ],
)
def test_a_refusal_names_the_kernels_that_can(implementation, case, message):
    given = masks.inputs_of(case)
    with pytest.raises(ValueError, match=message):
        attend(*given.qkv, Mask(**given.mask), **given.options, implementation=implementation)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"kind": "local"}, "one of causal, full, window, prefix; given 'local'"),
        ({"kind": "window", "window": (-1, 0)}, "no negative sides"),
        ({"kind": "prefix"}, "given with a prefix mask and with no other; this one is prefix"),
    ],
)
def test_a_mask_that_is_none(fields, message):
    with pytest.raises(ValueError, match=message):
        Mask(**fields)
