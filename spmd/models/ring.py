"""Attention over a sequence that is cut over devices: by a ring of keys and values, or by an exchange of
heads against time.
"""

# B batch, T time, C time of one device, c half of it, H query heads, G key and value heads, R = H / G,
# K head_dim

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd.core import tree
from spmd.core.fields import check
from spmd.parallel import scope

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
QUERY = ("batch", "time", "heads", "head_dim")
KEY = ("batch", "time", "kv_heads", "head_dim")
SEGMENTS = ("batch", "time")


def ulysses(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: Any, attend: Attend
) -> jax.Array:
    """[B, T, H, K]: an all-to-all gives each device all of the time of some heads, another gives it back
    (Jacobs et al. 2023, arXiv 2309.14509). attend: any kernel, on whole sequences.
    """
    axes, ways, tensor = tuple(scope.cut("time")), scope.ways("time"), scope.ways("heads")
    heads, kv_heads = q_BTHK.shape[2], k_BTGK.shape[2]
    common = math.gcd(heads, kv_heads)
    allowed = [n for n in range(1, common + 1) if common % (n * tensor) == 0]
    check(
        ways in allowed,
        f"model.context=ulysses gives each device whole heads: the {heads} heads and {kv_heads} key and value"
        f" heads do not divide by mesh.context={ways}"
        + (f" x mesh.tensor={tensor}" if tensor > 1 else "")
        + f"; mesh.context may be {', '.join(map(str, allowed)) or 'none'}, or use --model.context ring",
    )

    def block(q_BCHK, k_BCGK, v_BCGK, segments_BC):
        turn = functools.partial(
            jax.lax.all_to_all, axis_name=axes, split_axis=2, concat_axis=1, tiled=True
        )
        segments_BT = jax.lax.all_gather(segments_BC, axes, axis=1, tiled=True)
        with scope.bind(cut=None):
            y_BTHK = attend(turn(q_BCHK), turn(k_BCGK), turn(v_BCGK), segments_BT)
        return jax.lax.all_to_all(y_BTHK, axes, split_axis=1, concat_axis=2, tiled=True)

    run = scope.blockwise(block, (QUERY, KEY, KEY, SEGMENTS), QUERY)
    return run(q_BTHK, k_BTGK, v_BTGK, segments_BT)


