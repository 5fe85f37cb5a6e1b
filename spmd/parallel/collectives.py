"""Collectives by hand, inside shard_map: rings of ppermute, hierarchies, int8 on the wire.

Notation as in the scaling book (jax-ml.github.io/scaling-book): A[I] {U_X} is a sum over the mesh axes X that
has not been taken yet, A[I_X] is cut over X. Several axes are one: their devices counted row-major, X in all.
"""

# N devices of the axes, C elements of a chunk, K of a block

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.parallel import sharding

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
    parts = [_ring_scatter(x, axes, step) for x, step in _directions(x_NC, bidirectional)]
    return jnp.concatenate(parts)


def ring_all_gather(x_C: jax.Array, axes: Axes, *, bidirectional: bool = False) -> jax.Array:
    """A[N_X, C] -> A[N, C], from this device's chunk [C]; each device sends (N - 1) / N of A."""
    parts = [_ring_gather(x, axes, step) for x, step in _directions(x_C, bidirectional)]
    return jnp.concatenate(parts, axis=1)


def ring_all_reduce(x: jax.Array, axes: Axes, *, bidirectional: bool = False) -> jax.Array:
    """A[n] {U_X} -> A[n] in 2 (N - 1) hops (Patarasuk and Yuan 2009); padded until N divides it."""
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


def reduce_buckets(
    reduce: Callable[[jax.Array], jax.Array], grads: PyTree, bucket_bytes: float
) -> PyTree:
    """Apply `reduce`, [n] -> [n], to leaves concatenated in buckets of one dtype and about bucket_bytes, so
    that small leaves share a message and the first buckets are sent while later gradients are computed. A
    leaf is never split.
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
    """Places in `leaves` (arrays or their shapes) that travel together, in order."""
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
    """[n] -> [N, C], zeros at the end where N does not divide n."""
    return jnp.pad(x, (0, -x.size % num)).reshape(num, -1)


# ---- messages


class Communicator(NamedTuple):
    """The devices that exchange messages, trees of arrays, along mesh or vmap axes.

    size: number of them. copies: devices that hold identical copies of each array; every one sends 1 / copies
    of it. divide: wraps a collective of one array accordingly. replicate: wraps a local computation on
    replicated arrays that the compiler cannot partition. The defaults: one device holds each array.
    """

    axes: Axes
    size: int
    copies: int = 1
    divide: Callable[[Callable[[jax.Array], jax.Array]], Callable[[jax.Array], jax.Array]] = (
        lambda fn: fn
    )
    replicate: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn

    def all_to_all(self, message: PyTree) -> PyTree:
        """A[N, C] {different on each device} -> A[N, C]: row i is what device i had in this device's row."""
        if not self.axes:
            return message
        swap = self.divide(lambda x: jax.lax.all_to_all(x, self.axes, 0, 0, tiled=True))
        return jax.tree.map(swap, message)

    def all_gather(self, message: PyTree) -> PyTree:
        """A[N_X, C] -> A[N, C], from this device's [C]."""
        if not self.axes:
            return jax.tree.map(lambda x: x[None], message)
        gather = self.divide(lambda x: jax.lax.all_gather(x, self.axes))
        return jax.tree.map(gather, message)

    def pad(self, x: jax.Array) -> jax.Array:
        """[k] -> [k'], zeros at the end until the copies divide it."""
        return jnp.pad(x, (0, -x.size % self.copies))


def divide_among_copies(group: Communicator, mesh: Mesh, axes: Axes) -> Communicator:
    """Split each message among the devices that hold identical copies of it, so that each sends 1/n of it.

    Within a shard_map over the mesh `axes` the exchange is a shard_map over the others; under a vmap the
    compiler makes it, from the sharding of its operand.
    """
    others = tuple(axis for axis in mesh.axis_names if axis not in axes and mesh.shape[axis] > 1)
    copies = math.prod(mesh.shape[axis] for axis in others)

    def shard_map(fn: Callable[..., Any], in_specs: P, out_specs: P) -> Callable[..., Any]:
        # That replicated arrays are equal on all devices is not in their types.
        return jax.shard_map(
            fn, in_specs=in_specs, out_specs=out_specs, check_vma=False, **sharding.manual(mesh)
        )

    def divide(fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        last = lambda ndim: P(*(None,) * (ndim - 1), others)
        shard = lambda x: sharding.constrain(x, NamedSharding(mesh, last(x.ndim)))

        def run(x: jax.Array) -> jax.Array:
            if copies == 1 or x.shape[-1] % copies:
                return fn(x)
            if not sharding.inside():
                return shard(fn(shard(x)))
            return shard_map(fn, last(x.ndim), last(jax.eval_shape(fn, x).ndim))(x)

        return run

    def replicate(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: shard_map(fn, P(), P())(*args)

    return group._replace(copies=copies, divide=divide, replicate=replicate)


# ---- int8


def quantise(x_C: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """[..., C] -> int8 [..., C'], scales float32 [..., C' / block], C' the next multiple of `block`."""
    x_C = jnp.pad(x_C, [(0, 0)] * (x_C.ndim - 1) + [(0, -x_C.shape[-1] % block)])
    x_K = x_C.reshape(*x_C.shape[:-1], -1, block)
    scale = (jnp.max(jnp.abs(x_K), axis=-1) / 127).astype(jnp.float32)  # NaN stays NaN
    nonzero = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    q_K = jnp.clip(jnp.round(x_K / nonzero[..., None].astype(x_K.dtype)), -127, 127)
    return q_K.astype(jnp.int8).reshape(x_C.shape), scale


def dequantise(q_C: jax.Array, scale: jax.Array, like: jax.Array) -> jax.Array:
    """The array that `quantise` encoded, up to its rounding error; shape and dtype of `like`."""
    q_K = q_C.reshape(*scale.shape, -1).astype(like.dtype)
    x_C = (q_K * scale[..., None].astype(like.dtype)).reshape(*q_C.shape)
    return x_C[..., : like.shape[-1]]
