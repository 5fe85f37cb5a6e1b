"""Residual networks for images of any size."""

# B batch, H height, W width, C channels, F output channels

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from flax import nnx

from spmd.core.fields import check
from spmd.models.layers import ConvConfig, ConvNorm, Dense, max_pool
from spmd.models.layers.conv_norm import check_image

# Blocks of each stage: for ImageNet (He et al. 2015, table 1), then for small images (section 4.2).
STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    20: (3, 3, 3),
    32: (5, 5, 5),
    44: (7, 7, 7),
    56: (9, 9, 9),
    110: (18, 18, 18),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNet(ConvConfig):
    """A residual network (He et al. 2015, arXiv 1512.03385), its stride in the 3x3 convolutions (v1.5), its
    last scales zero at first (Goyal et al. 2017, arXiv 1706.02677).

    Four stages after a 7x7 convolution and a pool (18, 34; bottlenecks: 50, 101, 152), or three after a 3x3
    convolution, for images of about 32 pixels (20, 32, 44, 56, 110).
    """

    depth: Literal[18, 34, 50, 101, 152, 20, 32, 44, 56, 110] = 50
    """Layers with weights."""
    width: int = 0
    """Channels of the first stage, doubled by each later one; 0 is 64, or 16 for small images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width >= 0, f"model.width={self.width} must not be negative")

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with initial weights."""
        return _ResNet(self, rngs)


class _ResNet(nnx.Module):
    def __init__(self, config: ResNet, rngs: nnx.Rngs):
        stages = STAGES[config.depth]
        self.channels, self.small = config.channels, len(stages) == 3
        width = config.width or (16 if self.small else 64)
        stem, stride = (3, 1) if self.small else (7, 2)
        self.stem = ConvNorm(config, rngs, stem, config.channels, width, stride=stride)
        block, expansion = (Bottleneck, 4) if config.depth >= 50 and not self.small else (Basic, 1)
        blocks: list[nnx.Module] = []
        features = width
        for stage, num_blocks in enumerate(stages):
            for i in range(num_blocks):
                stride = 2 if stage and not i else 1
                inner = width * 2**stage
                blocks.append(block(config, rngs, features, inner, stride))
                features = inner * expansion
        self.blocks = nnx.List(blocks)
        shape = (features, config.classes)
        self.head = Dense(rngs, shape, ("channels", "classes"), dtype=config.dtype)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> logits [B, classes]."""
        check_image(x_BHWC, self.channels)
        x_BHWC = jax.nn.relu(self.stem(x_BHWC))
        if not self.small:
            x_BHWC = max_pool(x_BHWC, 3, 2)
        for block in self.blocks:
            x_BHWC = block(x_BHWC)
        return self.head(x_BHWC.mean(axis=(1, 2)))


class Basic(nnx.Module):
    """x + norm(conv(relu(norm(conv(x))))): two 3x3 convolutions, then ReLU."""

    def __init__(
        self, config: ConvConfig, rngs: nnx.Rngs, channels: int, features: int, stride: int
    ):
        inwards, outwards = ("channels", "features"), ("features", "channels")
        self.first = ConvNorm(config, rngs, 3, channels, features, stride=stride, dims=inwards)
        self.second = ConvNorm(config, rngs, 3, features, features, dims=outwards, scale=0.0)
        self.shortcut = _shortcut(config, rngs, channels, features, stride)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / stride, W / stride, F]."""
        y_BHWF = self.second(jax.nn.relu(self.first(x_BHWC)))
        return jax.nn.relu(y_BHWF + (self.shortcut(x_BHWC) if self.shortcut else x_BHWC))


class Bottleneck(nnx.Module):
    """x + the result of 1x1, 3x3 and 1x1 convolutions, the last one to 4 F channels, then ReLU."""

    def __init__(
        self, config: ConvConfig, rngs: nnx.Rngs, channels: int, features: int, stride: int
    ):
        inwards, outwards = ("channels", "features"), ("features", "channels")
        self.first = ConvNorm(config, rngs, 1, channels, features)
        self.second = ConvNorm(config, rngs, 3, features, features, stride=stride, dims=inwards)
        self.third = ConvNorm(config, rngs, 1, features, 4 * features, dims=outwards, scale=0.0)
        self.shortcut = _shortcut(config, rngs, channels, 4 * features, stride)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / stride, W / stride, 4 F]."""
        y_BHWF = jax.nn.relu(self.second(jax.nn.relu(self.first(x_BHWC))))
        y_BHWF = self.third(y_BHWF)
        return jax.nn.relu(y_BHWF + (self.shortcut(x_BHWC) if self.shortcut else x_BHWC))


def _shortcut(
    config: ConvConfig, rngs: nnx.Rngs, channels: int, features: int, stride: int
) -> ConvNorm | None:
    """The projection of a block whose output is of another shape than its input."""
    if stride == 1 and channels == features:
        return None
    return ConvNorm(config, rngs, 1, channels, features, stride=stride)
