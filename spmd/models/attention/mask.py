"""Which keys a query sees: its document's, up to itself."""

# B batch, T time of queries, S time of keys

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_mask(time: int) -> jax.Array:
    """[1, T, T]: True where a key is at its query or before it."""
    index_T = jnp.arange(time, dtype=jnp.int32)
    return index_T.reshape(1, 1, -1) <= index_T.reshape(1, -1, 1)


def segment_mask(query_BT: jax.Array, key_BS: jax.Array) -> jax.Array:
    """[B, T, S]: True where query and key are of one document, by their segment numbers."""
    return query_BT[:, :, None] == key_BS[:, None, :]
