"""A digest of each array of a state: the same on every mesh, in any number of processes, on any device."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# Two lanes with keys of their own; the constants are those of murmur3, xxHash and Prospector's lowbias32.
_LANES = ((0x9E3779B9, 0x85EBCA6B), (0x27D4EB2F, 0x165667B1))


def of(leaves: Mapping[str, jax.Array]) -> jax.Array:
    """uint32 [leaves, 2], in the order of the sorted names; computed where the arrays lie, not waited for.

    Each 32-bit word is mixed with its position by a bijection, and the results are summed modulo 2^32. Integer
    sums are exact in any order, so the sharding does not matter; one changed word always changes both sums.
    """
    arrays = [leaves[name] for name in sorted(leaves)]
    placed = arrays[0].sharding
    # every process must be able to read and to save all of it
    whole = NamedSharding(placed.mesh, P()) if isinstance(placed, NamedSharding) else placed
    return _jitted(whole)(arrays)


def differing(leaves: Mapping[str, jax.Array], stored: np.ndarray) -> list[str]:
    """Names of the leaves whose digest is not the stored one."""
    bad = (np.asarray(of(leaves)) != stored).any(axis=1)
    return [name for name, differs in zip(sorted(leaves), bad, strict=True) if differs]


@functools.cache
def _jitted(whole: Any) -> Any:
    return jax.jit(lambda arrays: jnp.stack([one(x) for x in arrays]), out_shardings=whole)


def one(x: jax.Array) -> jax.Array:
    """uint32 [2]: the digest of one array. Elements below 32 bits are widened to a word each."""
    words = _words(x)
    index = jnp.zeros((), jnp.uint32)
    stride = len(words)
    for dim in reversed(range(x.ndim)):
        position = lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        index = index + position * jnp.uint32(stride % 2**32)
        stride *= x.shape[dim]
    sums = jnp.zeros(2, jnp.uint32)
    for i, word in enumerate(words):
        at = index + jnp.uint32(i)
        lanes = tuple(_mix(word ^ (at * jnp.uint32(m) + jnp.uint32(a))) for m, a in _LANES)
        zero = jnp.uint32(0)
        # Both lanes in one reduction: XLA fuses it with the above into one vectorised loop. Two
        # separate sums would write both mixed arrays to memory first, at a twentieth of the speed.
        add = lambda a, b: (a[0] + b[0], a[1] + b[1])
        sums = sums + jnp.stack(lax.reduce(lanes, (zero, zero), add, tuple(range(x.ndim))))
    return sums


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of uint32 in which each bit depends on each (lowbias32)."""
    h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return h ^ (h >> jnp.uint32(16))


def _words(x: jax.Array) -> list[jax.Array]:
    """The bits of each element as uint32 words, the lowest first."""
    if jnp.iscomplexobj(x):
        return [*_words(x.real), *_words(x.imag)]
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    low = x.astype(jnp.uint32)
    return [low, (x >> 32).astype(jnp.uint32)] if x.dtype.itemsize == 8 else [low]
