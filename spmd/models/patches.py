"""Images as sequences of patches: the input of vision transformers."""

# B batch, H height, W width, C channels, T time (patches), D embed

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from spmd.core.fields import check, free
from spmd.models.attention.positions import TokenPositions, token_positions
from spmd.models.blocks import BlockConfig
from spmd.models.feed_forward import Activation
from spmd.models.layers import Dense, Dropout, param
from spmd.models.layers.activations import Saved, residual
from spmd.models.layers.conv_norm import check_channels
from spmd.parallel import scope


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchConfig(BlockConfig):
    """The base of configs of models that see an image as a sequence of patches."""

    image: int = 224
    """Side of the images, in pixels."""
    patch: int = 16
    """Side of a patch, in pixels."""
    channels: int = 3
    """Input channels."""
    classes: int = 1000
    """Number of logits; 0 is that of the data's classes."""
    position: Literal["learned", "sincos"] = "learned"
    """Added to a patch for its place: parameters, or sines and cosines of its row and column."""
    embed: int = 384
    heads: int = 6
    norm: Literal["rms", "layer"] = "layer"
    norm_epsilon: float = 1e-6
    activation: Activation = "gelu_exact"
    bias: bool = True
    mask: Literal["causal", "full"] = "full"
    dtype: Literal["", "bfloat16", "float32"] = ""
    """Compute type; empty is that of the parameters. Norms, softmax and sums of gradients stay float32."""
    scan: bool = free(True)
    """Compile a single block and scan it over the layers; unrolled layers compile slower and run faster."""
    remat: Literal["none", "full", "dots", "named"] = free("none")
    """Which activations the backward pass rematerialises: none, all, all but matmuls, all but `saved`."""
    saved: tuple[Saved, ...] = free(("query", "key", "value", "attended"))
    """The activations that remat=named keeps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image", "patch", "channels"):
            value = getattr(self, name)
            check(value >= 1, f"model.{name}={value} must be at least 1")
        check(self.classes >= 0, f"model.classes={self.classes} must not be negative")
        check(
            self.image % self.patch == 0,
            f"model.image={self.image} pixels do not divide into patches of model.patch={self.patch}",
        )
        check(not self.experts.num, "model.experts.num: a vision transformer has no experts")
        check(
            self.position == "learned" or self.embed % 4 == 0,
            f"model.position=sincos has a sine and a cosine of row and column: 4 must divide"
            f" model.embed={self.embed}",
        )

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2


class PatchEmbedding(nnx.Module):
    """The base of models of patches: it embeds them, with a class token before them or without.

    Args:
        config: sizes.
        rngs: source of the initial values.
        token: whether there is a class token.
        layers: number of the model's blocks, of which none draws the dropout of the embedding.
    """

    def __init__(self, config: PatchConfig, rngs: nnx.Rngs, *, token: bool, layers: int):
        self.config, self.num_layers = config, layers
        pixels, self.length = config.patch**2 * config.channels, config.patches + token
        self.patches = Dense(rngs, (pixels, config.embed), ("input", "embed"), dtype=config.dtype)
        init = jax.nn.initializers.normal(config.init_std or config.embed**-0.5)
        draw = lambda num: param(rngs, (num, config.embed), ("position", "embed"), init)
        self.position = draw(self.length) if config.position == "learned" else None
        self.token = draw(1) if token else None
        self.dropout = Dropout(config.dropout)

    def enter(self, x_BHWC: Array) -> Array:
        """Input of the first block [B, T, D]: the patches, padded until `context` divides them."""
        config = self.config
        check_channels(x_BHWC, config.channels)
        check(
            x_BHWC.shape[1:3] == (config.image, config.image),
            f"images of {x_BHWC.shape[1]} x {x_BHWC.shape[2]} pixels and model.image={config.image}: resize"
            " or crop them",
        )
        x_BTD = self.patches(_split(x_BHWC, config.patch))
        if self.position is None:
            x_BTD += jnp.asarray(grid_sinusoids(config), x_BTD.dtype)[None]
        if self.token is not None:
            token = self.token[...].astype(x_BTD.dtype)[None]
            x_BTD = jnp.concatenate([jnp.tile(token, (x_BTD.shape[0], 1, 1)), x_BTD], axis=1)
        if self.position is not None:
            x_BTD += self.position[...].astype(x_BTD.dtype)[None]
        with scope.layer(self.num_layers):
            return self.dropout(pad_sequence(x_BTD))


def pad_sequence(x_BTD: Array) -> Array:
    """The residual stream, padded until the axes that shard time divide it.

    Args:
        x_BTD: [B, T, D].

    Returns:
        [B, T', D], sharded as a residual stream is.
    """
    padding = -x_BTD.shape[1] % max(scope.num_shards("time"), scope.num_shards("residual_time"))
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, padding), (0, 0)))
    return residual(
        scope.constrain(x_BTD, "batch", None, "embed")
    )  # what moves patches is not sharded


def padded_positions(x_BTD: Array, length: int) -> TokenPositions:
    """Segment 1 for the first `length` tokens, 0 for padding; no segments where nothing is padded.

    Args:
        x_BTD: [B, T, D].
        length: tokens that are no padding.

    Returns:
        The positions of T tokens.
    """
    rows = jax.lax.broadcasted_iota(jnp.int32, x_BTD.shape[:2], 1)
    segments_BT = (rows < length).astype(jnp.int32) if x_BTD.shape[1] > length else None
    return token_positions(rows, rows, segments_BT, rotary=None, dtype=x_BTD.dtype)


def grid_sinusoids(config: PatchConfig) -> np.ndarray:
    """Sines and cosines of the column, then of the row, of each patch (Chen et al. 2021, arXiv 2104.02057,
    as Beyer et al. 2022, arXiv 2205.01580, use them): float64 [T, D].
    """
    side, num = config.image // config.patch, config.embed // 4
    rows, columns = np.mgrid[:side, :side].reshape(2, -1, 1).astype(np.float64)
    frequencies = 10_000.0 ** -(np.arange(num) / max(num - 1, 1))
    waves = [f(place * frequencies) for place in (columns, rows) for f in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1)


def _split(x_BHWC: Array, patch: int) -> Array:
    """[B, T, pixels of a patch]: row by row, in a patch as in the image."""
    batch, height, width, channels = x_BHWC.shape
    rows, columns = height // patch, width // patch
    x = x_BHWC.reshape(batch, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
