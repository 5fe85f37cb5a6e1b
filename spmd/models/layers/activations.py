"""Sharding constraints and names of activations [B, T, ...]."""

from __future__ import annotations

from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from spmd.parallel import scope

Saved = Literal["query", "key", "value", "attended", "up", "gate"]


def time_dim(x: jax.Array, dim: str = "time") -> str | None:
    """Logical dim of x's dim 1; None for a single token, which cannot be sharded.

    Args:
        x: [B, T, ...].
        dim: the dim's name.

    Returns:
        The name, or None.
    """
    return dim if x.shape[1] > 1 else None


def residual(x_BTD: jax.Array) -> jax.Array:
    """The residual stream, constrained to its sharding.

    Args:
        x_BTD: residual stream.

    Returns:
        [B, T, D].
    """
    return scope.constrain(x_BTD, "batch", time_dim(x_BTD, "residual_time"), "embed")


def matmul_input(x_BTD: jax.Array) -> jax.Array:
    """The input of a matmul over D: gathered along time where the residual stream is sharded along it.

    Args:
        x_BTD: normed residual stream.

    Returns:
        [B, T, D].
    """
    return scope.constrain(x_BTD, "batch", time_dim(x_BTD), "embed")


def activation(name: Saved, x: jax.Array, *dims: str) -> jax.Array:
    """An activation [B, T, *dims], constrained and named for remat=named, which may save it.

    Args:
        name: name for the checkpoint policy.
        x: [B, T, *dims].
        dims: logical dims behind batch and time.

    Returns:
        x.
    """
    return checkpoint_name(scope.constrain(x, "batch", time_dim(x), *dims), name)
