"""Max-pooling.

The backward pass reads which pixel of a window was the largest. It must not compare pixels with the maximum:
XLA may compute them anew with another rounding, and then none of them equals it. XLA's own backward pass
(select-and-scatter) takes several times as long on a CPU.
"""

# B batch, H height, W width, C channels

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from spmd.models.layers.height import by_rows


def max_pool(x_BHWC: jax.Array, size: int, stride: int = 0) -> jax.Array:
    """Maximum over windows of size x size pixels; NaN is the largest.

    Pixels beyond the last whole window are left out. Windows that overlap are padded by (size - 1) // 2 on
    both sides, as in PyTorch's ResNets.

    Args:
        x_BHWC: images [B, H, W, C], floating.
        size: side of the window.
        stride: pixels between windows, at most `size`; 0 is `size`.

    Returns:
        [B, H / stride, W / stride, C].
    """
    stride = stride or size
    window: Any = functools.partial(_pool_overlapping, size, stride)
    if stride == size:
        window = functools.partial(_pool_apart, size)
    above = 0 if stride == size else (size - 1) // 2
    return by_rows(window, x_BHWC, size=size, stride=stride, above=above, fill=-math.inf)


def largest_of(pixels: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The largest of pixels, elementwise, and its number.

    Args:
        pixels: arrays of one shape.

    Returns:
        (maximum, its number: the first of equal ones), both of that shape; NaN is the largest.
    """
    kind = jnp.int8 if len(pixels) <= 2**7 else jnp.int32
    largest, index = pixels[0], jnp.zeros(pixels[0].shape, kind)
    for i, pixel in enumerate(pixels[1:], 1):
        larger = (pixel > largest) | jnp.isnan(pixel)
        largest, index = jnp.where(larger, pixel, largest), jnp.where(larger, kind(i), index)
    return largest, index


# ---- windows that do not overlap


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool_apart(size: int, x_BHWC: jax.Array) -> jax.Array:
    return _apart_forward(size, x_BHWC)[0]


def _apart_forward(size, x_BHWC):
    batch, height, width, channels = x_BHWC.shape
    rows, columns = height // size, width // size
    x_BHWC = x_BHWC[:, : rows * size, : columns * size]
    windows = x_BHWC.reshape(batch, rows, size, columns, size, channels)
    offsets = itertools.product(range(size), repeat=2)
    largest, index = largest_of([windows[:, :, i, :, j] for i, j in offsets])
    return largest, (index, height, width)


def _apart_backward(size, residuals, gradient):
    index, height, width = residuals
    batch, rows, columns, channels = gradient.shape
    number = jnp.arange(size * size, dtype=index.dtype).reshape(1, 1, size, 1, size, 1)
    is_largest = index[:, :, None, :, None] == number
    windows = jnp.where(is_largest, gradient[:, :, None, :, None], jnp.zeros((), gradient.dtype))
    image = windows.reshape(batch, rows * size, columns * size, channels)
    missing = ((0, 0), (0, height - rows * size), (0, width - columns * size), (0, 0))
    return (jnp.pad(image, missing),)


_pool_apart.defvjp(_apart_forward, _apart_backward)


# ---- windows that overlap


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pool_overlapping(size: int, stride: int, x_BHWC: jax.Array) -> jax.Array:
    return _overlapping_forward(size, stride, x_BHWC)[0]


def _overlapping_forward(size, stride, x_BHWC):
    margin = (size - 1) // 2
    sides = x_BHWC.shape[1:3]
    down, across = ((side + 2 * margin - size) // stride * stride + 1 for side in sides)
    pads = ((0, 0, 0), (margin, margin, 0), (margin, margin, 0), (0, 0, 0))
    padded = jax.lax.pad(x_BHWC, jnp.array(-jnp.inf, x_BHWC.dtype), pads)
    offsets = itertools.product(range(size), repeat=2)
    pixels = [padded[:, i : i + down : stride, j : j + across : stride] for i, j in offsets]
    largest, index = largest_of(pixels)
    return largest, (index, *sides)


def _overlapping_backward(size, stride, residuals, gradient):
    """The gradient of each pixel: the sum over the windows in which it is the largest.

    Padded pixels y = stride * row + phase are those number `phase`, phase + stride, ... of the windows row,
    row - 1, ...; the gradients of each pair of phases are computed together and then interleaved.
    """
    index, height, width = residuals
    zero, before = jnp.zeros((), gradient.dtype), (size - 1) // stride

    def of_phases(y: int, x: int) -> jax.Array:
        total = zero
        for i, j in itertools.product(range(y, size, stride), range(x, size, stride)):
            here = jnp.where(index == i * size + j, gradient, zero)
            down, across = i // stride, j // stride
            pads = ((0, 0), (down, before - down), (across, before - across), (0, 0))
            total += jnp.pad(here, pads)
        return total

    rows = [jnp.stack([of_phases(y, x) for x in range(stride)], axis=3) for y in range(stride)]
    batch, down, _, across, _, channels = (phases := jnp.stack(rows, axis=2)).shape
    image = phases.reshape(batch, down * stride, across * stride, channels)
    margin = (size - 1) // 2
    pads = [max(margin + height - down * stride, 0), max(margin + width - across * stride, 0)]
    image = jnp.pad(image, ((0, 0), (0, pads[0]), (0, pads[1]), (0, 0)))
    return (image[:, margin : margin + height, margin : margin + width],)


_pool_overlapping.defvjp(_overlapping_forward, _overlapping_backward)
