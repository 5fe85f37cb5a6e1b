"""A small convolutional network with batch norm and dropout."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

import jax
from flax import nnx

from spmd.core.fields import check
from spmd.models.layers import BatchNorm, Conv, Dense, Dropout, max_pool
from spmd.models.layers.conv_norm import check_image


@dataclasses.dataclass(frozen=True, kw_only=True)
class CNN:
    """3x3 convolutions with batch norm and ReLU, a 2x2 max-pool after each, mean over space, logits."""

    channels: int = 1
    """Input channels."""
    features: tuple[int, ...] = (32, 64)
    """Channels of each stage."""
    classes: int = 10
    """Number of logits; 0 is that of the data's classes."""
    dropout: float = 0.0
    """Dropout rate before the logits."""
    dtype: Literal["", "bfloat16", "float32"] = ""
    """Compute type; empty is that of the parameters."""

    def __post_init__(self) -> None:
        for width in (self.channels, self.classes or 1, *self.features):
            check(width >= 1, f"model widths must be at least 1, given {width}")
        check(0 <= self.dropout < 1, f"model.dropout={self.dropout} must be in [0, 1)")

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Net(self, rngs)


class _Net(nnx.Module):
    def __init__(self, config: CNN, rngs: nnx.Rngs):
        self.channels = config.channels
        widths = (config.channels, *config.features)
        pairs = list(itertools.pairwise(widths))
        self.convs = nnx.List([Conv(rngs, 3, i, o, config.dtype) for i, o in pairs])
        self.norms = nnx.List([BatchNorm(o) for _, o in pairs])
        self.dropout = Dropout(config.dropout)
        self.head = Dense(
            rngs, (widths[-1], config.classes), ("embed", "classes"), dtype=config.dtype
        )

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> logits [B, classes]."""
        check_image(x_BHWC, self.channels)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BHWC = jax.nn.relu(norm(conv(x_BHWC)))
            x_BHWC = max_pool(x_BHWC, 2)
        return self.head(self.dropout(x_BHWC.mean(axis=(1, 2))))
