"""A vision transformer: an image as a sequence of patches."""

# B batch, H height, W width, C channels, T time (patches), D embed

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from spmd.core import tree
from spmd.core.fields import check
from spmd.models.attention.positions import TokenPositions
from spmd.models.blocks import BlockStack
from spmd.models.layers import Dense
from spmd.models.layers.activations import matmul_input
from spmd.models.layers.initial import lecun_normal, zeros
from spmd.models.patches import PatchConfig, PatchEmbedding, padded_positions
from spmd.models.stacked import StackedBlocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViT(PatchConfig):
    """Vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929). The default is S/16; Ti/16: embed 192,
    heads 3; B/16: embed 768, heads 12.
    """

    layers: int = 12
    """Number of blocks."""
    pool: Literal["token", "mean"] = "token"
    """Input of the head: a class token of its own, or the mean of the patches (Beyer et al. 2022)."""
    zero_head: bool = False
    """Whether the head is zero at first, and with it the logits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.layers >= 1, f"model.layers={self.layers} must be at least 1")

    @property
    def length(self) -> int:
        """Patches of an image, the class token included."""
        return self.patches + (self.pool == "token")

    @property
    def stacks(self) -> tuple[BlockStack, ...]:
        """The blocks."""
        return (self.stack_of(self.layers, length=self.length),)

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with initial weights."""
        return _ViT(self, rngs)


class _ViT(PatchEmbedding, StackedBlocks):
    config: ViT

    def __init__(self, config: ViT, rngs: nnx.Rngs):
        token = config.pool == "token"
        PatchEmbedding.__init__(self, config, rngs, token=token, layers=config.layers)
        StackedBlocks.__init__(self, config, rngs)
        self.norm = config.build_norm(rngs)
        shape, dims = (config.embed, config.classes), ("embed", "classes")
        init = zeros if config.zero_head else lecun_normal
        self.head = Dense(rngs, shape, dims, init=init, dtype=config.dtype)

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
        """Those of the patches; padding is a segment of its own."""
        return padded_positions(x_BTD, self.config.length)
