"""Convolutions."""

# B batch, H height, W width, C channels, F output channels

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.core import narrow
from spmd.models.layers.initial import he_normal, param


class Conv(nnx.Module):
    """A convolution with a square kernel, stride 1 and SAME padding, without a bias.

    Args:
        rngs: source of the initial values.
        size: side of the kernel.
        channels: input channels C.
        features: output channels F.
        dtype: compute type; empty is that of the parameters.
    """

    def __init__(self, rngs: nnx.Rngs, size: int, channels: int, features: int, dtype: str = ""):
        shape, dims = (size, size, channels, features), ("conv", "conv", "channels", "channels")
        self.kernel = param(rngs, shape, dims, he_normal)
        self.dtype = dtype

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, F], in the compute type."""
        dtype = self.dtype or self.kernel[...].dtype
        if narrow.is_narrow(dtype):
            result: Any = _narrow_convolve(x_BHWC.astype(dtype), self.kernel[...])
            return result
        return convolve(x_BHWC.astype(dtype), self.kernel[...].astype(dtype))


def convolve(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution [B, H, W, F] with stride 1 and SAME padding, of two arrays of one type."""
    return jax.lax.conv_general_dilated(
        x_BHWC, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def _narrow_convolve(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve` in x's type; the kernel's gradient is summed in float32, over pixels and over devices."""
    return convolve(x_BHWC, kernel.astype(x_BHWC.dtype))


def _narrow_convolve_forward(x_BHWC, kernel):
    return convolve(x_BHWC, kernel.astype(x_BHWC.dtype)), (x_BHWC, kernel)


def _narrow_convolve_backward(residuals, gradient):
    x_BHWC, kernel = residuals
    _, x_gradient = jax.vjp(lambda x: convolve(x, kernel.astype(x.dtype)), x_BHWC)
    kernel_float32 = kernel.astype(jnp.float32)
    x_float32 = x_BHWC.astype(kernel_float32.dtype)
    _, kernel_gradient = jax.vjp(functools.partial(convolve, x_float32), kernel_float32)
    gradient_float32 = gradient.astype(kernel_float32.dtype)
    return x_gradient(gradient)[0], kernel_gradient(gradient_float32)[0].astype(kernel.dtype)


_narrow_convolve.defvjp(_narrow_convolve_forward, _narrow_convolve_backward)
