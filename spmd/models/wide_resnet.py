"""Wide residual networks for small images."""

# B batch, H height, W width, C channels, F output channels

from __future__ import annotations

import dataclasses
import functools

import jax
from flax import nnx

from spmd.core.fields import check
from spmd.models.layers import Conv, ConvConfig, Dense, Dropout
from spmd.models.layers.conv_norm import check_image, constrain_image


@dataclasses.dataclass(frozen=True, kw_only=True)
class WideResNet(ConvConfig):
    """A wide residual network (Zagoruyko and Komodakis 2016, arXiv 1605.07146): norms first, dropout between
    the convolutions of a block. WRN-28-10 is depth=28, widen=10.
    """

    depth: int = 28
    """Layers with weights: 6 n + 4."""
    widen: int = 10
    """Factor on the channels 16, 32 and 64 of the stages."""
    dropout: float = 0.0
    """Dropout rate within each block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.depth >= 10 and (self.depth - 4) % 6 == 0,
            f"model.depth={self.depth} must be 6 n + 4: 10, 16, 22, 28, 40 ...",
        )
        check(self.widen >= 1, f"model.widen={self.widen} must be at least 1")
        check(0 <= self.dropout < 1, f"model.dropout={self.dropout} must be in [0, 1)")

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with initial weights."""
        return _WideResNet(self, rngs)


class _WideResNet(nnx.Module):
    def __init__(self, config: WideResNet, rngs: nnx.Rngs):
        self.channels = config.channels
        self.stem = Conv(rngs, 3, config.channels, 16, config.dtype)
        blocks, channels = [], 16
        for stage in range(3):
            features = 16 * config.widen * 2**stage
            for i in range((config.depth - 4) // 6):
                stride = 2 if stage and not i else 1
                blocks.append(_Block(config, rngs, channels, features, stride))
                channels = features
        self.blocks = nnx.List(blocks)
        self.norm = config.build_norm(channels)
        shape = (channels, config.classes)
        self.head = Dense(rngs, shape, ("channels", "classes"), dtype=config.dtype)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> logits [B, classes]."""
        check_image(x_BHWC, self.channels)
        x_BHWC = self.stem(x_BHWC)
        for block in self.blocks:
            x_BHWC = block(x_BHWC)
        return self.head(jax.nn.relu(self.norm(x_BHWC)).mean(axis=(1, 2)))


class _Block(nnx.Module):
    """x + conv(dropout(relu(norm(conv(relu(norm(x)))))))."""

    def __init__(
        self, config: WideResNet, rngs: nnx.Rngs, channels: int, features: int, stride: int
    ):
        inwards, outwards = ("channels", "features"), ("features", "channels")
        conv = functools.partial(Conv, rngs, dtype=config.dtype)
        self.first_norm = config.build_norm(channels)
        self.first = conv(3, channels, features, stride=stride, dims=inwards)
        self.second_norm = config.build_norm(features, "features")
        self.dropout = Dropout(config.dropout)
        self.second = conv(3, features, features, dims=outwards)
        changes = stride > 1 or channels != features
        self.shortcut = conv(1, channels, features, stride=stride) if changes else None

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / stride, W / stride, F]."""
        y_BHWC = jax.nn.relu(self.first_norm(x_BHWC))
        skipped = self.shortcut(y_BHWC) if self.shortcut else x_BHWC
        y_BHWF = constrain_image(self.first(y_BHWC), "features")
        y_BHWF = self.dropout(jax.nn.relu(self.second_norm(y_BHWF)))
        return skipped + constrain_image(self.second(y_BHWF))
