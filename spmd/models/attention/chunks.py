"""Attention of a chunk of queries to a chunk of keys, forward and backward, as rings accumulate it."""

# B batch, s time of keys, t of queries, G key and value heads, R queries for each key head, K head_dim

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd.core import tree


class Scoring(NamedTuple):
    """How products of queries and keys become scores: a factor, and a soft cap (0 is off)."""

    scale: float
    softcap: float = 0.0


class RunningSoftmax(NamedTuple):
    """The softmax over the keys seen so far, for each query."""

    largest: jax.Array  # score, [..., B, c, G, R]
    total: jax.Array  # sum of exp(score - largest)
    values: jax.Array  # values weighted by exp(score - largest), [..., B, c, G, R, K]


def send_to_next(parts: Any, axes: tuple[str, ...]) -> Any:
    """The previous device's arrays; each device sends its own to the next."""
    num = jax.lax.axis_size(axes)
    route = [(i, (i + 1) % num) for i in range(num)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, route), parts)


def scores_of(q_BtGRK: jax.Array, k_BsGK: jax.Array, scoring: Scoring) -> jax.Array:
    """Scores [B, t, G, R, s], at least float32.

    Args:
        q_BtGRK: queries, R for each key head.
        k_BsGK: keys.
        scoring: scale and soft-cap.

    Returns:
        [B, t, G, R, s], at least float32.
    """
    dtype, (scale, softcap) = tree.at_least_float32(q_BtGRK.dtype), scoring
    scores = jnp.einsum("btgrk,bsgk->btgrs", q_BtGRK, k_BsGK, preferred_element_type=dtype) * scale
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


def fold(
    softmax: RunningSoftmax,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask_Bts: jax.Array,
    scoring: Scoring,
) -> RunningSoftmax:
    """The softmax over one more chunk of keys (Milakov and Gimelshein 2018, arXiv 1805.02867).

    Args:
        softmax: over the chunks before.
        q: queries [B, t, G, R, K].
        k: keys [B, s, G, K].
        v: values [B, s, G, K].
        mask_Bts: True where a query sees a key.
        scoring: scale and soft-cap.

    Returns:
        The softmax with this chunk.
    """
    mask = mask_Bts[:, :, None, None, :]
    scores = jnp.where(mask, scores_of(q, k, scoring), jnp.finfo(softmax.total.dtype).min)
    largest = jnp.maximum(softmax.largest, scores.max(-1))
    shares = jnp.where(mask, jnp.exp(scores - largest[..., None]), 0)
    factor = jnp.exp(softmax.largest - largest)
    dtype = softmax.values.dtype
    values = jnp.einsum(
        "btgrs,bsgk->btgrk", shares.astype(q.dtype), v, preferred_element_type=dtype
    )
    return RunningSoftmax(
        largest,
        softmax.total * factor + shares.sum(-1),
        softmax.values * factor[..., None] + values,
    )


def pair_gradients(query, key, mask_Bts, scoring):
    """Gradients of q, k and v from one pair of chunks, at least float32.

    query: (q, gradient of the output, log of the softmax's denominator, sum of output times gradient).
    key: (k, v).

    Args:
        mask_Bts: True where a query sees a key.
        scoring: scale and soft-cap.
    """
    (q, gradient, partition, inner), (k, v) = query, key
    einsum = functools.partial(jnp.einsum, preferred_element_type=partition.dtype)
    mask = mask_Bts[:, :, None, None, :]
    scores = scores_of(q, k, scoring)
    shares = jnp.where(mask, jnp.exp(scores - partition[..., None]), 0)
    v_gradient = einsum("btgrs,btgrk->bsgk", shares.astype(q.dtype), gradient)
    share_gradient = einsum("btgrk,bsgk->btgrs", gradient, v)
    score_gradient = shares * (share_gradient - inner[..., None]) * scoring.scale
    if scoring.softcap:
        score_gradient *= 1 - (scores / scoring.softcap) ** 2
    score_gradient = score_gradient.astype(q.dtype)
    q_gradient = einsum("btgrs,bsgk->btgrk", score_gradient, k)
    return q_gradient, einsum("btgrs,btgrk->bsgk", score_gradient, q), v_gradient
