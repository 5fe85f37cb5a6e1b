"""Ring attention over a sharded sequence: keys and values are sent from device to device."""

# B batch, T time, C time of one device, c half of it, s of keys, t of queries, H query heads,
# G key and value heads, R = H / G, K head_dim

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd.core import tree
from spmd.core.fields import check
from spmd.models.attention.chunks import (
    RunningSoftmax,
    Scoring,
    fold,
    pair_gradients,
    send_to_next,
)
from spmd.models.attention.mask import Mask, causal_mask, segment_mask
from spmd.parallel import scope

QUERY_DIMS = ("batch", "time", "heads", "head_dim")
KEY_DIMS = ("batch", "time", "kv_heads", "head_dim")
SEGMENT_DIMS = ("batch", "time")


def attend_ring(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    mask: Mask,
    scale: float,
    softcap: float,
) -> jax.Array:
    """Exact causal attention [B, T, H, K], the softmax at least in float32.

    Keys and values are sent round the devices; each device folds them into the softmax of its queries (Liu
    et al. 2023, arXiv 2310.01889). With consecutive shards the causal mask would leave the first device idle.
    So time is split into 2 n chunks, and device i computes chunks i and 2 n - 1 - i: each step has the work
    of two pairs of chunks on every device (zigzag; Llama 3, arXiv 2407.21783, section 3.3.2). The chunks are
    exchanged within attention, so that no other layer needs to know.

    Args:
        q_BTHK: queries, sharded along time.
        k_BTGK: keys.
        v_BTGK: values.
        mask: causal, or a window to the left; queries and keys have the same segments. Keys beyond a window
            are masked, not skipped.
        scale: factor on the scores.
        softcap: scaled scores become cap * tanh(scores / cap); 0 is off.

    Returns:
        [B, T, H, K], in the type of the queries.

    Raises:
        ValueError: T does not divide into 2 n chunks.
    """
    axes, num, time = tuple(scope.sharding_axes("time")), scope.num_shards("time"), q_BTHK.shape[1]
    check(
        time % (2 * num) == 0,
        f"model.context=ring splits a sequence into 2 x mesh.context={num} chunks, which do not divide its"
        f" {time} tokens; use a length that is a multiple of {2 * num}, or --model.context ulysses",
    )

    segments_BT, _ = mask.both_segments(q_BTHK.shape[0], time, time)
    scoring = Scoring(scale, softcap)

    def attend_block(q_BCHK, k_BCGK, v_BCGK, segments_BC):
        batch, time, kv_heads, head_dim = k_BCGK.shape
        q_BCGRK = q_BCHK.reshape(batch, time, kv_heads, -1, head_dim)
        places = _Places(segments_BC)
        if mask.kind == "window":
            index_1C = jax.lax.axis_index(axes) * time + jnp.arange(time, dtype=jnp.int32)[None]
            places = _Places(segments_BC, index_1C, index_1C - mask.window[0])
        chunks = to_zigzag((q_BCGRK, k_BCGK, v_BCGK, places), axes)
        return from_zigzag(_ring(axes, scoring, *chunks), axes).reshape(q_BCHK.shape)

    in_dims = (QUERY_DIMS, KEY_DIMS, KEY_DIMS, SEGMENT_DIMS)
    return scope.blockwise(attend_block, in_dims, QUERY_DIMS)(q_BTHK, k_BTGK, v_BTGK, segments_BT)


# ---- the order of the chunks


