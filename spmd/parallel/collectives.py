"""Collectives by hand, inside shard_map: rings of ppermute, hierarchies, int8 on the wire.

Notation as in the scaling book (jax-ml.github.io/scaling-book): A[I] {U_X} is a sum over the mesh axes X that
has not been taken yet, A[I_X] is cut over X. Several axes are one: their devices counted row-major, X in all.
"""

# N devices of the axes, C elements of a chunk, K of a block

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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
    """A[N, C] {U_X} -> A[N_X, C]; each device sends (N - 1) / N of A to a neighbour.

    Args:
        x_NC: [N, C] this device's summand.
        axes: X, of N devices.
        bidirectional: half of each chunk travels in the opposite direction, on the links' other lane.

    Returns:
        [C] this device's chunk of the sum.
    """
    parts = [_ring_scatter(x, axes, step) for x, step in _directions(x_NC, bidirectional)]
    return jnp.concatenate(parts)


def ring_all_gather(x_C: jax.Array, axes: Axes, *, bidirectional: bool = False) -> jax.Array:
    """A[N_X, C] -> A[N, C]; each device sends (N - 1) / N of A.

    Args:
        x_C: [C] this device's chunk.
        axes: X, of N devices.
        bidirectional: as in `ring_reduce_scatter`.

    Returns:
        [N, C] the chunks of all devices.
    """
    parts = [_ring_gather(x, axes, step) for x, step in _directions(x_C, bidirectional)]
    return jnp.concatenate(parts, axis=1)


def ring_all_reduce(x: jax.Array, axes: Axes, *, bidirectional: bool = False) -> jax.Array:
    """A[n] {U_X} -> A[n] in 2 (N - 1) hops (Patarasuk and Yuan 2009); padded until N divides it.

    Args:
        x: [n] this device's summand.
        axes: X, of N devices.
        bidirectional: as in `ring_reduce_scatter`.

    Returns:
        [n] the sum.
    """
    chunk = ring_reduce_scatter(split(x, size(axes)), axes, bidirectional=bidirectional)
    return ring_all_gather(chunk, axes, bidirectional=bidirectional).reshape(-1)[: x.size]


def _directions(x: jax.Array, bidirectional: bool) -> Iterator[tuple[jax.Array, int]]:
    """Parts of the last dim and the step of their ring: all of it forwards, or half in each direction."""
    half = x.shape[-1] // 2 if bidirectional else 0
    if half:
        yield x[..., :half], -1
    yield x[..., half:], 1


def _neighbours(axes: Axes, step: int) -> list[tuple[int, int]]:
    num = size(axes)
    return [(i, (i + step) % num) for i in range(num)]


def _hops(axes: Axes, hop: Callable[[Any, Any], Any], first: Any) -> Any:
    """hop(s, carried) for s in 0 .. N - 2."""
    num = size(axes)
    return jax.lax.fori_loop(0, num - 1, hop, first, unroll=num <= UNROLLED) if num > 1 else first


def _ring_scatter(x_NC: jax.Array, axes: Axes, step: int) -> jax.Array:
    rank, num = index(axes), size(axes)

    def chunk(i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x_NC, i % num, keepdims=False)

    def hop(s: Any, partial_C: jax.Array) -> jax.Array:
        # What arrives has passed s + 1 devices; after the last hop it is this device's own chunk.
        arrived_C = jax.lax.ppermute(partial_C, axes, _neighbours(axes, step))
        return arrived_C + chunk(rank - step * (jnp.asarray(s, rank.dtype) + 2))

    return _hops(axes, hop, chunk(rank - step))


