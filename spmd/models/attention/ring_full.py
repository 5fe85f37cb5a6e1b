"""Ring attention without a causal mask: each device has the same work, so chunks need no zigzag."""

# B batch, T time, S time of keys, C time of one device, H query heads, G key and value heads, R = H / G,
# K head_dim

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from spmd.core import tree
from spmd.models.attention.chunks import (
    RunningSoftmax,
    Scoring,
    fold,
    pair_gradients,
    send_to_next,
)
from spmd.models.attention.mask import Mask, segment_mask
from spmd.models.attention.ring import KEY_DIMS, QUERY_DIMS, SEGMENT_DIMS
from spmd.parallel import scope


def attend_ring_full(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    scale: float,
    softcap: float,
) -> jax.Array:
    """Exact attention [B, T, H, K] to all keys of a query's segment, the softmax at least in float32.

    Keys and values are sent round the devices, each of which folds them into the softmax of its queries (Liu
    et al. 2023, arXiv 2310.01889).

    Args:
        q_BTHK: queries, sharded along time.
        k_BSGK: keys, sharded alike; of the same sequence or of another.
        v_BSGK: values.
        mask: full.
        scale: factor on the scores.
        softcap: scaled scores become cap * tanh(scores / cap); 0 is off.

    Returns:
        [B, T, H, K], in the type of the queries.
    """
    axes, scoring = tuple(scope.sharding_axes("time")), Scoring(scale, softcap)
    segments = mask.both_segments(q_BTHK.shape[0], q_BTHK.shape[1], k_BSGK.shape[1])

    def attend_block(q_BCHK, k_BCGK, v_BCGK, query_BC, key_BC):
        kv_heads, head_dim = k_BCGK.shape[2:]
        q_BCGRK = q_BCHK.reshape(*q_BCHK.shape[:2], kv_heads, -1, head_dim)
        y_BCGRK: Any = _ring(axes, scoring, q_BCGRK, k_BCGK, v_BCGK, query_BC, key_BC)
        return y_BCGRK.reshape(q_BCHK.shape)

    in_dims = (QUERY_DIMS, KEY_DIMS, KEY_DIMS, SEGMENT_DIMS, SEGMENT_DIMS)
    run = scope.blockwise(attend_block, in_dims, QUERY_DIMS)
    return run(q_BTHK, k_BSGK, v_BSGK, *segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(axes, scoring, q, k, v, query_segments, key_segments):
    return _forward(axes, scoring, q, k, v, query_segments, key_segments)[0]


def _forward(axes, scoring, q, k, v, query_segments, key_segments):
    dtype, num = tree.at_least_float32(q.dtype), jax.lax.axis_size(axes)
    floor = jnp.full(q.shape[:-1], jnp.finfo(dtype).min, dtype)
    softmax = RunningSoftmax(floor, jnp.zeros_like(floor), jnp.zeros(q.shape, dtype))

    def add(softmax, received):
        k, v, key_segments = received
        return fold(softmax, q, k, v, segment_mask(query_segments, key_segments), scoring)

    def body(carry, _):
        softmax, received = carry
        coming = send_to_next(received, axes)  # travels while these are folded in
        return (add(softmax, received), coming), None

    carry = (softmax, (k, v, key_segments))
    (softmax, received), _ = jax.lax.scan(body, carry, length=num - 1)
    softmax = add(softmax, received)
    # A query that sees no key has the output 0; the backward pass masks all of its shares.
    total = jnp.where(softmax.total > 0, softmax.total, 1)
    out = (softmax.values / total[..., None]).astype(q.dtype)
    partition = softmax.largest + jnp.log(total)
    return out, (q, k, v, query_segments, key_segments, out, partition)


def _backward(axes, scoring, residuals, gradient):
    """Gradients of q, k and v; those of keys and values travel with them and are returned to their device."""
    q, k, v, query_segments, key_segments, out, partition = residuals
    dtype, num = tree.at_least_float32(q.dtype), jax.lax.axis_size(axes)
    inner = jnp.sum(out.astype(dtype) * gradient.astype(dtype), axis=-1)
    query = (q, gradient, partition, inner)

    def terms(received):
        k, v, key_segments = received
        mask = segment_mask(query_segments, key_segments)
        q_gradient, *kv_gradient = pair_gradients(query, (k, v), mask, scoring)
        return q_gradient, tuple(kv_gradient)

    def add(q_gradient, received, kv_gradient):
        q_term, kv_terms = terms(received)
        return q_gradient + q_term, jax.tree.map(jnp.add, kv_gradient, kv_terms)

    def body(carry, _):
        q_gradient, received, kv_gradient = carry
        coming, kv_gradient = send_to_next(received, axes), send_to_next(kv_gradient, axes)
        q_gradient, kv_gradient = add(q_gradient, received, kv_gradient)
        return (q_gradient, coming, kv_gradient), None

    local = (k, v, key_segments)
    received = send_to_next(local, axes)
    q_gradient, kv_gradient = terms(local)
    carry = (q_gradient, received, kv_gradient)
    (q_gradient, received, kv_gradient), _ = jax.lax.scan(body, carry, length=num - 2)
    q_gradient, kv_gradient = add(q_gradient, received, send_to_next(kv_gradient, axes))
    k_gradient, v_gradient = send_to_next(kv_gradient, axes)
    return (
        q_gradient.astype(q.dtype),
        k_gradient.astype(k.dtype),
        v_gradient.astype(v.dtype),
        None,
        None,
    )


_ring.defvjp(_forward, _backward)
