"""Attention over a sequence cut over devices equals that of one device, its gradients too."""

from __future__ import annotations

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd.hardware import hlo
from spmd.models.attention import Mask, attend
from spmd.parallel import mesh, scope, sharding
from spmd.parallel.mesh import MeshConfig
from tests import masks
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


def causal(segments):
    return Mask(query_segments_BT=segments, key_segments_BS=segments)


@functools.cache
def compiled(context, sizes):
    """(output, gradients) on a mesh; sizes: of its axes."""
    number = int(np.prod([size for _, size in sizes]))
    cut = mesh.make(MeshConfig(**{"data": 1} | dict(sizes)), jax.devices()[:number])

    def loss(qkv, w, segments):
        y = attend(*qkv, causal(segments), context=context)
        return (y * w).sum(), y

    # Much work between two exchanges, which XLA's devices wait for 40 s at most: optimised here.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
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


@pytest.mark.parametrize("name", slow_but(("ring2_fsdp2_tensor2",), CUTS, gate=("ulysses2_data2",)))
@hypothesis.given(seed=st.integers(0, 2**31))
@hypothesis.settings(max_examples=6, deadline=None)
def test_equals_one_device(name, seed):
    with jax.enable_x64(True):
        q, k, v, w, segments = inputs(np.random.default_rng(seed), 4, 32)
        want = compiled(*ONE)((q, k, v), w, segments)
        got = compiled(*CUTS[name])((q, k, v), w, segments)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


# What a ring refuses, and why.
REFUSED = {
    "causal_bias": "model.context=ring cannot compute a bias; model.context=ulysses can",
    "causal_apart": "cannot compute separate segments of keys; model.context=ulysses",
    "full_bias": "ring with a full mask cannot compute a bias; model.context=ulysses",
    "full_softcap_bias": "ring with a full mask cannot compute a bias; model.context=ulysses",
    "window": "ring cannot compute a window on both sides; model.context=ulysses can: use --model",
    "window_alone": "cannot compute a window on both sides",
    "prefix": "cannot compute a prefix mask",
    "prefix_alone": "cannot compute a prefix mask",
    "cross_window": "cannot compute a window on both sides and cross-attention",
    "cross_causal": "cannot compute cross-attention",
}
LAYERS = [(cut, case) for cut in ("ring2", "ring4", "ulysses2") for case in masks.CASES]
QUICK = (
    *(("ring2", case) for case in REFUSED),
    ("ring4", "full_packed"),
    ("ring2", "window_left"),
    ("ring2", "cross_padded"),
    ("ulysses2", "full_bias"),
)


