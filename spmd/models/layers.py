"""Layers whose randomness and statistics do not depend on the mesh."""

# B batch, H height, W width, C channels, D input features, F output features, V rows of a table

from __future__ import annotations

import functools
import string
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spmd import narrow, scope, tree

Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
he_normal: Init = jax.nn.initializers.he_normal()
lecun_normal: Init = jax.nn.initializers.lecun_normal()


def param(rngs: nnx.Rngs, shape: tuple[int, ...], dims: tuple[str, ...], init: Init) -> nnx.Param:
    """A float32 parameter that carries its logical dims, one name for each dim of `shape`."""
    if len(dims) != len(shape):
        raise ValueError(f"{len(dims)} logical dims {dims} for a parameter of shape {shape}")
    return nnx.Param(init(rngs.params(), shape, jnp.float32), dims=dims)


def stacked(
    rngs: nnx.Rngs, layers: int, shape: tuple[int, ...], dims: tuple[str, ...], init: Init
) -> nnx.Param:
    """One parameter of `layers` layers, each drawn on its own, stacked first; 0 layers: of one, unstacked."""
    if not layers:
        return param(rngs, shape, dims, init)

    def each(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.vmap(lambda k: init(k, shape[1:], dtype))(jax.random.split(key, layers))

    return param(rngs, (layers, *shape), ("layers", *dims), each)


def contract(spec: str, dtype: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """einsum(spec, x, kernel) computed in x's type, returned as `dtype`; the kernel's gradient is summed in
    the kernel's own type, over tokens and over devices.

    Differentiated as written, a bfloat16 product would sum the gradients of float32 parameters in bfloat16.
    """
    product: Any = _contract(spec, dtype, x, kernel)
    return product


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(spec: str, dtype: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, kernel.astype(x.dtype), preferred_element_type=dtype)


def _contract_forward(spec, dtype, x, kernel):
    # The product itself, not a call of _contract, into which remat's policies do not look.
    product = jnp.einsum(spec, x, kernel.astype(x.dtype), preferred_element_type=dtype)
    return product, (x, kernel)


def _contract_backward(spec, dtype, kept, gradient):
    x, kernel = kept
    (left, right), out = spec.split("->")[0].split(","), spec.split("->")[1]
    gradient = gradient.astype(x.dtype)
    for_x = jnp.einsum(f"{out},{right}->{left}", gradient, kernel.astype(x.dtype))
    return for_x, _kernel_gradient(left, x, out, gradient, right, kernel)


def _kernel_gradient(left, x, out, gradient, right, kernel):
    """einsum("left,out->right", x, gradient), summed in the type of `kernel`."""
    dtype = kernel.dtype
    if scope.platform() != "cpu" or x.size <= gradient.size + kernel.size:
        return jnp.einsum(f"{left},{out}->{right}", x, gradient, preferred_element_type=dtype)
    # XLA's CPU backend turns the first factor by a slow copy, within the loop that makes it: let that be the
    # smaller one, and turn the product. The barrier keeps XLA from swapping them back.
    turned = "".join(sorted(right, key=lambda letter: letter in left))
    product = jnp.einsum(f"{out},{left}->{turned}", gradient, x, preferred_element_type=dtype)
    return jnp.einsum(f"{turned}->{right}", jax.lax.optimization_barrier(product))


_contract.defvjp(_contract_forward, _contract_backward)


def lookup(dtype: Any, table_VD: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a table as `dtype`, NaN for an index that it does not have; the gradient is summed in the
    table's own type.
    """
    rows: Any = _lookup(dtype, table_VD, index)
    return rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(dtype: Any, table_VD: jax.Array, index: jax.Array) -> jax.Array:
    return table_VD.astype(dtype).at[index].get(mode="fill")


def _lookup_forward(dtype, table_VD, index):
    return table_VD.astype(dtype).at[index].get(mode="fill"), (table_VD, index)


def _lookup_backward(dtype, kept, gradient):
    table_VD, index = kept
    rows = gradient.astype(table_VD.dtype)
    zeros_VD = jnp.zeros_like(table_VD)
    if scope.current().partial:
        # There XLA brings all rows to each device in any case, but its TPU partitioner ends the process over
        # a table that two axes cut. So they are brought first, and only the vocabulary is cut.
        index = scope.constrain(index, *(None,) * index.ndim)
        rows = scope.constrain(rows, *(None,) * rows.ndim)
        zeros_VD = scope.constrain(zeros_VD, "vocab", None)
        return scope.constrain(zeros_VD.at[index].add(rows, mode="drop"), "vocab", None), None
    return zeros_VD.at[index].add(rows, mode="drop"), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


class Linear(nnx.Module):
    """einsum(spec, x, kernel) + bias, of `layers` stacked layers (0: of one, unstacked).

    spec: as of einsum; dims, sizes: of one layer's kernel. std: of the initial kernel; 0 is 1 / sqrt(fan-in),
    truncated (lecun). gain: a factor on it.
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
        right, out = spec.split(",")[1].split("->")
        outer = tuple(i for i, letter in enumerate(right) if letter in out)
        inner = tuple(i for i in range(len(right)) if i not in outer)
        init: Init = jax.nn.initializers.normal(std * gain)
        if not std:
            init = jax.nn.initializers.variance_scaling(
                gain**2, "fan_in", "truncated_normal", in_axis=inner, out_axis=outer
            )
        self.kernel = stacked(rngs, layers, sizes, dims, init)
        shape, names = tuple(sizes[i] for i in outer), tuple(dims[i] for i in outer)
        zeros = jax.nn.initializers.zeros
        self.bias = stacked(rngs, layers, shape, names, zeros) if bias else None
        self.spec = spec

    def __call__(self, x: jax.Array) -> jax.Array:
        y = contract(self.spec, x.dtype, x, self.kernel[...])
        if self.bias is None:
            return y
        bias = self.bias[...]
        wide = tree.wide(x.dtype)  # so that the gradient of the bias is summed in it
        bias = bias.astype(wide).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return (y.astype(wide) + bias).astype(x.dtype)


class Norm(nnx.Module):
    """Normalises the last dim: by its root mean square (Zhang and Sennrich 2019), or `centred` (layer norm,
    Ba et al. 2016). At least float32 inside.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        size: int,
        dim: str,
        *,
        layers: int = 0,
        centred: bool = False,
        bias: bool = False,
        epsilon: float = 1e-5,
    ):
        ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros
        self.scale = stacked(rngs, layers, (size,), (dim,), ones)
        self.bias = stacked(rngs, layers, (size,), (dim,), zeros) if bias else None
        self.centred, self.epsilon = centred, epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = tree.wide(x.dtype)
        y = x.astype(wide)
        last = (1,) * (x.ndim - 1) + (-1,)
        if self.centred:
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        y *= self.scale[...].astype(wide).reshape(last)
        if self.bias is not None:
            y += self.bias[...].astype(wide).reshape(last)
        return y.astype(x.dtype)


class Dense(nnx.Module):
    """x[..., D] -> x[..., F], computed in `dtype` (default: the parameters')."""

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
        self.bias = param(rngs, shape[1:], dims[1:], jax.nn.initializers.zeros) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = self.dtype or self.kernel[...].dtype
        if narrow.is_narrow(dtype):
            return self._narrow(x.astype(dtype))
        y = x.astype(dtype) @ self.kernel[...].astype(dtype)
        if self.bias is not None:
            y += self.bias[...].astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y

    def _narrow(self, x: jax.Array) -> jax.Array:
        """Computed in x's type, with the gradients of kernel and bias summed in their own."""
        rows = string.ascii_lowercase[: x.ndim - 1]
        y = contract(f"{rows}y,yz->{rows}z", x.dtype, x, self.kernel[...])
        if self.bias is None:
            return y
        bias = self.bias[...].astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
        return (y.astype(jnp.float32) + bias).astype(x.dtype)


class Conv(nnx.Module):
    """x[B, H, W, C] -> x[B, H, W, F], a square kernel, SAME padding."""

    def __init__(self, rngs: nnx.Rngs, size: int, channels: int, features: int, dtype: str = ""):
        self.kernel = param(
            rngs,
            (size, size, channels, features),
            ("conv", "conv", "channels", "channels"),
            he_normal,
        )
        self.dtype = dtype

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        dtype = self.dtype or self.kernel[...].dtype
        if narrow.is_narrow(dtype):
            product: Any = _narrow_convolve(x_BHWC.astype(dtype), self.kernel[...])
            return product
        return convolve(x_BHWC.astype(dtype), self.kernel[...].astype(dtype))


def convolve(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Stride 1, SAME padding, both of one type."""
    return jax.lax.conv_general_dilated(
        x_BHWC, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def _narrow_convolve(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve` in x's type; the kernel's gradient is summed in its own, over pixels and over devices."""
    return convolve(x_BHWC, kernel.astype(x_BHWC.dtype))


def _narrow_convolve_forward(x_BHWC, kernel):
    return convolve(x_BHWC, kernel.astype(x_BHWC.dtype)), (x_BHWC, kernel)


def _narrow_convolve_backward(kept, gradient):
    x_BHWC, kernel = kept
    _, for_x = jax.vjp(lambda x: convolve(x, kernel.astype(x.dtype)), x_BHWC)
    wide = kernel.astype(jnp.float32)
    _, for_kernel = jax.vjp(functools.partial(convolve, x_BHWC.astype(wide.dtype)), wide)
    return for_x(gradient)[0], for_kernel(gradient.astype(wide.dtype))[0].astype(kernel.dtype)


_narrow_convolve.defvjp(_narrow_convolve_forward, _narrow_convolve_backward)


class BatchNorm(nnx.Module):
    """Batch normalisation over the global batch, padding left out (Ioffe and Szegedy 2015).

    Statistics reduce through scope.batch_mean, so each device normalises by the same numbers.
    """

    def __init__(self, features: int, momentum: float = 0.9, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(features), dims=("channels",))
        self.bias = nnx.Param(jnp.zeros(features), dims=("channels",))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.momentum, self.epsilon = momentum, epsilon
        self.use_running_average = False  # nnx's name: model.eval() sets it

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = tree.wide(x.dtype)  # statistics in bf16 lose the variance
        x_wide = x.astype(wide)
        last = (1,) * (x.ndim - 1) + (-1,)
        if self.use_running_average:
            mean, var = self.mean[...].astype(wide), self.var[...].astype(wide)
        else:
            dims = tuple(range(x.ndim - 1))
            mean = scope.batch_mean(x_wide, dims)
            var = scope.batch_mean(jnp.square(x_wide - mean.reshape(last)), dims)
            for stat, new in ((self.mean, mean), (self.var, var)):
                old = stat[...]
                stat[...] = self.momentum * old + (1 - self.momentum) * new.astype(old.dtype)
        y = (x_wide - mean.reshape(last)) * jax.lax.rsqrt(var + self.epsilon).reshape(last)
        y = y * self.scale[...].astype(wide).reshape(last) + self.bias[...].astype(wide).reshape(
            last
        )
        return y.astype(x.dtype)


class Dropout(nnx.Module):
    """Dropout with one key per example: the same mask whatever the mesh or the microbatch.

    nnx.Dropout draws one mask for the batch that it sees, which differs with the cut of the batch.
    """

    def __init__(self, rate: float):
        if not 0 <= rate < 1:
            raise ValueError(f"dropout rate {rate} must be in [0, 1)")
        self.rate = rate
        self.deterministic = False  # nnx's name: model.eval() sets it

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.deterministic or not self.rate:
            return x
        keep = 1 - self.rate
        mask = jax.vmap(lambda k: jax.random.bernoulli(k, keep, x.shape[1:]))(scope.next_keys())
        return jnp.where(mask, x / keep, jnp.zeros((), x.dtype))
