"""Attention in plain XLA operations, which holds all scores [T, S] at once."""

# B batch, T time, S time of keys, H query heads, G key and value heads, R = H / G, K head_dim

from __future__ import annotations

import jax
import jax.numpy as jnp

from spmd.core import tree
from spmd.models.layers import contract


def attend_xla(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the keys where the mask is True: [B, T, H, K].

    The softmax is at least float32, the matmuls stay in the compute type, backward too: differentiated,
    jax.nn.dot_product_attention multiplies float32 by bfloat16, which strict promotion refuses.
    """
    batch, time, _, head_dim = q_BTHK.shape
    q_BTGRK = q_BTHK.reshape(batch, time, k_BSGK.shape[2], -1, head_dim)  # R queries for each key
    dtype = tree.at_least_float32(q_BTHK.dtype)
    scores = contract("btgrk,bsgk->bgrts", dtype, q_BTGRK, k_BSGK) * head_dim**-0.5
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(dtype).min)
    shares = jax.nn.softmax(scores).astype(q_BTHK.dtype)
    return contract("bgrts,bsgk->btgrk", q_BTHK.dtype, shares, v_BSGK).reshape(q_BTHK.shape)


def attend_cached(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Attention [B, T, H, K] to a cache whose slot s holds position s, up to each query's own position."""
    slots = jnp.arange(k_BSGK.shape[1], dtype=positions_BT.dtype)
    return attend_xla(q_BTHK, k_BSGK, v_BSGK, slots.reshape(1, 1, -1) <= positions_BT[:, :, None])
