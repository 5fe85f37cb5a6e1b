"""A U-Net: images in, a class for each pixel out."""

# B batch, H height, W width, C channels, F output channels

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.core.fields import check
from spmd.models.layers import ConvConfig, ConvNorm, Dense, max_pool
from spmd.models.layers.conv_norm import check_image, constrain_image


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet(ConvConfig):
    """A U-Net (Ronneberger et al. 2015, arXiv 1505.04597) with padded convolutions and norms."""

    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of each level; the image halves from one to the next."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            len(self.widths) >= 2 and all(width >= 1 for width in self.widths),
            f"model.widths={self.widths} must be two or more, each at least 1",
        )

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with initial weights."""
        return _UNet(self, rngs)


class _UNet(nnx.Module):
    def __init__(self, config: UNet, rngs: nnx.Rngs):
        self.channels = config.channels
        pairs = list(itertools.pairwise((config.channels, *config.widths)))
        self.down = nnx.List([_Pair(config, rngs, i, o) for i, o in pairs])
        back = [(low, high) for high, low in itertools.pairwise(config.widths)][::-1]
        self.widen = nnx.List([_Widen(config, rngs, low, high) for low, high in back])
        self.up = nnx.List([_Pair(config, rngs, 2 * high, high) for _, high in back])
        shape = (config.widths[0], config.classes)
        self.head = Dense(rngs, shape, ("channels", "classes"), dtype=config.dtype)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> logits [B, H, W, classes]."""
        check_image(x_BHWC, self.channels)
        factor = 2 ** len(self.widen)
        check(
            all(size % factor == 0 for size in x_BHWC.shape[1:3]),
            f"images of {x_BHWC.shape[1]} x {x_BHWC.shape[2]} pixels do not halve {len(self.widen)} times"
            f" (model.widths); their sides must be multiples of {factor}: resize or crop them",
        )
        levels = []
        for i, pair in enumerate(self.down):
            x_BHWC = pair(max_pool(x_BHWC, 2) if i else x_BHWC)
            levels.append(x_BHWC)
        for high_BHWC, widen, pair in zip(levels[-2::-1], self.widen, self.up, strict=True):
            x_BHWC = pair(jnp.concatenate([widen(x_BHWC), high_BHWC], axis=-1))
        return self.head(x_BHWC)


class _Pair(nnx.Module):
    """Two 3x3 convolutions, each with its norm and ReLU."""

    def __init__(self, config: UNet, rngs: nnx.Rngs, channels: int, features: int):
        inwards, outwards = ("channels", "features"), ("features", "channels")
        self.first = ConvNorm(config, rngs, 3, channels, features, dims=inwards)
        self.second = ConvNorm(config, rngs, 3, features, features, dims=outwards)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, F]."""
        return jax.nn.relu(self.second(jax.nn.relu(self.first(x_BHWC))))


class _Widen(nnx.Module):
    """A transposed 2x2 convolution with stride 2: each pixel becomes four, by a matmul of its own."""

    def __init__(self, config: UNet, rngs: nnx.Rngs, channels: int, features: int):
        shape, dims = (channels, 4 * features), ("channels", "channels")
        self.dense = Dense(rngs, shape, dims, dtype=config.dtype)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, 2 H, 2 W, F]."""
        batch, height, width, _ = x_BHWC.shape
        y = self.dense(x_BHWC).reshape(batch, height, width, 2, 2, -1)
        y_BHWF = y.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, -1)
        return constrain_image(y_BHWF)
