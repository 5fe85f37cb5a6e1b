"""Splash attention, the TPU's block-sparse flash kernel in Pallas."""

# B batch, T time, H query heads, G key and value heads, K head_dim

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from spmd.core.fields import check
from spmd.parallel import scope


def attend_splash(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array | None
) -> jax.Array:
    """Causal attention [B, T, H, K] by splash, one program for each device's block of batch and heads.

    Args:
        q_BTHK: queries, T a multiple of 128.
        k_BTGK: keys.
        v_BTGK: values.
        segments_BT: number of each token's document; None is one document for each row.

    Raises:
        ValueError: the platform is no TPU, or T is no multiple of 128.
    """
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
    query_dims = ("batch", None, "heads", None)  # the kernel reads the full sequence
    key_dims = ("batch", None, "kv_heads", None)
    run = scope.blockwise(
        functools.partial(_splash_block, scale=head_dim**-0.5),
        (query_dims, key_dims, key_dims, ("batch", None)),
        query_dims,
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
