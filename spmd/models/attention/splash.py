"""Splash attention, the TPU's block-sparse flash kernel in Pallas."""

# B batch, T time, S time of keys, H query heads, G key and value heads, K head_dim

from __future__ import annotations

import functools
from typing import Any

import jax

from spmd.core.fields import check
from spmd.models.attention.mask import Mask
from spmd.parallel import scope


def attend_splash(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    scale: float,
    softcap: float,
) -> jax.Array:
    """Attention [B, T, H, K] by splash, one program for each device's block of batch and heads.

    Args:
        q_BTHK: queries, T a multiple of 128.
        k_BSGK: keys, S a multiple of 128.
        v_BSGK: values.
        mask: the keys that a query sees; causal, full or window.
        scale: factor on the scores.
        softcap: scaled scores become cap * tanh(scores / cap); 0 is off.

    Returns:
        [B, T, H, K], in the type of the queries.

    Raises:
        ValueError: the platform is no TPU, or T or S is no multiple of 128.
    """
    platform, (batch, time), keys = scope.platform(), q_BTHK.shape[:2], k_BSGK.shape[1]
    instead = "use --model.attention xla"
    check(
        platform == "tpu",
        f"model.attention=splash runs on TPUs, this run is on {platform}; {instead}",
    )
    for length in (time, keys):
        check(
            length % 128 == 0,
            f"model.attention=splash takes sequences of a multiple of 128 tokens, given {length};"
            f" change the data's length, or {instead}",
        )
    segments_BT, segments_BS = mask.both_segments(batch, time, keys)
    query_dims = ("batch", None, "heads", None)  # the kernel reads the full sequence
    key_dims = ("batch", None, "kv_heads", None)
    run = scope.blockwise(
        functools.partial(_splash_block, mask=mask, scale=scale, softcap=softcap),
        (query_dims, key_dims, key_dims, ("batch", None), ("batch", None)),
        query_dims,
    )
    return run(q_BTHK, k_BSGK, v_BSGK, segments_BT, segments_BS)


def _splash_block(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    mask: Mask,
    scale: float,
    softcap: float,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, time, heads, _ = q_BTHK.shape
    keys = k_BSGK.shape[1]
    block, key_block = (
        next(size for size in (512, 256, 128) if length % size == 0) for length in (time, keys)
    )
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=key_block,
        block_kv_compute=key_block,
        block_q_dkv=block,
        block_kv_dkv=key_block,
        block_kv_dkv_compute=key_block,
        block_q_dq=block,
        block_kv_dq=key_block,
    )
    shape = (time, keys)
    order = {
        "causal": lambda: masks.CausalMask(shape),
        "full": lambda: masks.FullMask(shape),
        "window": lambda: masks.LocalMask(shape, mask.window, offset=0),
    }[mask.kind]()
    splash = kernel.make_splash_mha(
        masks.MultiHeadMask([order] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        attn_logits_soft_cap=softcap or None,
    )

    def row(
        q_THK: jax.Array,
        k_SGK: jax.Array,
        v_SGK: jax.Array,
        segments_T: jax.Array,
        segments_S: jax.Array,
    ):
        q_HTK, k_GSK, v_GSK = (x.swapaxes(0, 1) for x in (q_THK, k_SGK, v_SGK))
        segments = kernel.SegmentIds(q=segments_T, kv=segments_S)
        out_HTK: Any = splash(q_HTK * scale, k_GSK, v_GSK, segment_ids=segments)
        return out_HTK.swapaxes(0, 1)

    return jax.vmap(row)(q_BTHK, k_BSGK, v_BSGK, segments_BT, segments_BS)