def ring(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """[B, T, H, K]: keys and values go round the devices, each of which folds them into its queries' softmax
    (Liu et al. 2023, arXiv 2310.01889); exact, the softmax in at least float32.

    A causal mask would leave the first device idle. So time is cut into 2 n chunks, and device i takes chunks
    i and 2 n - 1 - i: each step has the work of two pairs of chunks on every device (zigzag; Llama 3, arXiv
    2407.21783, section 3.3.2). They are brought there within attention, so that no other layer knows.
    """
    axes, ways, time = tuple(scope.cut("time")), scope.ways("time"), q_BTHK.shape[1]
    check(
        time % (2 * ways) == 0,
        f"model.context=ring cuts a sequence into 2 x mesh.context={ways} chunks, which do not divide its"
        f" {time} tokens; use a length that is a multiple of {2 * ways}, or --model.context ulysses",
    )

    def block(q_BCHK, k_BCGK, v_BCGK, segments_BC):
        batch, time, kv_heads, head_dim = k_BCGK.shape
        q_BCGRK = q_BCHK.reshape(batch, time, kv_heads, -1, head_dim)
        here = zigzag((q_BCGRK, k_BCGK, v_BCGK, segments_BC), axes)
        return natural(_ring(axes, *here), axes).reshape(q_BCHK.shape)

    run = scope.blockwise(block, (QUERY, KEY, KEY, SEGMENTS), QUERY)
    return run(q_BTHK, k_BTGK, v_BTGK, segments_BT)


# ---- the order


def _routes(num: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(from, to) of the chunks 2 j and 2 j + 1 that device j has in the natural order."""
    to = lambda chunk: min(chunk, 2 * num - 1 - chunk)
    return [(j, to(2 * j)) for j in range(num)], [(j, to(2 * j + 1)) for j in range(num)]


def zigzag(blocks: Any, axes: tuple[str, ...]) -> Any:
    """Arrays [B, C, ...] of consecutive time -> [2, B, c, ...]: chunks i and 2 n - 1 - i of device i."""
    even, odd = _routes(jax.lax.axis_size(axes))
    first = jax.lax.axis_index(axes) % 2 == 0

    def move(x: jax.Array) -> jax.Array:
        a, b = jnp.split(x, 2, axis=1)
        a, b = jax.lax.ppermute(a, axes, even), jax.lax.ppermute(b, axes, odd)
        return jnp.stack([jnp.where(first, a, b), jnp.where(first, b, a)])

    return jax.tree.map(move, blocks)


def natural(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The inverse: [2, B, c, ...] -> [B, C, ...]."""
    even, odd = ([(to, back) for back, to in way] for way in _routes(jax.lax.axis_size(axes)))
    first = jax.lax.axis_index(axes) % 2 == 0
    a, b = jnp.where(first, x[0], x[1]), jnp.where(first, x[1], x[0])
    return jnp.concatenate(
        [jax.lax.ppermute(a, axes, even), jax.lax.ppermute(b, axes, odd)], axis=1
    )


# ---- the ring. Leading 2: the early and the late chunk of a device


class Sums(NamedTuple):
    """The softmax so far, by query: the largest score, the sum of exponentials, the weighted values."""

    largest: jax.Array  # [..., B, c, G, R]
    total: jax.Array
    values: jax.Array  # [..., B, c, G, R, K]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(axes, q, k, v, segments):
    return _forward(axes, q, k, v, segments)[0]


def _forward(axes, q, k, v, segments):
    wide, num, me = tree.wide(q.dtype), jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    floor = jnp.full(q.shape[:-1], jnp.finfo(wide).min, wide)
    empty = Sums(floor, jnp.zeros_like(floor), jnp.zeros(q.shape, wide))
    there = (k, v, segments)
    coming = _rotate(there, axes)
    early, late = (
        _fold(_at(empty, n), q[n], k[n], v[n], _seen(segments[n], segments[n], True))
        for n in (0, 1)
    )
    late = _fold(late, q[1], k[0], v[0], _seen(segments[1], segments[0], False))

    def turn(sums, there, step):
        """Keys and values of the device `step` places before."""
        early, late = sums
        k, v, other = there
        late = _fold(late, q[1], k[0], v[0], _seen(segments[1], other[0], False))
        # Theirs are early chunks before both of ours; else both are before our late one.
        before = me >= step
        pick = lambda x: jnp.where(before, x[0], x[1])
        either = jax.tree.map(lambda a, b: jnp.where(before, a, b), early, late)
        seen = _seen(pick(segments), pick(other), False)
        either = _fold(either, pick(q), pick(k), pick(v), seen)
        choose = lambda when, old: jax.tree.map(lambda a, b: jnp.where(when, a, b), either, old)
        return choose(before, early), choose(~before, late)

    def body(carry, step):
        sums, there = carry
        coming = _rotate(there, axes)  # travels while these are folded in
        return (turn(sums, there, step), coming), None

    (sums, there), _ = jax.lax.scan(
        body, ((early, late), coming), jnp.arange(1, num - 1, dtype=jnp.int32)
    )
    early, late = turn(sums, there, num - 1)
    sums = jax.tree.map(lambda a, b: jnp.stack([a, b]), early, late)
    out = (sums.values / sums.total[..., None]).astype(q.dtype)
    return out, (q, k, v, segments, out, sums.largest + jnp.log(sums.total))


def _backward(axes, kept, gradient):
    """The gradients of keys and values go round with them, and one step further: home."""
    q, k, v, segments, out, partition = kept
    wide, num, me = tree.wide(q.dtype), jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    inner = jnp.sum(out.astype(wide) * gradient.astype(wide), axis=-1)
    query = (q, gradient, partition, inner)  # what a pair needs of its queries

    def pair(query: Any, key: Any, seen: jax.Array) -> Any:
        (q, gradient, partition, inner), (k, v) = query, key
        return _pair_gradients(q, gradient, partition, inner, k, v, seen)

    there = (k, v, segments)
    coming = _rotate(there, axes)
    early, late = (
        pair(_at(query, n), (k[n], v[n]), _seen(segments[n], segments[n], True)) for n in (0, 1)
    )
    cross = pair(_at(query, 1), (k[0], v[0]), _seen(segments[1], segments[0], False))
    for_q = jnp.stack([early[0], late[0] + cross[0]])
    for_kv = tuple(jnp.stack([early[i] + cross[i], late[i]]) for i in (1, 2))

    def turn(for_q, there, step):
        k, v, other = there
        cross = pair(_at(query, 1), (k[0], v[0]), _seen(segments[1], other[0], False))
        before = me >= step
        pick = lambda x: jnp.where(before, x[0], x[1])
        seen = _seen(pick(segments), pick(other), False)
        either = pair(jax.tree.map(pick, query), (pick(k), pick(v)), seen)
        first = lambda x: jnp.where(before, x, jnp.zeros_like(x))
        second = lambda x: jnp.where(before, jnp.zeros_like(x), x)
        for_q += jnp.stack([first(either[0]), cross[0] + second(either[0])])
        add = (jnp.stack([cross[i] + first(either[i]), second(either[i])]) for i in (1, 2))
        return for_q, tuple(add)

    def body(carry, step):
        for_q, there, for_kv = carry
        coming, for_kv = _rotate(there, axes), _rotate(for_kv, axes)
        for_q, add = turn(for_q, there, step)
        return (for_q, coming, jax.tree.map(jnp.add, for_kv, add)), None

    carry = (for_q, coming, for_kv)
    (for_q, there, for_kv), _ = jax.lax.scan(body, carry, jnp.arange(1, num - 1, dtype=jnp.int32))
    for_kv = _rotate(for_kv, axes)
    for_q, add = turn(for_q, there, num - 1)
    for_k, for_v = _rotate(jax.tree.map(jnp.add, for_kv, add), axes)
    return for_q.astype(q.dtype), for_k.astype(k.dtype), for_v.astype(v.dtype), None


_ring.defvjp(_forward, _backward)


def _at(parts: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], parts)


def _rotate(parts: Any, axes: tuple[str, ...]) -> Any:
    """Each array to the next device."""
    num = jax.lax.axis_size(axes)
    to = [(i, (i + 1) % num) for i in range(num)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, to), parts)


