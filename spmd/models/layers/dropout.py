"""Dropout with one key per example."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.parallel import scope


class Dropout(nnx.Module):
    """Dropout (Srivastava et al. 2014) with one key per example: the same mask on any mesh.

    nnx.Dropout draws one mask for the batch that it sees, which differs with the sharding of the batch and
    with the microbatches.

    Args:
        rate: share of the elements that become 0, in [0, 1); the others are divided by 1 - rate.

    Raises:
        ValueError: the rate is outside [0, 1).
    """

    def __init__(self, rate: float):
        if not 0 <= rate < 1:
            raise ValueError(f"dropout rate {rate} must be in [0, 1)")
        self.rate = rate
        self.deterministic = False  # nnx's name: model.eval() sets it

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, ...] with elements dropped; in evaluation, x."""
        if self.deterministic or not self.rate:
            return x
        keep = 1 - self.rate
        mask = jax.vmap(lambda k: jax.random.bernoulli(k, keep, x.shape[1:]))(scope.next_keys())
        return jnp.where(mask, x / keep, jnp.zeros((), x.dtype))