def _routes(num: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(from, to) of the chunks 2 j and 2 j + 1, which device j holds in consecutive order."""
    target = lambda chunk: min(chunk, 2 * num - 1 - chunk)
    return [(j, target(2 * j)) for j in range(num)], [(j, target(2 * j + 1)) for j in range(num)]


def to_zigzag(blocks: Any, axes: tuple[str, ...]) -> Any:
    """Arrays [B, C, ...] of consecutive time -> [2, B, c, ...]: chunks i and 2 n - 1 - i on device i."""
    even, odd = _routes(jax.lax.axis_size(axes))
    is_even = jax.lax.axis_index(axes) % 2 == 0

    def exchange(x: jax.Array) -> jax.Array:
        a, b = jnp.split(x, 2, axis=1)
        a, b = jax.lax.ppermute(a, axes, even), jax.lax.ppermute(b, axes, odd)
        return jnp.stack([jnp.where(is_even, a, b), jnp.where(is_even, b, a)])

    return jax.tree.map(exchange, blocks)


def from_zigzag(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The inverse of to_zigzag: [2, B, c, ...] -> [B, C, ...].

    Args:
        x: this device's two chunks [2, B, c, ...].
        axes: mesh axes of the sequence.

    Returns:
        [B, 2 c, ...]: consecutive chunks.
    """
    even, odd = (
        [(target, source) for source, target in route] for route in _routes(jax.lax.axis_size(axes))
    )
    is_even = jax.lax.axis_index(axes) % 2 == 0
    a, b = jnp.where(is_even, x[0], x[1]), jnp.where(is_even, x[1], x[0])
    return jnp.concatenate(
        [jax.lax.ppermute(a, axes, even), jax.lax.ppermute(b, axes, odd)], axis=1
    )


class _Places(NamedTuple):
    """Where tokens are: segments [B, c]; with a window also the place in the row, and the first one seen."""

    segments: jax.Array
    at: jax.Array | None = None
    first: jax.Array | None = None


# ---- the ring; leading dim 2: the early and the late chunk of a device


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(axes, scoring, q, k, v, places):
    return _forward(axes, scoring, q, k, v, places)[0]


def _forward(axes, scoring, q, k, v, places):
    dtype, num, rank = (
        tree.at_least_float32(q.dtype),
        jax.lax.axis_size(axes),
        jax.lax.axis_index(axes),
    )
    floor = jnp.full(q.shape[:-1], jnp.finfo(dtype).min, dtype)
    empty = RunningSoftmax(floor, jnp.zeros_like(floor), jnp.zeros(q.shape, dtype))
    local = (k, v, places)
    received = send_to_next(local, axes)
    early, late = (
        fold(
            _at(empty, n),
            q[n],
            k[n],
            v[n],
            _mask(_at(places, n), _at(places, n), causal=True),
            scoring,
        )
        for n in (0, 1)
    )
    late = fold(late, q[1], k[0], v[0], _mask(_at(places, 1), _at(places, 0)), scoring)

    def fold_received(softmax, received, step):
        """The softmax with the keys and values of the device `step` ranks before."""
        early, late = softmax
        k, v, key_places = received
        late = fold(late, q[1], k[0], v[0], _mask(_at(places, 1), _at(key_places, 0)), scoring)
        # From a lower rank the early chunk precedes both local ones, else both chunks precede the late one.
        lower = rank >= step
        pick = lambda x: jnp.where(lower, x[0], x[1])
        either = jax.tree.map(lambda a, b: jnp.where(lower, a, b), early, late)
        mask = _mask(jax.tree.map(pick, places), jax.tree.map(pick, key_places))
        either = fold(either, pick(q), pick(k), pick(v), mask, scoring)
        replace = lambda when, old: jax.tree.map(lambda a, b: jnp.where(when, a, b), either, old)
        return replace(lower, early), replace(~lower, late)

    def body(carry, step):
        softmax, received = carry
        coming = send_to_next(received, axes)  # travels while these are folded in
        return (fold_received(softmax, received, step), coming), None

    (softmax, received), _ = jax.lax.scan(
        body, ((early, late), received), jnp.arange(1, num - 1, dtype=jnp.int32)
    )
    early, late = fold_received(softmax, received, num - 1)
    softmax = jax.tree.map(lambda a, b: jnp.stack([a, b]), early, late)
    out = (softmax.values / softmax.total[..., None]).astype(q.dtype)
    return out, (q, k, v, places, out, softmax.largest + jnp.log(softmax.total))


def _backward(axes, scoring, residuals, gradient):
    """Gradients of q, k and v; those of keys and values travel with them and are returned to their device."""
    q, k, v, places, out, partition = residuals
    dtype, num, rank = (
        tree.at_least_float32(q.dtype),
        jax.lax.axis_size(axes),
        jax.lax.axis_index(axes),
    )
    inner = jnp.sum(out.astype(dtype) * gradient.astype(dtype), axis=-1)
    query = (q, gradient, partition, inner)

    received = send_to_next((k, v, places), axes)
    early, late = (
        pair_gradients(
            _at(query, n), (k[n], v[n]), _mask(_at(places, n), _at(places, n), causal=True), scoring
        )
        for n in (0, 1)
    )
    cross = pair_gradients(
        _at(query, 1), (k[0], v[0]), _mask(_at(places, 1), _at(places, 0)), scoring
    )
    q_gradient = jnp.stack([early[0], late[0] + cross[0]])
    kv_gradient = tuple(jnp.stack([early[i] + cross[i], late[i]]) for i in (1, 2))

    def add_received(q_gradient, received, step):
        """(gradient of q with the pairs of these keys added, gradients of these keys and values)."""
        k, v, key_places = received
        cross = pair_gradients(
            _at(query, 1), (k[0], v[0]), _mask(_at(places, 1), _at(key_places, 0)), scoring
        )
        lower = rank >= step
        pick = lambda x: jnp.where(lower, x[0], x[1])
        mask = _mask(jax.tree.map(pick, places), jax.tree.map(pick, key_places))
        either = pair_gradients(jax.tree.map(pick, query), (pick(k), pick(v)), mask, scoring)
        first = lambda x: jnp.where(lower, x, jnp.zeros_like(x))
        second = lambda x: jnp.where(lower, jnp.zeros_like(x), x)
        q_gradient += jnp.stack([first(either[0]), cross[0] + second(either[0])])
        terms = (jnp.stack([cross[i] + first(either[i]), second(either[i])]) for i in (1, 2))
        return q_gradient, tuple(terms)

    def body(carry, step):
        q_gradient, received, kv_gradient = carry
        coming, kv_gradient = send_to_next(received, axes), send_to_next(kv_gradient, axes)
        q_gradient, terms = add_received(q_gradient, received, step)
        return (q_gradient, coming, jax.tree.map(jnp.add, kv_gradient, terms)), None

    (q_gradient, received, kv_gradient), _ = jax.lax.scan(
        body, (q_gradient, received, kv_gradient), jnp.arange(1, num - 1, dtype=jnp.int32)
    )
    kv_gradient = send_to_next(kv_gradient, axes)
    q_gradient, terms = add_received(q_gradient, received, num - 1)
    k_gradient, v_gradient = send_to_next(jax.tree.map(jnp.add, kv_gradient, terms), axes)
    return (
        q_gradient.astype(q.dtype),
        k_gradient.astype(k.dtype),
        v_gradient.astype(v.dtype),
        None,
    )


_ring.defvjp(_forward, _backward)


def _at(parts: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], parts)


def _mask(query: _Places, key: _Places, *, causal: bool = False) -> jax.Array:
    """[B, t, s] of two chunks; causal: it is the same chunk."""
    seen = segment_mask(query.segments, key.segments)
    if query.first is not None and key.at is not None:
        seen &= key.at[:, None, :] >= query.first[:, :, None]
    return seen & causal_mask(query.segments.shape[1]) if causal else seen
