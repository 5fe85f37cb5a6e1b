"""Linear layers: an einsum with stacked layers, and a plain matrix."""

# D input features, F output features

from __future__ import annotations

import string

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.core import narrow, tree
from spmd.models.layers.initial import Init, lecun_normal, param, stacked_param, zeros
from spmd.models.layers.matmul import contract


class Linear(nnx.Module):
    """einsum(spec, x, kernel) + bias, its parameters stacked over layers.

    Args:
        rngs: source of the initial values.
        spec: einsum of x and one layer's kernel, as "btd,dhk->bthk".
        sizes: shape of one layer's kernel.
        dims: logical dims of one layer's kernel.
        layers: how many are stacked; 0 is a single layer, without the dim.
        bias: whether a bias is added, along the kernel's output dims.
        std: standard deviation of the initial kernel; 0 is 1 / sqrt(fan-in), truncated (LeCun).
        gain: factor on the standard deviation.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        spec: str,
        sizes: tuple[int, ...],
        dims: tuple[str, ...],
        *,
        layers: int = 0,
        bias: bool = False,
        std: float = 0.0,
        gain: float = 1.0,
    ):
        kernel_dims, out_dims = spec.split(",")[1].split("->")
        outer = tuple(i for i, letter in enumerate(kernel_dims) if letter in out_dims)
        inner = tuple(i for i in range(len(kernel_dims)) if i not in outer)
        init: Init = jax.nn.initializers.normal(std * gain)
        if not std:
            init = jax.nn.initializers.variance_scaling(
                gain**2, "fan_in", "truncated_normal", in_axis=inner, out_axis=outer
            )
        self.kernel = stacked_param(rngs, layers, sizes, dims, init)
        shape, names = tuple(sizes[i] for i in outer), tuple(dims[i] for i in outer)
        self.bias = stacked_param(rngs, layers, shape, names, zeros) if bias else None
        self.spec = spec

    def __call__(self, x: jax.Array) -> jax.Array:
        """The result of one layer, in the type of x."""
        y = contract(self.spec, x.dtype, x, self.kernel[...])
        if self.bias is None:
            return y
        bias = self.bias[...]
        dtype = tree.at_least_float32(x.dtype)  # so that the gradient of the bias is summed in it
        bias = bias.astype(dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return (y.astype(dtype) + bias).astype(x.dtype)


class Dense(nnx.Module):
    """x[..., D] @ kernel[D, F] + bias[F].

    Args:
        rngs: source of the initial values.
        shape: (D, F).
        dims: logical dims of the kernel.
        bias: whether a bias is added.
        init: draws the kernel.
        dtype: compute type; empty is that of the parameters.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        shape: tuple[int, int],
        dims: tuple[str, str],
        *,
        bias: bool = True,
        init: Init = lecun_normal,
        dtype: str = "",
    ):
        self.kernel = param(rngs, shape, dims, init)
        self.bias = param(rngs, shape[1:], dims[1:], zeros) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., F], in the compute type."""
        dtype = self.dtype or self.kernel[...].dtype
        if narrow.is_narrow(dtype):
            return self._narrow(x.astype(dtype))
        y = x.astype(dtype) @ self.kernel[...].astype(dtype)
        if self.bias is not None:
            y += self.bias[...].astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y

    def _narrow(self, x: jax.Array) -> jax.Array:
        """The same, the gradients of kernel and bias summed in their own types."""
        rows = string.ascii_lowercase[: x.ndim - 1]
        y = contract(f"{rows}y,yz->{rows}z", x.dtype, x, self.kernel[...])
        if self.bias is None:
            return y
        bias = self.bias[...].astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
        return (y.astype(jnp.float32) + bias).astype(x.dtype)
