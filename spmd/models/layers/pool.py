"""Max-pooling."""

# B batch, H height, W width, C channels

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.models.layers.height import by_rows


def max_pool(x_BHWC: jax.Array, size: int, stride: int = 0) -> jax.Array:
    """Maximum over windows of size x size pixels.

    Pixels beyond the last whole window are left out. Windows that overlap are padded by (size - 1) // 2 on
    both sides, as in PyTorch's ResNets.

    Args:
        x_BHWC: images [B, H, W, C].
        size: side of the window.
        stride: pixels between windows; 0 is `size`.

    Returns:
        [B, H / stride, W / stride, C].
    """
    window = functools.partial(_max_pool, size=size, stride=stride)
    above = 0 if stride in (0, size) else (size - 1) // 2
    rows = {"size": size, "stride": stride or size, "above": above}
    return by_rows(window, x_BHWC, **rows, fill=-math.inf)


def _max_pool(x_BHWC: jax.Array, *, size: int, stride: int) -> jax.Array:
    if stride in (0, size):
        result: Any = _pool_apart(size, x_BHWC)
        return result
    margin = (size - 1) // 2
    padding: Any = ((margin, margin), (margin, margin))
    return nnx.max_pool(x_BHWC, (size, size), strides=(stride, stride), padding=padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool_apart(size: int, x_BHWC: jax.Array) -> jax.Array:
    """`max_pool` of windows that do not overlap.

    The backward pass reads which pixel was the largest. It must not compare pixels with the maximum: XLA may
    compute them anew with another rounding, and then none of them equals it.
    """
    return _largest(size, x_BHWC)[0]


def _largest(size: int, x_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(maximum of each window, number of its pixel: the first of equal ones); NaN is the largest."""
    batch, height, width, channels = x_BHWC.shape
    rows, columns = height // size, width // size
    x_BHWC = x_BHWC[:, : rows * size, : columns * size]
    windows = x_BHWC.reshape(batch, rows, size, columns, size, channels)
    largest = windows[:, :, 0, :, 0]
    index = jnp.zeros(largest.shape, jnp.int32)
    for i in range(1, size * size):
        pixel = windows[:, :, i // size, :, i % size]
        larger = (pixel > largest) | jnp.isnan(pixel)
        largest, index = jnp.where(larger, pixel, largest), jnp.where(larger, i, index)
    return largest, index


def _pool_forward(size, x_BHWC):
    largest, index = _largest(size, x_BHWC)
    return largest, (index, x_BHWC.shape)


def _pool_backward(size, residuals, gradient):
    index, (_, height, width, _) = residuals
    zero = jnp.zeros((), gradient.dtype)
    pixel = lambda i: jnp.where(index == i, gradient, zero)
    rows = [jnp.stack([pixel(i * size + j) for j in range(size)], axis=3) for i in range(size)]
    batch, down, _, across, _, channels = (windows := jnp.stack(rows, axis=2)).shape
    image = windows.reshape(batch, down * size, across * size, channels)
    missing = ((0, 0), (0, height - down * size), (0, width - across * size), (0, 0))
    return (jnp.pad(image, missing),)


_pool_apart.defvjp(_pool_forward, _pool_backward)
