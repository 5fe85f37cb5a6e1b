"""The unit of convolutional networks: a convolution and its norm."""

# B batch, H height, W width, C channels, F output channels

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from flax import nnx

from spmd.core.fields import check
from spmd.models.layers.conv import Conv
from spmd.models.layers.height import check_rows, height_dim
from spmd.models.layers.norm import BatchNorm, GroupNorm
from spmd.parallel import scope


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """Fields of models that are made of such units."""

    channels: int = 3
    """Input channels."""
    classes: int = 10
    """Number of logits; 0 is that of the data's classes."""
    norm: Literal["batch", "group"] = "batch"
    """Batch norm over the global batch, or group norm, which knows no batch."""
    groups: int = 16
    """Groups of channels of norm=group."""
    dtype: Literal["", "bfloat16", "float32"] = ""
    """Compute type; empty is that of the parameters."""

    def __post_init__(self) -> None:
        for name in ("channels", "groups"):
            value = getattr(self, name)
            check(value >= 1, f"model.{name}={value} must be at least 1")
        check(self.classes >= 0, f"model.classes={self.classes} must not be negative")

    def build_norm(self, features: int, dim: str = "channels", scale: float = 1.0) -> nnx.Module:
        """The norm of images with `features` channels; ValueError when the groups do not divide them.

        Args:
            features: channels C.
            dim: their logical dim.
            scale: initial scale.
        """
        if self.norm == "batch":
            return BatchNorm(features, dim=dim, scale=scale)
        check(
            features % self.groups == 0,
            f"model.groups={self.groups} does not divide {features} channels; use one of"
            f" {', '.join(str(n) for n in range(1, features + 1) if features % n == 0)}",
        )
        return GroupNorm(features, self.groups, dim=dim, scale=scale)


class ConvNorm(nnx.Module):
    """A convolution, then its norm.

    Args:
        config: kind of norm, compute type.
        rngs: source of the initial values.
        size: side of the kernel.
        channels: input channels C.
        features: output channels F.
        stride: pixels between outputs.
        dims: logical dims of input and output channels.
        scale: initial scale of the norm.
    """

    def __init__(
        self,
        config: ConvConfig,
        rngs: nnx.Rngs,
        size: int,
        channels: int,
        features: int,
        *,
        stride: int = 1,
        dims: tuple[str, str] = ("channels", "channels"),
        scale: float = 1.0,
    ):
        self.conv = Conv(rngs, size, channels, features, config.dtype, stride=stride, dims=dims)
        self.norm = config.build_norm(features, dims[1], scale)
        self.dim = dims[1]

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / stride, W / stride, F]."""
        return constrain_image(self.norm(constrain_image(self.conv(x_BHWC), self.dim)), self.dim)


def constrain_image(x_BHWC: jax.Array, dim: str = "channels") -> jax.Array:
    """Constrain the sharding of images [B, H, W, C], whose last dim is called `dim`.

    Rows are sharded where they divide (layers.height); columns are not.

    Args:
        x_BHWC: images.
        dim: logical dim of the channels.

    Returns:
        x.
    """
    return scope.constrain(x_BHWC, "batch", height_dim(x_BHWC), None, dim)


def check_image(x_BHWC: jax.Array, channels: int) -> None:
    """ValueError unless x is [B, H, W, channels], and its rows divide where convolutions shard them.

    Args:
        x_BHWC: images.
        channels: what the model takes.
    """
    check_channels(x_BHWC, channels)
    check_rows(x_BHWC)


def check_channels(x_BHWC: jax.Array, channels: int) -> None:
    """ValueError unless x is [B, H, W, channels].

    Args:
        x_BHWC: images.
        channels: what the model takes.
    """
    advice = f"; use --model.channels {x_BHWC.shape[3]}" if x_BHWC.ndim == 4 else ""
    check(
        x_BHWC.ndim == 4 and x_BHWC.shape[3] == channels,
        f"the model takes images [H, W, {channels}] (model.channels={channels}), given"
        f" {list(x_BHWC.shape[1:])}{advice}",
    )
