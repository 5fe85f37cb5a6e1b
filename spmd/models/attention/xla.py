"""Attention in plain XLA operations, which holds all scores [T, S] at once."""

# B batch, T time, S time of keys, H query heads, G key and value heads, R = H / G, K head_dim

from __future__ import annotations

import jax
import jax.numpy as jnp

from spmd.core import tree
from spmd.models.layers import contract


def attend_xla(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    visible_BTS: jax.Array | None,
    *,
    scale: float,
    softcap: float = 0.0,
    bias: jax.Array | None = None,
    may_be_empty: bool = False,
) -> jax.Array:
    """softmax(scale q k^T) v over the keys where visible is True (None: all): [B, T, H, K].

    The softmax is at least float32, the matmuls stay in the compute type, backward too: differentiated,
    jax.nn.dot_product_attention multiplies float32 by bfloat16, which strict promotion refuses.

    Args:
        q_BTHK: queries.
        k_BSGK: keys.
        v_BSGK: values.
        visible_BTS: True where a query sees a key.
        scale: factor on the scores.
        softcap: scaled scores become cap * tanh(scores / cap); 0 is off.
        bias: [H or 1, T, S] or [B, H or 1, T, S], added to the scores.
        may_be_empty: whether some query sees no key, so that its output must be set to 0.

    Returns:
        [B, T, H, K], in the type of the queries.
    """
    batch, time, heads, head_dim = q_BTHK.shape
    kv_heads = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(batch, time, kv_heads, -1, head_dim)  # R queries for each key
    dtype = tree.at_least_float32(q_BTHK.dtype)
    scores = contract("btgrk,bsgk->bgrts", dtype, q_BTGRK, k_BSGK) * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        *rows, num, queries, keys = bias.shape
        groups = (kv_heads, heads // kv_heads) if num > 1 else (1, 1)
        scores += bias.reshape(*(rows or [1]), *groups, queries, keys).astype(dtype)
    if visible_BTS is not None:
        scores = jnp.where(visible_BTS[:, None, None], scores, jnp.finfo(dtype).min)
    shares = jax.nn.softmax(scores).astype(q_BTHK.dtype)
    if may_be_empty and visible_BTS is not None:
        shares = jnp.where(visible_BTS[:, None, None], shares, 0)
    return contract("bgrts,bsgk->btgrk", q_BTHK.dtype, shares, v_BSGK).reshape(q_BTHK.shape)


def attend_cached(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    positions_BT: jax.Array,
    *,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Attention [B, T, H, K] to a cache whose slot s holds position s, up to each query's own position.

    Args:
        q_BTHK: queries.
        k_BSGK: cached keys.
        v_BSGK: cached values.
        positions_BT: position of each query.
        window: only the latest keys, that many; 0 is all.
        scale: factor on the scores.
        softcap: scaled scores become cap * tanh(scores / cap); 0 is off.
        bias: [B, H or 1, T, S], added to the scores.

    Returns:
        [B, T, H, K].
    """
    slots_11S = jnp.arange(k_BSGK.shape[1], dtype=positions_BT.dtype).reshape(1, 1, -1)
    visible_BTS = slots_11S <= positions_BT[:, :, None]
    if window:
        visible_BTS &= slots_11S > positions_BT[:, :, None] - window
    options = {"scale": scale, "softcap": softcap, "bias": bias}
    return attend_xla(q_BTHK, k_BSGK, v_BSGK, visible_BTS, **options)
