"""Causal attention over packed documents: XLA, cuDNN or splash, rotary positions, a cache for decoding."""

# B batch, T time, S time of keys, H query heads, G key and value heads, R = H / G, K head_dim

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from spmd.core import tree
from spmd.core.fields import check
from spmd.models.layers import contract
from spmd.models.ring import ring, ulysses
from spmd.parallel import scope

Implementation = Literal["xla", "cudnn", "splash"]
Context = Literal["ring", "ulysses"]


class TokenPositions(NamedTuple):
    """Where the tokens stand. positions: [B, T]; segments: [B, T], None is one document for each row;
    rotary: (cosines, sines), each [B, T, 1, K / 2], None without rotary positions.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    rotary: tuple[jax.Array, jax.Array] | None


def rotary(positions_BT: jax.Array, head_dim: int, theta: float, dtype: Any) -> Any:
    """Cosines and sines of the angles position * theta^(-2i / K) (Su et al. 2021, arXiv 2104.09864)."""
    wide = tree.wide(dtype)
    rate_K = theta ** (-jnp.arange(0, head_dim, 2, dtype=wide) / head_dim)
    angle = positions_BT.astype(wide)[:, :, None, None] * rate_K.reshape(1, 1, 1, -1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHK: jax.Array, angles: Any) -> jax.Array:
    """Turns each pair (x[i], x[i + K/2]): halves of a head, as Llama's weights at Hugging Face lie."""
    cos, sin = angles
    a, b = jnp.split(x_BTHK.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


def attend(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    implementation: Implementation,
    context: Context = "ring",
) -> jax.Array:
    """Each token attends to itself and what stands before it in its document: [B, T, H, K].

    context: how, where devices share a sequence. Softmax in at least float32. ValueError where what is asked
    for cannot run: there is no silent fall back to a slower one.
    """
    if scope.cut("time"):
        return _attend_cut(q_BTHK, k_BTGK, v_BTGK, segments_BT, implementation, context)
    if implementation == "splash":
        return _splash(q_BTHK, k_BTGK, v_BTGK, segments_BT)
    same_BTS = None
    if segments_BT is not None:
        same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    if implementation == "xla":
        time = jnp.arange(q_BTHK.shape[1], dtype=jnp.int32)
        causal_BTS = time.reshape(1, 1, -1) <= time.reshape(1, -1, 1)
        return _attend_xla(
            q_BTHK, k_BTGK, v_BTGK, causal_BTS if same_BTS is None else causal_BTS & same_BTS
        )
    _check_cudnn(q_BTHK)
    mask = None if same_BTS is None else same_BTS[:, None]
    return jax.nn.dot_product_attention(
        q_BTHK, k_BTGK, v_BTGK, mask=mask, is_causal=True, implementation="cudnn"
    )


def _attend_cut(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    implementation: Implementation,
    context: Context,
) -> jax.Array:
    """Where each device has a part of the sequence."""
    if segments_BT is None:
        segments_BT = jnp.ones(q_BTHK.shape[:2], jnp.int32)
    if context == "ulysses":
        kernel = functools.partial(attend, implementation=implementation)
        return ulysses(q_BTHK, k_BTGK, v_BTGK, segments_BT, kernel)
    check(
        implementation == "xla",
        f"model.attention={implementation} takes whole sequences, and model.context=ring cuts them; use"
        " --model.context ulysses, or --model.attention xla",
    )
    return ring(q_BTHK, k_BTGK, v_BTGK, segments_BT)


def attend_cached(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Attention to the slots of a cache, slot s holding position s, up to the query's own position."""
    slots = jnp.arange(k_BSGK.shape[1], dtype=positions_BT.dtype)
    return _attend_xla(q_BTHK, k_BSGK, v_BSGK, slots.reshape(1, 1, -1) <= positions_BT[:, :, None])


def _attend_xla(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, seen_BTS: jax.Array
) -> jax.Array:
    """Softmax in at least float32 between products in the compute type, backward too.

    jax.nn.dot_product_attention, differentiated, multiplies float32 by bfloat16: a product in float32, which
    strict promotion refuses.
    """
    batch, time, _, head_dim = q_BTHK.shape
    q_BTGRK = q_BTHK.reshape(batch, time, k_BSGK.shape[2], -1, head_dim)  # R queries for each key
    wide = tree.wide(q_BTHK.dtype)
    scores = contract("btgrk,bsgk->bgrts", wide, q_BTGRK, k_BSGK) * head_dim**-0.5
    scores = jnp.where(seen_BTS[:, None, None], scores, jnp.finfo(wide).min)
    shares = jax.nn.softmax(scores).astype(q_BTHK.dtype)
    return contract("bgrts,bsgk->btgrk", q_BTHK.dtype, shares, v_BSGK).reshape(q_BTHK.shape)


def _check_cudnn(q_BTHK: jax.Array) -> None:
    platform, head_dim = scope.platform(), q_BTHK.shape[-1]
    instead = "use --model.attention xla"
    check(
        platform in ("gpu", "cuda"),
        f"model.attention=cudnn runs on NVIDIA GPUs, this run is on {platform}; {instead}",
    )
    check(
        q_BTHK.dtype in (jnp.bfloat16, jnp.float16),
        f"model.attention=cudnn computes in 16 bits, given {q_BTHK.dtype};"
        f" set --model.dtype bfloat16, or {instead}",
    )
    check(
        head_dim % 8 == 0 and head_dim <= 256,
        f"model.attention=cudnn takes a head dim that is a multiple of 8 and at most 256, given {head_dim};"
        f" change model.head_dim, or {instead}",
    )


def _splash(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array | None
) -> jax.Array:
    """The TPU's block-sparse flash kernel; one program for each block of batch and heads."""
    platform, (_, time, _, head_dim) = scope.platform(), q_BTHK.shape
    instead = "use --model.attention xla"
    check(
        platform == "tpu",
        f"model.attention=splash runs on TPUs, this run is on {platform}; {instead}",
    )
    check(
        time % 128 == 0,
        f"model.attention=splash takes sequences of a multiple of 128 tokens, given {time};"
        f" change the data's length, or {instead}",
    )
    if segments_BT is None:
        segments_BT = jnp.ones(q_BTHK.shape[:2], jnp.int32)
    row = ("batch", None, "heads", None)  # the kernel sees all of a sequence
    run = scope.blockwise(
        functools.partial(_splash_block, scale=head_dim**-0.5),
        (
            row,
            ("batch", None, "kv_heads", None),
            ("batch", None, "kv_heads", None),
            ("batch", None),
        ),
        row,
    )
    return run(q_BTHK, k_BTGK, v_BTGK, segments_BT)


def _splash_block(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array, scale: float
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, time, heads, _ = q_BTHK.shape
    block = next(size for size in (512, 256, 128) if time % size == 0)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((time, time))] * heads)
    splash = kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)

    def row(q_THK: jax.Array, k_TGK: jax.Array, v_TGK: jax.Array, segments_T: jax.Array):
        q_HTK, k_GTK, v_GTK = (x.swapaxes(0, 1) for x in (q_THK, k_TGK, v_TGK))
        segments = kernel.SegmentIds(q=segments_T, kv=segments_T)
        out_HTK: Any = splash(q_HTK * scale, k_GTK, v_GTK, segment_ids=segments)
        return out_HTK.swapaxes(0, 1)

    return jax.vmap(row)(q_BTHK, k_BTGK, v_BTGK, segments_BT)