def _seen(of_query: jax.Array, of_key: jax.Array, causal: bool) -> jax.Array:
    """[B, t, s] of two chunks' segments; causal: it is one chunk."""
    seen = of_query[:, :, None] == of_key[:, None, :]
    if not causal:
        return seen
    time = jnp.arange(of_query.shape[1], dtype=jnp.int32)
    return seen & (time.reshape(1, 1, -1) <= time.reshape(1, -1, 1))


def _scores(q_BtGRK: jax.Array, k_BsGK: jax.Array) -> jax.Array:
    """[B, t, G, R, s]."""
    wide, scale = tree.wide(q_BtGRK.dtype), q_BtGRK.shape[-1] ** -0.5
    return jnp.einsum("btgrk,bsgk->btgrs", q_BtGRK, k_BsGK, preferred_element_type=wide) * scale


def _fold(sums: Sums, q: jax.Array, k: jax.Array, v: jax.Array, seen_Bts: jax.Array) -> Sums:
    """The softmax with one more chunk of keys (Milakov and Gimelshein 2018, arXiv 1805.02867)."""
    seen = seen_Bts[:, :, None, None, :]
    scores = jnp.where(seen, _scores(q, k), jnp.finfo(sums.total.dtype).min)
    largest = jnp.maximum(sums.largest, scores.max(-1))
    shares = jnp.where(seen, jnp.exp(scores - largest[..., None]), 0)
    kept = jnp.exp(sums.largest - largest)
    wide = sums.values.dtype
    values = jnp.einsum("btgrs,bsgk->btgrk", shares.astype(q.dtype), v, preferred_element_type=wide)
    return Sums(largest, sums.total * kept + shares.sum(-1), sums.values * kept[..., None] + values)


def _pair_gradients(q, gradient, partition, inner, k, v, seen_Bts):
    """Gradients of queries, keys and values from one pair of chunks, at least float32."""
    product = functools.partial(jnp.einsum, preferred_element_type=partition.dtype)
    seen = seen_Bts[:, :, None, None, :]
    shares = jnp.where(seen, jnp.exp(_scores(q, k) - partition[..., None]), 0)
    for_v = product("btgrs,btgrk->bsgk", shares.astype(q.dtype), gradient)
    of_shares = product("btgrk,bsgk->btgrs", gradient, v)
    of_scores = (shares * (of_shares - inner[..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
    for_q = product("btgrs,bsgk->btgrk", of_scores, k)
    return for_q, product("btgrs,btgrk->bsgk", of_scores, q), for_v
