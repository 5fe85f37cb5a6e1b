"""A digest of each array of a state: the same on every mesh, in any number of processes, on any device."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core.bits import mix

# Two lanes with keys of their own, from murmur3 and xxHash.
_LANES = ((0x9E3779B9, 0x85EBCA6B), (0x27D4EB2F, 0x165667B1))


def compute(leaves: Mapping[str, jax.Array]) -> jax.Array:
    """Digests uint32 [leaves, 2] in the order of the sorted names; computed asynchronously, on the devices.

    Each 32-bit word is mixed with its position by a bijection, and the results are summed modulo 2^32.
    Integer sums are exact in any order, so the sharding does not matter; one changed word always changes
    both sums.
    """
    arrays = [leaves[name] for name in sorted(leaves)]
    layout = arrays[0].sharding
    # Every process reads and saves all digests.
    replicated = NamedSharding(layout.mesh, P()) if isinstance(layout, NamedSharding) else layout
    return _sum(replicated)([_device_digests(x.sharding)(x) for x in arrays])


def find_differences(leaves: Mapping[str, jax.Array], stored: np.ndarray) -> list[str]:
    """Names of the leaves whose digest is not the stored one."""
    differs_L = (np.asarray(compute(leaves)) != stored).any(axis=1)
    return [
        name for name, is_different in zip(sorted(leaves), differs_L, strict=True) if is_different
    ]


def compute_runs(x: jax.Array, num: int) -> jax.Array:
    """Digests of runs of rows of an array; they add up to that of the array.

    Args:
        x: [rows, ...], sharded over its first dim at most.
        num: of runs, a divisor of the rows and a multiple of the shards.

    Returns:
        uint32 [num, 2], sharded as the array.
    """
    return _run_digests(x.sharding, num)(x)


@functools.cache
def _run_digests(layout: Any, num: int) -> Any:
    """The function of `compute_runs` for arrays of a sharding."""

    def digests(x: jax.Array, first: jax.Array, rows: int) -> jax.Array:
        length = rows // num
        runs = x.reshape(-1, length, *x.shape[1:])
        starts = first + jnp.arange(len(runs), dtype=jnp.uint32) * jnp.uint32(length)
        shape, rest = (rows, *x.shape[1:]), (None,) * (x.ndim - 1)
        return jax.vmap(lambda run, start: digest_block(run, shape, (start, *rest)))(runs, starts)

    if not isinstance(layout, NamedSharding) or not any(layout.spec):
        return jax.jit(lambda x: digests(x, jnp.uint32(0), len(x)))
    mesh, axes = layout.mesh, layout.spec[0]

    def sharded(x: jax.Array) -> jax.Array:
        def block(shard: jax.Array) -> jax.Array:
            first = lax.axis_index(axes).astype(jnp.uint32) * jnp.uint32(len(shard))
            return digests(shard, first, len(x))

        return jax.shard_map(block, mesh=mesh, in_specs=P(axes), out_specs=P(axes))(x)

    return jax.jit(sharded)


@functools.cache
def _device_digests(layout: Any) -> Any:
    """Digests uint32 [devices, 2] of an array: the summand of each device's block.

    A program for each shape, not one for all: that compiles ten times as fast. Without a collective in it:
    hundreds of those in flight can deadlock simulated devices.
    """
    if not isinstance(layout, NamedSharding):
        return jax.jit(lambda x: digest_block(x)[None])
    mesh, spec = layout.mesh, layout.spec

    def digests(x: jax.Array) -> jax.Array:
        dim_axes = [(a,) if isinstance(a, str) else a or () for a in (*spec, *(None,) * x.ndim)]
        copies = tuple(a for a in mesh.axis_names if not any(a in axes for axes in dim_axes))

        def block(shard: jax.Array) -> jax.Array:
            start = [
                lax.axis_index(axes).astype(jnp.uint32) * jnp.uint32(size) if axes else None
                for axes, size in zip(dim_axes, shard.shape, strict=False)
            ]
            sums = digest_block(shard, x.shape, start)
            first = lax.axis_index(copies) == 0 if copies else True
            return jnp.where(first, sums, jnp.zeros_like(sums))[None]

        sharded = jax.shard_map(block, mesh=mesh, in_specs=spec, out_specs=P(mesh.axis_names))
        return sharded(x)

    return jax.jit(digests)


@functools.cache
def _sum(sharding: Any) -> Any:
    add = lambda parts: jnp.stack(parts).sum(axis=1, dtype=jnp.uint32)
    return jax.jit(add, out_shardings=sharding)


def digest_block(
    x: jax.Array, shape: Sequence[int] = (), start: Sequence[jax.Array | None] = ()
) -> jax.Array:
    """Digest uint32 [2] of an array, or the summand of a block of it.

    shape: of the unsharded array. start: position of the block's first element by dim, None for 0.
    """
    words = _words(x)
    shape, start = shape or x.shape, start or (None,) * x.ndim
    index = jnp.zeros((), jnp.uint32)
    stride = len(words)
    for dim in reversed(range(x.ndim)):
        position = lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        if (first := start[dim]) is not None:
            position = position + first
        index = index + position * jnp.uint32(stride % 2**32)
        stride *= shape[dim]
    sums = jnp.zeros(2, jnp.uint32)
    for i, word in enumerate(words):
        offset = index + jnp.uint32(i)
        lanes = tuple(mix(word ^ (offset * jnp.uint32(m) + jnp.uint32(a))) for m, a in _LANES)
        zero = jnp.uint32(0)
        # Both lanes in one reduction: XLA fuses it with the above into one vectorised loop. Two
        # separate sums would write both mixed arrays to memory first, at a twentieth of the speed.
        add = lambda a, b: (a[0] + b[0], a[1] + b[1])
        sums = sums + jnp.stack(lax.reduce(lanes, (zero, zero), add, tuple(range(x.ndim))))
    return sums


def _words(x: jax.Array) -> list[jax.Array]:
    """The bits of each element as uint32 words, the lowest first; narrow elements take a word each."""
    if jnp.iscomplexobj(x):
        return [*_words(x.real), *_words(x.imag)]
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    low = x.astype(jnp.uint32)
    return [low, (x >> 32).astype(jnp.uint32)] if x.dtype.itemsize == 8 else [low]
