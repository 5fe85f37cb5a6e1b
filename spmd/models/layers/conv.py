"""Convolutions."""

# B batch, H height, W width, C channels, F output channels

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.core import narrow
from spmd.models.layers.height import by_rows
from spmd.models.layers.initial import he_normal, param
from spmd.parallel import scope


class Conv(nnx.Module):
    """A convolution with a square kernel, without a bias; output pixels are H / stride, rounded up.

    The padding is SAME, and with a stride the same on both sides (as in PyTorch, whose weights then fit).

    Args:
        rngs: source of the initial values.
        size: side of the kernel.
        channels: input channels C.
        features: output channels F.
        dtype: compute type; empty is that of the parameters.
        stride: pixels between outputs.
        dims: logical dims of input and output channels.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        size: int,
        channels: int,
        features: int,
        dtype: str = "",
        *,
        stride: int = 1,
        dims: tuple[str, str] = ("channels", "channels"),
    ):
        shape = (size, size, channels, features)
        self.kernel = param(rngs, shape, ("conv", "conv", *dims), he_normal)
        self.dtype, self.stride, self.dims = dtype, stride, dims

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / stride, W / stride, F], in the compute type."""
        kernel, size = self.kernel[...], self.kernel.shape[0]
        rows = {"size": size, "stride": self.stride, "above": (size - 1) // 2}
        return by_rows(self._convolve, x_BHWC, kernel, **rows, dims=self.dims)

    def _convolve(self, x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
        dtype = self.dtype or kernel.dtype
        if narrow.is_narrow(dtype):
            result: Any = _narrow_convolve(self.stride, x_BHWC.astype(dtype), kernel)
            return result
        x_BHWC, kernel = x_BHWC.astype(dtype), kernel.astype(dtype)
        if self.stride == 1 and _is_first(kernel) and scope.platform() == "cpu":
            first: Any = _first_convolve(x_BHWC, kernel)
            return first
        return convolve(self.stride, x_BHWC, kernel)


def convolve(stride: int, x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution [B, H / stride, W / stride, F] of two arrays of one type.

    Args:
        stride: step of the window along height and width.
        x_BHWC: images.
        kernel: [h, w, C, F].

    Returns:
        [B, H / stride, W / stride, F].
    """
    margin = (kernel.shape[0] - 1) // 2
    padding: Any = "SAME" if stride == 1 else [(margin, margin)] * 2
    return jax.lax.conv_general_dilated(
        x_BHWC, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _is_first(kernel: jax.Array) -> bool:
    """Whether a kernel is that of a first layer: few input channels, many output channels."""
    size, _, channels, features = kernel.shape
    return size * size * channels <= 32 and features >= 8 * channels


@jax.custom_vjp
def _first_convolve(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve` by a stride of 1, the kernel's gradient as a matmul of shifted images.

    XLA's CPU backend would transpose the gradient of the output, the largest array by far.
    """
    return convolve(1, x_BHWC, kernel)


def _first_convolve_forward(x_BHWC, kernel):
    return convolve(1, x_BHWC, kernel), (x_BHWC, kernel)


def _first_convolve_backward(residuals, gradient_BHWF):
    x_BHWC, kernel = residuals
    _, x_gradient = jax.vjp(lambda x: convolve(1, x, kernel), x_BHWC)
    size, _, _, _ = kernel.shape
    height, width = x_BHWC.shape[1:3]
    margin = ((size - 1) // 2, size // 2)
    x_CBHW = jnp.pad(x_BHWC, ((0, 0), margin, margin, (0, 0))).transpose(3, 0, 1, 2)
    shifts = [(i, j) for i in range(size) for j in range(size)]
    shifted = jnp.stack([x_CBHW[:, :, i : i + height, j : j + width] for i, j in shifts])
    kernel_gradient = jnp.einsum("kcbhw,bhwf->kcf", shifted, gradient_BHWF)
    return x_gradient(gradient_BHWF)[0], kernel_gradient.reshape(kernel.shape)


_first_convolve.defvjp(_first_convolve_forward, _first_convolve_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_convolve(stride: int, x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve` in x's type; the kernel's gradient is summed in float32, over pixels and over devices."""
    return convolve(stride, x_BHWC, kernel.astype(x_BHWC.dtype))


def _narrow_convolve_forward(stride, x_BHWC, kernel):
    return convolve(stride, x_BHWC, kernel.astype(x_BHWC.dtype)), (x_BHWC, kernel)


def _narrow_convolve_backward(stride, residuals, gradient):
    x_BHWC, kernel = residuals
    _, x_gradient = jax.vjp(lambda x: convolve(stride, x, kernel.astype(x.dtype)), x_BHWC)
    kernel_float32 = kernel.astype(jnp.float32)
    x_float32 = x_BHWC.astype(kernel_float32.dtype)
    _, kernel_gradient = jax.vjp(functools.partial(convolve, stride, x_float32), kernel_float32)
    gradient_float32 = gradient.astype(kernel_float32.dtype)
    return x_gradient(gradient)[0], kernel_gradient(gradient_float32)[0].astype(kernel.dtype)


_narrow_convolve.defvjp(_narrow_convolve_forward, _narrow_convolve_backward)
