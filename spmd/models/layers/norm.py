"""Normalisation: over the last dim of each position, or over the global batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.core import tree
from spmd.models.layers.initial import constant, stacked_param, zeros
from spmd.parallel import scope


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) or LayerNorm (Ba et al. 2016, arXiv 1607.06450).

    Normalises the last dims together, at least in float32.

    Args:
        rngs: source of keys (the initial values are constant).
        sizes: of the last dims.
        dims: their logical names.
        layers: how many are stacked; 0 is a single layer, without the dim.
        centred: whether the mean is subtracted (LayerNorm).
        bias: whether a bias is added.
        epsilon: added to the mean of squares.
        offset: added to the scale, which starts at 1 - offset (Gemma: 1, so that weight decay pulls to 1).
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        sizes: tuple[int, ...],
        dims: tuple[str, ...],
        *,
        layers: int = 0,
        centred: bool = False,
        bias: bool = False,
        epsilon: float = 1e-5,
        offset: float = 0.0,
    ):
        self.scale = stacked_param(rngs, layers, sizes, dims, constant(1.0 - offset))
        self.bias = stacked_param(rngs, layers, sizes, dims, zeros) if bias else None
        self.centred, self.epsilon, self.offset = centred, epsilon, offset
        self.num_dims = len(sizes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., *sizes] normalised, in the type of x."""
        dtype = tree.at_least_float32(x.dtype)
        y, dims = x.astype(dtype), tuple(range(-self.num_dims, 0))
        last = (1,) * (x.ndim - self.num_dims) + x.shape[x.ndim - self.num_dims :]
        if self.centred:
            y -= y.mean(dims, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(dims, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(dtype)
        y *= (scale + self.offset if self.offset else scale).reshape(last)
        if self.bias is not None:
            y += self.bias[...].astype(dtype).reshape(last)
        return y.astype(x.dtype)


class BatchNorm(nnx.Module):
    """Batch normalisation over the global batch, padding excluded (Ioffe and Szegedy 2015, arXiv 1502.03167).

    Statistics are reduced by scope.batch_mean, so each device normalises by the same numbers.

    Args:
        features: size of the last dim.
        momentum: weight of the old running statistics.
        epsilon: added to the variance.
        dim: logical name of the last dim.
        scale: initial scale; 0 for the last norm of a residual branch (Goyal et al. 2017, arXiv 1706.02677).
    """

    def __init__(
        self,
        features: int,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        *,
        dim: str = "channels",
        scale: float = 1.0,
    ):
        self.scale = nnx.Param(jnp.full(features, scale), dims=(dim,))
        self.bias = nnx.Param(jnp.zeros(features), dims=(dim,))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.momentum, self.epsilon = momentum, epsilon
        self.use_running_average = False  # nnx's name: model.eval() sets it

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, ..., features] normalised; in training, the running statistics move."""
        dtype = tree.at_least_float32(x.dtype)  # statistics in bfloat16 lose the variance
        y = x.astype(dtype)
        last = (1,) * (x.ndim - 1) + (-1,)
        scale, bias = self.scale[...].astype(dtype), self.bias[...].astype(dtype)
        shift = None
        if self.use_running_average:
            mean, var = self.mean[...].astype(dtype), self.var[...].astype(dtype)
            y -= mean.reshape(last)
        else:
            dims = tuple(range(x.ndim - 1))
            mean = scope.batch_mean(y, dims)
            # The mean is not differentiated pixel by pixel. In the variance its derivative is 0, and in the
            # difference it is that of the bias: two sums over the pixels are left in the backward pass.
            constant = jax.lax.stop_gradient(mean)
            y -= constant.reshape(last)
            shift = mean - constant  # 0, with the mean's derivative
            var = scope.batch_mean(jnp.square(y), dims)
            for stat, new in ((self.mean, mean), (self.var, var)):
                old = stat[...]
                stat[...] = self.momentum * old + (1 - self.momentum) * new.astype(old.dtype)
        factor = jax.lax.rsqrt(var + self.epsilon) * scale
        if shift is not None:
            bias -= shift * factor
        return (y * factor.reshape(last) + bias.reshape(last)).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalisation of groups of channels over an image (Wu and He 2018, arXiv 1803.08494): the statistics of
    an example are its own, whatever the batch.

    Args:
        features: size of the last dim.
        groups: number of groups, which divides it.
        epsilon: added to the variance.
        dim: logical name of the last dim.
        scale: initial scale.
    """

    def __init__(
        self,
        features: int,
        groups: int,
        epsilon: float = 1e-5,
        *,
        dim: str = "channels",
        scale: float = 1.0,
    ):
        self.scale = nnx.Param(jnp.full(features, scale), dims=(dim,))
        self.bias = nnx.Param(jnp.zeros(features), dims=(dim,))
        self.groups, self.epsilon = groups, epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, ..., features] normalised, in the type of x; statistics at least in float32."""
        dtype = tree.at_least_float32(x.dtype)
        y = x.astype(dtype).reshape(*x.shape[:-1], self.groups, -1)
        dims = (*range(1, x.ndim - 1), x.ndim)
        y -= y.mean(dims, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(dims, keepdims=True) + self.epsilon)
        last = (1,) * (x.ndim - 1) + (-1,)
        scale, bias = (v[...].astype(dtype).reshape(last) for v in (self.scale, self.bias))
        return (y.reshape(x.shape) * scale + bias).astype(x.dtype)
