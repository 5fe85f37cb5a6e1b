"""Collectives by hand, inside shard_map: rings of ppermute, hierarchies, int8 on the wire.

Notation as in the scaling book (jax-ml.github.io/scaling-book): A[I] {U_X} is a sum over the mesh axes X that
has not been taken yet, A[I_X] is cut over X. Several axes are one: their devices counted row-major, X in all.
"""

# N devices of the axes, C elements of a chunk, K of a block

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any
Axes = tuple[str, ...]
# Rings up to here are unrolled: the compiler can hide a hop behind other work, which a loop forbids. Longer
# ones would fill the program.
UNROLLED = 16


def size(axes: Axes) -> int:
    """Devices along `axes`."""
    return jax.lax.axis_size(axes) if axes else 1


def index(axes: Axes) -> jax.Array:
    """int32 [] the number of this device along `axes`."""
    return jax.lax.axis_index(axes) if axes else jnp.zeros((), jnp.int32)


# ---- rings


def ring_reduce_scatter(x_NC: jax.Array, axes: Axes, *, bidirectional: bool = False) -> jax.Array:
    """A[N, C] {U_X} -> A[N_X, C], this device's chunk [C]; each device sends (N - 1) / N of A to a neighbour.

    bidirectional: half of each chunk travels in the opposite direction, on the links' other lane.
    """
    return jnp.concatenate([_scatter(x, axes, way) for x, way in _ways(x_NC, bidirectional)])


def ring_all_gather(x_C: jax.Array, axes: Axes, *, bidirectional: bool = False) -> jax.Array:
    """A[N_X, C] -> A[N, C], from this device's chunk [C]; each device sends (N - 1) / N of A."""
    parts = [_gather(x, axes, way) for x, way in _ways(x_C, bidirectional)]
    return jnp.concatenate(parts, axis=1)


def ring_all_reduce(x: jax.Array, axes: Axes, *, bidirectional: bool = False) -> jax.Array:
    """A[n] {U_X} -> A[n] in 2 (N - 1) hops (Patarasuk and Yuan 2009); padded until N divides it."""
    chunk = ring_reduce_scatter(split(x, size(axes)), axes, bidirectional=bidirectional)
    return ring_all_gather(chunk, axes, bidirectional=bidirectional).reshape(-1)[: x.size]


def _ways(x: jax.Array, bidirectional: bool) -> Iterator[tuple[jax.Array, int]]:
    """(part of the last dim, direction of its ring): all of it, or each half."""
    half = x.shape[-1] // 2 if bidirectional else 0
    if half:
        yield x[..., :half], -1
    yield x[..., half:], 1


def _neighbours(axes: Axes, way: int) -> list[tuple[int, int]]:
    num = size(axes)
    return [(i, (i + way) % num) for i in range(num)]


def _hops(axes: Axes, hop: Callable[[Any, Any], Any], first: Any) -> Any:
    """hop(s, carried) for s in 0 .. N - 2."""
    num = size(axes)
    return jax.lax.fori_loop(0, num - 1, hop, first, unroll=num <= UNROLLED) if num > 1 else first


def _scatter(x_NC: jax.Array, axes: Axes, way: int) -> jax.Array:
    me, num = index(axes), size(axes)

    def chunk(i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x_NC, i % num, keepdims=False)

    def hop(s: Any, partial_C: jax.Array) -> jax.Array:
        # What arrives has passed s + 1 devices; after the last hop it is this device's own chunk.
        arrived_C = jax.lax.ppermute(partial_C, axes, _neighbours(axes, way))
        return arrived_C + chunk(me - way * (jnp.asarray(s, me.dtype) + 2))

    return _hops(axes, hop, chunk(me - way))