@pytest.mark.parametrize(
    "cut,case", slow_but(QUICK, LAYERS, gate=(("ulysses2", "prefix"), ("ring2", "causal_packed")))
)
def test_every_mask_equals_one_device(cut, case):
    context, sizes = CUTS[cut]
    number = int(np.prod([size for _, size in sizes]))
    placed = sharding.placement(
        mesh.make(MeshConfig(**{"data": 1} | dict(sizes)), jax.devices()[:number])
    )

    @functools.partial(jax.jit, static_argnums=1)
    def run(arrays, sharded):
        qkv, w, fields = arrays
        joint = given.mask.get("query_segments_BT") is given.mask.get("key_segments_BS")
        if joint and "query_segments_BT" in fields:
            fields = fields | {"key_segments_BS": fields["query_segments_BT"]}
        seen = Mask(**{k: v for k, v in given.mask.items() if k not in fields} | fields)

        def loss(qkv):
            y = attend(*qkv, seen, **given.options, context=context)
            return (y * w).sum(), y

        with scope.bind(**placed if sharded else {}):
            (_, y), grads = jax.value_and_grad(loss, has_aux=True)(qkv)
        return y, *grads

    with jax.enable_x64(True):
        given = masks.inputs_of(case, time=32)
        fields = {k: v for k, v in given.mask.items() if isinstance(v, np.ndarray)}
        arrays = given.qkv, given.w, fields
        if context == "ring" and case in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[case]):
                run(arrays, True)
            return
        for a, b in zip(run(arrays, True), run(arrays, False), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def shapes(text):
    return [[int(n) for n in dims.split(",")] for dims in re.findall(r"[a-z]\d+\[([\d,]+)\]", text)]


@pytest.mark.gate
@pytest.mark.parametrize("time", slow_but((8192,), (8192, 32768)))
def test_no_scores_of_all_tokens_and_the_bytes_of_the_closed_form(time):
    num, (heads, kv_heads), head_dim = 8, HEADS, 8
    q, k = (jax.ShapeDtypeStruct((1, time, n, head_dim), np.float32) for n in HEADS)
    segments = jax.ShapeDtypeStruct((1, time), np.int32)
    made = compiled("ring", (("context", num),)).lower((q, k, k), q, segments).compile()
    text = made.as_text()
    assert max(np.prod(shape) for shape in shapes(text)) < time**2 / num
    assert not any(shape.count(time) > 1 for shape in shapes(text))
    axes = dict.fromkeys(mesh.AXES, 1) | {"context": num}
    total = hlo.ledger(hlo.read(text, axes))[("context",), "collective-permute"]
    of_q, of_k = (4 * time // num * n * head_dim for n in (heads, kv_heads))
    # One turn of keys and values less than 2 (n - 1) + n: forward and backward begin alike, and without
    # layers between them the compiler makes that one.
    wanted = 2 * (3 * num - 3) * of_k + 4 * of_k + 4 * of_q
    wanted += (2 * num - 2) * 4 * time // num  # segments
    assert total.bytes == wanted


def by_blocks(qkv, w, segments, num=16):
    """(output, gradients) of one head on one device, by blocks of queries: it never holds [T, T]."""

    def loss(qkv):
        q_TK, k_TK, v_TK = (x[0, :, 0] for x in qkv)

        def block(q_QK, place_Q, segment_Q):
            seen = place_Q[:, None] >= np.arange(len(k_TK))[None]
            seen &= segment_Q[:, None] == segments
            scores = q_QK @ k_TK.T * k_TK.shape[1] ** -0.5
            return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)) @ v_TK

        cut = lambda x: x.reshape(num, -1, *x.shape[1:])
        parts = cut(q_TK), cut(np.arange(len(k_TK))), cut(segments[0])
        y = jax.lax.map(jax.checkpoint(lambda part: block(*part)), parts).reshape(w.shape)
        return (y * w).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
    return y, *grads


@pytest.mark.slow
@pytest.mark.parametrize("time", [8192, 32768])
def test_long_sequences_equal_one_device_in_float32(time):
    rng = np.random.default_rng(0)
    q, k, v, w, _ = inputs(rng, 1, time, heads=(1, 1), dtype=np.float32)
    segments = (np.arange(time).reshape(1, -1) // 3000 + 1).astype(np.int32)
    want = by_blocks((q, k, v), w, segments)
    got = compiled("ring", (("context", 8),))((q, k, v), w, segments)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "context,sizes,time,message",
    [
        (
            "ring",
            (("context", 4),),
            12,
            "its 12 tokens; use a length that is a multiple of 8",
        ),
        (
            "ulysses",
            (("context", 4),),
            16,
            "2 key and value heads do not divide by mesh.context=4",
        ),
        (
            "ulysses",
            (("context", 2), ("tensor", 2)),
            16,
            "mesh.context may be 1, or use --model.context",
        ),
    ],
)
def test_mistakes(context, sizes, time, message):
    q, k = (jax.ShapeDtypeStruct((2, time, n, 8), np.float32) for n in HEADS)
    segments = jax.ShapeDtypeStruct((2, time), np.int32)
    with pytest.raises(ValueError, match=message):
        compiled(context, sizes).lower((q, k, k), q, segments)


def test_a_ring_has_its_own_kernel():
    q, k, v, _, segments = inputs(np.random.default_rng(0), 2, 16)
    cut = mesh.make(MeshConfig(data=1, context=2), jax.devices()[:2])
    with scope.bind(**sharding.placement(cut)), pytest.raises(ValueError, match="context ulysses"):
        attend(q, k, v, causal(segments), implementation="cudnn")


def test_the_one_device_result_is_of_the_plain_form():
    """The reference above must be no ring."""
    with jax.enable_x64(True):
        q, k, v, w, segments = inputs(np.random.default_rng(0), 2, 16)
        want = attend(q, k, v, causal(segments))
        text = compiled(*ONE).lower((q, k, v), w, segments).as_text()
        ring = compiled(*CUTS["ring4"]).lower((q, k, v), w, segments).as_text()
        np.testing.assert_allclose(compiled(*ONE)((q, k, v), w, segments)[0], want, rtol=1e-12)
    assert "collective_permute" in ring and "collective_permute" not in text
