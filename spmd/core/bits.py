"""A hash of 32-bit words, whose results look random."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which each bit depends on each (lowbias32 of Chris Wellons).

    Args:
        x: uint32 [...].

    Returns:
        uint32 [...].
    """
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))