def _gather(x_C: jax.Array, axes: Axes, way: int) -> jax.Array:
    me, num = index(axes), size(axes)

    def put(whole_NC: jax.Array, x_C: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(whole_NC, x_C, i % num, 0)

    def hop(s: Any, carried: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        whole_NC, x_C = carried
        x_C = jax.lax.ppermute(x_C, axes, _neighbours(axes, way))
        return put(whole_NC, x_C, me - way * (jnp.asarray(s, me.dtype) + 1)), x_C

    first = put(jnp.zeros((num, *x_C.shape), x_C.dtype), x_C, me)
    return _hops(axes, hop, (first, x_C))[0]


# ---- the compiler's collectives, put together


def scatter_gather(x: jax.Array, axes: Axes) -> jax.Array:
    """A[n] {U_X} -> A[n] by the compiler's reduce-scatter and all-gather; padded until N divides it."""
    return hierarchical(x, axes, ())


def hierarchical(x: jax.Array, inner: Axes, outer: Axes) -> jax.Array:
    """A[n] {U_XY} -> A[n], X inner, Y outer: reduce-scatter within X, the shards' sum across Y, all-gather
    within X. So a device sends only 1 / size(X) of A over the slow network of Y.
    """
    chunk = split(x, size(inner)).reshape(-1)
    if inner:
        chunk = jax.lax.psum_scatter(chunk, inner, tiled=True)
    if outer:
        chunk = jax.lax.psum(chunk, outer)
    if inner:
        chunk = jax.lax.all_gather(chunk, inner, tiled=True)
    return chunk[: x.size]


def reduce_scatter(x: jax.Array, axes: Axes, dim: int | None) -> jax.Array:
    """A[I, J] {U_X} -> A[I_X, J] with I dim number `dim`; None: -> A[I, J], all-reduced."""
    if dim is None or not axes:
        return jax.lax.psum(x, axes) if axes else x
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)


def local_shard(x: jax.Array, axes: Axes, dim: int | None) -> jax.Array:
    """A[I, J] -> A[I_X, J], this device's shard of a replicated array, nothing sent; None: all of it."""
    if dim is None or not axes:
        return x
    rows = x.shape[dim] // size(axes)
    return jax.lax.dynamic_slice_in_dim(x, index(axes) * rows, rows, axis=dim)


# ---- pytrees


def by_bucket(
    reduce: Callable[[jax.Array], jax.Array], grads: PyTree, bucket_bytes: float
) -> PyTree:
    """Apply `reduce`, [n] -> [n], to leaves concatenated in buckets of one dtype and about bucket_bytes, so
    that small leaves share a message and the first buckets are sent while later gradients are computed. A
    leaf is never split.
    """
    leaves, structure = jax.tree.flatten(grads)
    out = list(leaves)
    for bucket in buckets(leaves, bucket_bytes):
        whole = reduce(jnp.concatenate([leaves[i].reshape(-1) for i in bucket]))
        start = 0
        for i in bucket:
            out[i] = whole[start : start + leaves[i].size].reshape(leaves[i].shape)
            start += leaves[i].size
    return jax.tree.unflatten(structure, out)


def buckets(leaves: list[Any], bucket_bytes: float) -> list[list[int]]:
    """Places in `leaves` (arrays or their shapes) that travel together, in order."""
    found: list[list[int]] = []
    open_: dict[Any, tuple[list[int], int]] = {}  # dtype -> its last bucket, bytes in it
    for i, leaf in enumerate(leaves):
        nbytes = leaf.size * leaf.dtype.itemsize
        bucket, held = open_.get(leaf.dtype, ([], 0))
        if not bucket or held + nbytes > bucket_bytes:
            bucket, held = [], 0
            found.append(bucket)
        bucket.append(i)
        open_[leaf.dtype] = bucket, held + nbytes
    return found


def split(x: jax.Array, num: int) -> jax.Array:
    """[n] -> [N, C], zeros at the end where N does not divide n."""
    return jnp.pad(x, (0, -x.size % num)).reshape(num, -1)


# ---- int8


class Placing(NamedTuple):
    """How the exchange of a replicated array is divided among the `ways` devices that hold a copy of it.

    exchanged: wraps a collective so that each of these devices sends 1 / ways of the last dim. alone: wraps a
    local computation on whole arrays that the compiler cannot partition. The defaults serve an array that one
    device holds: nothing is divided.
    """

    ways: int = 1
    exchanged: Callable[[Callable[[jax.Array], jax.Array]], Callable[[jax.Array], jax.Array]] = (
        lambda fn: fn
    )
    alone: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn


DIRECT = Placing()


def quantised(x_C: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """[..., C] -> int8 [..., C'], scales float32 [..., C' / block], C' the next multiple of `block`."""
    x_C = jnp.pad(x_C, [(0, 0)] * (x_C.ndim - 1) + [(0, -x_C.shape[-1] % block)])
    x_K = x_C.reshape(*x_C.shape[:-1], -1, block)
    scale = (jnp.max(jnp.abs(x_K), axis=-1) / 127).astype(jnp.float32)  # NaN stays NaN
    nonzero = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    q_K = jnp.clip(jnp.round(x_K / nonzero[..., None].astype(x_K.dtype)), -127, 127)
    return q_K.astype(jnp.int8).reshape(x_C.shape), scale


def dequantised(q_C: jax.Array, scale: jax.Array, like: jax.Array) -> jax.Array:
    """The array that `quantised` encoded, up to its rounding error; shape and dtype of `like`."""
    q_K = q_C.reshape(*scale.shape, -1).astype(like.dtype)
    x_C = (q_K * scale[..., None].astype(like.dtype)).reshape(*q_C.shape)
    return x_C[..., : like.shape[-1]]


def int8_reduce_scatter(
    x_NC: jax.Array, axes: Axes, block: int, by: Placing = DIRECT
) -> tuple[jax.Array, jax.Array]:
    """A[N, C] {U_X} -> A[N_X, C] by an all-to-all of int8: this device's chunk [C], and the
    quantisation error of its addend, [N, C].
    """
    q_NC, scale, error_NC = by.alone(functools.partial(_quantised, block=block))(x_NC)
    if axes:
        swap = by.exchanged(lambda x: jax.lax.all_to_all(x, axes, 0, 0, tiled=True))
        q_NC, scale = swap(q_NC), swap(scale)
    total = lambda q_NC, scale: dequantised(q_NC, scale, x_NC).sum(axis=0)
    return by.alone(total)(q_NC, scale), error_NC


def int8_all_gather(
    x_C: jax.Array, axes: Axes, block: int, by: Placing = DIRECT
) -> tuple[jax.Array, jax.Array]:
    """A[N_X, C] -> A[N, C] by an all-gather of int8: the gathered array, equal on every device, and the
    quantisation error of this device's chunk, [C].
    """
    q_C, scale, error_C = by.alone(functools.partial(_quantised, block=block))(x_C)
    if axes:
        gather = by.exchanged(lambda x: jax.lax.all_gather(x, axes))
        q_C, scale = gather(q_C), gather(scale)
    whole = lambda q, scale: dequantised(q, scale, x_C).reshape(size(axes), -1)
    return by.alone(whole)(q_C, scale), error_C


def _quantised(x_C: jax.Array, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`quantised`, and its rounding error."""
    q_C, scale = quantised(x_C, block)
    return q_C, scale, x_C - dequantised(q_C, scale, x_C)