def _ring_gather(x_C: jax.Array, axes: Axes, step: int) -> jax.Array:
    rank, num = index(axes), size(axes)

    def put(gathered_NC: jax.Array, x_C: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(gathered_NC, x_C, i % num, 0)

    def hop(s: Any, carried: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        gathered_NC, x_C = carried
        x_C = jax.lax.ppermute(x_C, axes, _neighbours(axes, step))
        return put(gathered_NC, x_C, rank - step * (jnp.asarray(s, rank.dtype) + 1)), x_C

    first = put(jnp.zeros((num, *x_C.shape), x_C.dtype), x_C, rank)
    return _hops(axes, hop, (first, x_C))[0]


# ---- the compiler's collectives, put together


def scatter_gather(x: jax.Array, axes: Axes) -> jax.Array:
    """A[n] {U_X} -> A[n] by the compiler's reduce-scatter and all-gather; padded until N divides it.

    Args:
        x: [n] this device's summand.
        axes: X, of N devices.

    Returns:
        [n] the sum.
    """
    return hierarchical(x, axes, ())


def hierarchical(x: jax.Array, inner: Axes, outer: Axes) -> jax.Array:
    """A[n] {U_XY} -> A[n]: reduce-scatter within X, the shards' sum across Y, all-gather within X.

    A device sends only 1 / size(X) of A over the slow network of Y.

    Args:
        x: [n] this device's summand.
        inner: X.
        outer: Y.

    Returns:
        [n] the sum.
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
    """A[I, J] {U_X} -> A[I_X, J].

    Args:
        x: [..., I, ...] this device's summand.
        axes: X.
        dim: the number of I; None all-reduces.

    Returns:
        This device's shard of the sum, of dim None all of it.
    """
    if dim is None or not axes:
        return jax.lax.psum(x, axes) if axes else x
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)


def local_shard(x: jax.Array, axes: Axes, dim: int | None) -> jax.Array:
    """A[I, J] -> A[I_X, J] of a replicated array; nothing is sent.

    Args:
        x: [..., I, ...] equal on all devices.
        axes: X.
        dim: the number of I; None keeps all.

    Returns:
        This device's shard.
    """
    if dim is None or not axes:
        return x
    rows = x.shape[dim] // size(axes)
    return jax.lax.dynamic_slice_in_dim(x, index(axes) * rows, rows, axis=dim)


def exchange_halo(
    x: jax.Array, axes: Axes, before: int, after: int, *, dim: int, fill: float = 0.0
) -> jax.Array:
    """A[I_X] -> the rows of each shard with those of its neighbours at both edges.

    Args:
        x: [..., I, ...] this device's shard, of at least `before` and `after` rows.
        axes: X, of N devices.
        before: rows of the device before.
        after: rows of the device after.
        dim: the number of I.
        fill: the rows that the first and the last device lack.

    Returns:
        [..., before + I + after, ...].
    """
    num, rank, rows = size(axes), index(axes), x.shape[dim]

    def receive(edge: jax.Array, step: int) -> jax.Array:
        pairs = [(i, i + step) for i in range(num) if 0 <= i + step < num]
        edge = jax.lax.ppermute(edge, axes, pairs)  # zeros where nothing arrives
        outermost = rank == (0 if step > 0 else num - 1)
        return jnp.where(outermost, jnp.asarray(fill, x.dtype), edge) if fill else edge

    part = lambda start, stop: jax.lax.slice_in_dim(x, start, stop, axis=dim)
    parts = [receive(part(rows - before, rows), 1)] if before else []
    parts += [x, *([receive(part(0, after), -1)] if after else [])]
    return jnp.concatenate(parts, axis=dim)


# ---- pytrees


def reduce_buckets(
    reduce: Callable[[jax.Array], jax.Array], grads: PyTree, bucket_bytes: float
) -> PyTree:
    """Reduce small leaves together, so that they share a message, and the first buckets while later gradients
    are computed.

    Args:
        reduce: [n] -> [n], of one dtype.
        grads: tree of arrays.
        bucket_bytes: size of a bucket, about; a leaf is never split.

    Returns:
        The tree of the results.
    """
    leaves, structure = jax.tree.flatten(grads)
    out = list(leaves)
    for bucket in buckets(leaves, bucket_bytes):
        total = reduce(jnp.concatenate([leaves[i].reshape(-1) for i in bucket]))
        start = 0
        for i in bucket:
            out[i] = total[start : start + leaves[i].size].reshape(leaves[i].shape)
            start += leaves[i].size
    return jax.tree.unflatten(structure, out)


def buckets(leaves: list[Any], bucket_bytes: float) -> list[list[int]]:
    """Choose the leaves that travel together.

    Args:
        leaves: arrays or their shapes.
        bucket_bytes: size of a bucket, about.

    Returns:
        Places in `leaves` by bucket, each of one dtype, in their order.
    """
    places: list[list[int]] = []
    last: dict[Any, tuple[list[int], int]] = {}  # dtype -> its last bucket, bytes in it
    for i, leaf in enumerate(leaves):
        nbytes = leaf.size * leaf.dtype.itemsize
        bucket, nbytes_held = last.get(leaf.dtype, ([], 0))
        if not bucket or nbytes_held + nbytes > bucket_bytes:
            bucket, nbytes_held = [], 0
            places.append(bucket)
        bucket.append(i)
        last[leaf.dtype] = bucket, nbytes_held + nbytes
    return places


def split(x: jax.Array, num: int) -> jax.Array:
    """[n] -> [N, C].

    Args:
        x: [n].
        num: N.

    Returns:
        [N, C], zeros at the end where N does not divide n.
    """
    return jnp.pad(x, (0, -x.size % num)).reshape(num, -1)


# ---- int8


def quantise(x_C: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Encode in 8 bits, each block by its largest magnitude.

    Args:
        x_C: [..., C].
        block: number of elements that share a scale.

    Returns:
        int8 [..., C'], C' the next multiple of `block`, and the scales, float32 [..., C' / block].
    """
    x_C = jnp.pad(x_C, [(0, 0)] * (x_C.ndim - 1) + [(0, -x_C.shape[-1] % block)])
    x_K = x_C.reshape(*x_C.shape[:-1], -1, block)
    scale = (jnp.max(jnp.abs(x_K), axis=-1) / 127).astype(jnp.float32)  # NaN stays NaN
    nonzero = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    q_K = jnp.clip(jnp.round(x_K / nonzero[..., None].astype(x_K.dtype)), -127, 127)
    return q_K.astype(jnp.int8).reshape(x_C.shape), scale


def dequantise(q_C: jax.Array, scale: jax.Array, like: jax.Array) -> jax.Array:
    """Decode what `quantise` encoded, up to its rounding error.

    Args:
        q_C: int8 [..., C'].
        scale: float32 [..., C' / block].
        like: an array [..., C] of the dtype of the result.

    Returns:
        [..., C].
    """
    q_K = q_C.reshape(*scale.shape, -1).astype(like.dtype)
    x_C = (q_K * scale[..., None].astype(like.dtype)).reshape(*q_C.shape)
    return x_C[..., : like.shape[-1]]
