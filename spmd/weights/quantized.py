"""Frozen matrices stored in int8, with a scale for each output (QLoRA's storage, Dettmers et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from spmd.core import tree

PyTree = Any
VALUES, SCALE = "int8", "int8_scale"  # names of the parts of a stored matrix
LARGEST = 127


def quantize(kernel: jax.Array, axes: tuple[int, ...]) -> dict[str, jax.Array]:
    """A kernel as int8 values and scales: each output's largest magnitude is 127.

    So no value is further than half a scale from its own, the largest magnitude of its output / 254.

    Args:
        kernel: float.
        axes: its input dims, over which a scale is shared.

    Returns:
        {int8: of its shape, int8_scale: float32 at least, of size 1 along `axes`}.
    """
    kernel = kernel.astype(tree.at_least_float32(kernel.dtype))
    largest = jnp.max(jnp.abs(kernel), axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1) / LARGEST
    return {VALUES: jnp.round(kernel / scale).astype(jnp.int8), SCALE: scale}


def dequantize(stored: Mapping[str, jax.Array], dtype: Any) -> jax.Array:
    """The kernel that is stored: int8 values times their scales, in `dtype`."""
    scale = stored[SCALE]
    return (stored[VALUES].astype(scale.dtype) * scale).astype(dtype)


def shared_axes(values: Any, scale: Any) -> tuple[int, ...]:
    """The dims over which a scale is shared, from the shapes of both."""
    sizes = zip(values.shape, scale.shape, strict=True)
    return tuple(i for i, (size, of_scale) in enumerate(sizes) if of_scale == 1 != size)


def store(base: PyTree, axes: Mapping[str, tuple[int, ...]]) -> PyTree:
    """Parameters whose matrices `axes` (name: input dims) are stored in int8."""
    return tree.map_named(lambda n, x: quantize(x, axes[n]) if n in axes else x, base)


def restore(base: PyTree, dtypes: Mapping[str, Any], prefix: str = "") -> PyTree:
    """The parameters of `store`; dtypes: of the stored matrices, by name."""
    restored = {}
    for key, part in base.items():
        name = f"{prefix}{key}"
        if name in dtypes:
            restored[key] = dequantize(part, dtypes[name])
        else:
            restored[key] = restore(part, dtypes, f"{name}/") if isinstance(part, dict) else part
    return restored


def stored_dims(name: str, dims: tuple[Any, ...] | None, axes: tuple[int, ...]) -> dict[str, Any]:
    """Logical dims of the parts of a stored matrix."""
    of_scale = None if dims is None else tuple(None if i in axes else d for i, d in enumerate(dims))
    return {f"{name}/{VALUES}": dims, f"{name}/{SCALE}": of_scale}
