"""Parameters with logical dims, of one layer or stacked over layers, and their initial values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]  # (key, shape, dtype) -> values
he_normal: Init = jax.nn.initializers.he_normal()
lecun_normal: Init = jax.nn.initializers.lecun_normal()
zeros: Init = jax.nn.initializers.zeros
ones: Init = jax.nn.initializers.ones
constant: Callable[[float], Init] = jax.nn.initializers.constant


def param(rngs: nnx.Rngs, shape: tuple[int, ...], dims: tuple[str, ...], init: Init) -> nnx.Param:
    """A float32 parameter that carries its logical dims.

    Args:
        rngs: source of the key that `init` receives.
        shape: of the array.
        dims: one logical name for each dim of `shape`.
        init: draws the values.

    Raises:
        ValueError: `dims` and `shape` differ in length.
    """
    if len(dims) != len(shape):
        raise ValueError(f"{len(dims)} logical dims {dims} for a parameter of shape {shape}")
    return nnx.Param(init(rngs.params(), shape, jnp.float32), dims=dims)


def stacked_param(
    rngs: nnx.Rngs, layers: int, shape: tuple[int, ...], dims: tuple[str, ...], init: Init
) -> nnx.Param:
    """A parameter [layers, *shape] whose layers are drawn independently, each as one layer's would be.

    Args:
        rngs: source of the key, which is split over the layers.
        layers: how many; 0 gives the parameter of a single layer, [*shape].
        shape: of one layer's array.
        dims: logical dims of one layer's array.
        init: draws the values of one layer.
    """
    if not layers:
        return param(rngs, shape, dims, init)

    def draw_layers(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.vmap(lambda k: init(k, shape[1:], dtype))(jax.random.split(key, layers))

    return param(rngs, (layers, *shape), ("layers", *dims), draw_layers)
