"""A vision transformer: an image as a sequence of patches."""

# B batch, H height, W width, C channels, T time (patches), D embed

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spmd.core import tree
from spmd.core.fields import check, free
from spmd.models.attention.positions import TokenPositions, token_positions
from spmd.models.blocks import BlockStack
from spmd.models.layers import Dense, Dropout, param
from spmd.models.layers.activations import Saved, matmul_input, residual
from spmd.models.layers.conv_norm import check_image
from spmd.models.stacked import StackedBlocks, StackedConfig
from spmd.parallel import scope


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViT(StackedConfig):
    """Vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929). The default is S/16; Ti/16: embed 192,
    heads 3; B/16: embed 768, heads 12.
    """

    image: int = 224
    """Side of the images, in pixels."""
    patch: int = 16
    """Side of a patch, in pixels."""
    channels: int = 3
    """Input channels."""
    classes: int = 1000
    """Number of logits; 0 is that of the data's classes."""
    layers: int = 12
    pool: Literal["token", "mean"] = "token"
    """Input of the head: a class token of its own, or the mean of the patches (Beyer et al. 2022)."""
    embed: int = 384
    heads: int = 6
    norm: Literal["rms", "layer"] = "layer"
    norm_epsilon: float = 1e-6
    activation: Literal["swiglu", "gelu", "gelu_exact"] = "gelu_exact"
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
        for name in ("image", "patch", "channels", "layers"):
            value = getattr(self, name)
            check(value >= 1, f"model.{name}={value} must be at least 1")
        check(self.classes >= 0, f"model.classes={self.classes} must not be negative")
        check(
            self.image % self.patch == 0,
            f"model.image={self.image} pixels do not divide into patches of model.patch={self.patch}",
        )
        check(not self.experts.num, "model.experts.num: a vision transformer has no experts")

    @property
    def length(self) -> int:
        """Patches of an image, the class token included."""
        return (self.image // self.patch) ** 2 + (self.pool == "token")

    @property
    def stacks(self) -> tuple[BlockStack, ...]:
        """The blocks."""
        return (self.stack_of(self.layers, length=self.length),)

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with initial weights."""
        return _ViT(self, rngs)


class _ViT(StackedBlocks):
    def __init__(self, config: ViT, rngs: nnx.Rngs):
        pixels = config.patch**2 * config.channels
        self.patches = Dense(rngs, (pixels, config.embed), ("input", "embed"), dtype=config.dtype)
        init = jax.nn.initializers.normal(config.init_std or config.embed**-0.5)
        self.position = param(rngs, (config.length, config.embed), ("position", "embed"), init)
        token = lambda: param(rngs, (1, config.embed), ("position", "embed"), init)
        self.token = token() if config.pool == "token" else None
        self.dropout = Dropout(config.dropout)
        super().__init__(config, rngs)
        self.norm = config.build_norm(rngs)
        shape, dims = (config.embed, config.classes), ("embed", "classes")
        self.head = Dense(rngs, shape, dims, dtype=config.dtype)

    def enter(self, x_BHWC: Array) -> Array:
        """Input of the first block [B, T, D]: the patches, padded until `context` divides them."""
        config = self.config
        check_image(x_BHWC, config.channels)
        check(
            x_BHWC.shape[1:3] == (config.image, config.image),
            f"images of {x_BHWC.shape[1]} x {x_BHWC.shape[2]} pixels and model.image={config.image}: resize"
            " or crop them",
        )
        x_BTD = self.patches(_split(x_BHWC, config.patch))
        if self.token is not None:
            token = self.token[...].astype(x_BTD.dtype)[None]
            x_BTD = jnp.concatenate([jnp.tile(token, (x_BTD.shape[0], 1, 1)), x_BTD], axis=1)
        x_BTD += self.position[...].astype(x_BTD.dtype)[None]
        x_BTD = jnp.pad(x_BTD, ((0, 0), (0, _padding(config.length)), (0, 0)))
        x_BTD = scope.constrain(x_BTD, "batch", None, "embed")  # what moves patches is not sharded
        with scope.layer(config.layers):  # a number that no block has
            return self.dropout(residual(x_BTD))

    def leave(self, x_BTD: Array, x_BHWC: Array) -> Array:
        """Input of the head [B, D]: the class token, or the mean of the patches.

        A sum over time, which only sums where time is sharded: a slice would be a permutation, which a
        pipeline cannot have in its last stage alone.
        """
        x_BTD = matmul_input(self.norm(x_BTD))
        num = self.config.length if self.token is None else 1
        real = tree.at_least_float32(x_BTD.dtype)
        share_T = (jnp.arange(x_BTD.shape[1]) < num).astype(real) / num
        x_BD = jnp.sum(x_BTD.astype(real) * share_T.reshape(1, -1, 1), axis=1)
        return x_BD.astype(x_BTD.dtype)

    def logits(self, x_BD: Array) -> Array:
        """Logits [B, classes]."""
        return self.head(x_BD)

    def positions(self, x_BTD: Array, *inputs: Array) -> TokenPositions:
        """Segment 1 for the patches, 0 for padding; no segments where nothing is padded."""
        rows, length = jax.lax.broadcasted_iota(jnp.int32, x_BTD.shape[:2], 1), self.config.length
        segments_BT = (rows < length).astype(jnp.int32) if x_BTD.shape[1] > length else None
        return token_positions(rows, rows, segments_BT, rotary=None, dtype=x_BTD.dtype)


def _split(x_BHWC: Array, patch: int) -> Array:
    """[B, T, pixels of a patch]: row by row, in a patch as in the image."""
    batch, height, width, channels = x_BHWC.shape
    rows, columns = height // patch, width // patch
    x = x_BHWC.reshape(batch, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def _padding(length: int) -> int:
    """Patches to add, so that the axes which shard time divide the sequence."""
    return -length % max(scope.num_shards("time"), scope.num_shards("residual_time"))
