"""The cache of keys and values that decoding reads and extends."""

# L layers, B batch, T time, S cached time, G key and value heads, K head_dim

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from spmd.parallel import scope

Cache = dict[str, jax.Array]  # key, value: [L, B, S, G, K]; of one layer without L
CACHE_DIMS = ("layers", "batch", None, "kv_heads", "head_dim")


def empty_cache(shape: tuple[int, int, int, int, int], dtype: Any) -> Cache:
    """Zeros for the keys and values of all layers; shape: (L, B, S, G, K)."""
    return {name: jnp.zeros(shape, dtype) for name in ("key", "value")}


def update_cache(
    cache: Cache, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array
) -> Cache:
    """A layer's cache with new keys and values at their positions; those at -1 are dropped.

    Args:
        cache: keys and values [B, S, G, K] of the layer.
        k_BTGK: new keys.
        v_BTGK: new values.
        positions_BT: slot of each; -1 is padding.

    Returns:
        The cache, with them in it.
    """
    return {
        "key": _write(cache["key"], k_BTGK, positions_BT),
        "value": _write(cache["value"], v_BTGK, positions_BT),
    }


def _write(cache_BSGK: jax.Array, new_BTGK: jax.Array, positions_BT: jax.Array) -> jax.Array:
    length = cache_BSGK.shape[1]
    slot_BT = jnp.where(positions_BT < 0, length, positions_BT)
    write_row = lambda row, new, slot: row.at[slot].set(new, mode="drop")
    cache_BSGK = jax.vmap(write_row)(cache_BSGK, new_BTGK, slot_BT)
    return scope.constrain(cache_BSGK, *CACHE_DIMS[1:])
