"""Layers whose randomness and statistics do not depend on the mesh."""

# B batch, H height, W width, C channels, D input features, F output features

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spmd import scope, tree

Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
he_normal: Init = jax.nn.initializers.he_normal()
lecun_normal: Init = jax.nn.initializers.lecun_normal()


def param(rngs: nnx.Rngs, shape: tuple[int, ...], dims: tuple[str, ...], init: Init) -> nnx.Param:
    """A float32 parameter that carries its logical dims, one name for each dim of `shape`."""
    if len(dims) != len(shape):
        raise ValueError(f"{len(dims)} logical dims {dims} for a parameter of shape {shape}")
    return nnx.Param(init(rngs.params(), shape, jnp.float32), dims=dims)


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
        y = x.astype(dtype) @ self.kernel[...].astype(dtype)
        if self.bias is not None:
            y += self.bias[...].astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


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
        return jax.lax.conv_general_dilated(
            x_BHWC.astype(dtype),
            self.kernel[...].astype(dtype),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


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
