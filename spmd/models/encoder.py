"""An encoder of texts: each token sees all of its text; a head on their mean, or on the first token."""

# B batch, T time, D embed, C classes

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
from spmd.models.feed_forward import Activation
from spmd.models.layers import Dense, Dropout, Embedding
from spmd.models.layers.activations import Saved, matmul_input, residual
from spmd.models.stacked import StackedBlocks, StackedConfig
from spmd.parallel import scope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder(StackedConfig):
    """BERT's encoder (Devlin et al. 2019, arXiv 1810.04805): learned positions, norms after the sums."""

    vocab: int
    """Number of tokens."""
    length: int
    """Longest text, in tokens."""
    classes: int
    """Number of logits of a text."""
    pool: Literal["mean", "first"] = "mean"
    """Input of the head: the mean of a text's tokens, or its first token."""
    mask: Literal["causal", "full"] = "full"
    """Keys that a token sees: all of its text (BERT)."""
    norm: Literal["rms", "layer"] = "layer"
    """RMSNorm or LayerNorm."""
    norm_at: Literal["input", "output", "both", "sum"] = "sum"
    """Where each layer has its norm: after the sum (BERT), or before the layer."""
    activation: Activation = "gelu_exact"
    """GELU by the error function (BERT), or another."""
    bias: bool = True
    """Biases in linear layers and in LayerNorm."""
    scan: bool = free(True)
    """Compile a single block and scan it over the layers; unrolled layers compile slower and run faster."""
    remat: Literal["none", "full", "dots", "named"] = free("none")
    """Which activations the backward pass rematerialises: none, all, all but matmuls, all but `saved`."""
    saved: tuple[Saved, ...] = free(("query", "key", "value", "attended"))
    """The activations that remat=named keeps."""

    def __post_init__(self) -> None:
        for name in ("vocab", "length", "classes", "layers"):
            check(
                getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1"
            )
        super().__post_init__()
        check(self.mask == "full", "model.mask: an encoder sees both sides; leave it at full")

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with initial weights."""
        return TextEncoder(self, rngs)


class TextEncoder(StackedBlocks):
    """Embeddings of tokens and positions, a norm, blocks, logits [B, C].

    Called with tokens [B, T] and segments [B, T], 1 for a token and 0 for padding; None without padding.
    """

    config: Encoder

    def __init__(self, config: Encoder, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        init = jax.nn.initializers.normal(config.init_std or config.embed**-0.5)
        self.embed = Embedding(rngs, (config.vocab, config.embed), "vocab", init)
        self.position = Embedding(rngs, (config.length, config.embed), "position", init)
        self.norm = config.build_norm(rngs)  # of the embeddings, or of the output with norms first
        self.dropout = Dropout(config.dropout)
        self.head = Dense(rngs, (config.embed, config.classes), ("embed", "classes"))

    def enter(self, tokens_BT: Array, segments_BT: Array | None = None) -> Array:
        """Input of the first block [B, T, D].

        Args:
            tokens_BT: tokens.
            segments_BT: 1 for a token, 0 for padding.

        Returns:
            [B, T, D].
        """
        time, dtype = tokens_BT.shape[1], self.embed.table[...].dtype
        check(
            time <= self.config.length,
            f"a text of {time} tokens is longer than model.length={self.config.length}",
        )
        places_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
        x_BTD = self.embed(tokens_BT, dtype) + self.position(places_BT, dtype)
        if self.config.norm_at == "sum":
            x_BTD = self.norm(x_BTD)
        with scope.layer(self.config.layers):  # a number that no block has
            return self.dropout(residual(x_BTD))

    def positions(
        self, x_BTD: Array, tokens_BT: Array, segments_BT: Array | None = None
    ) -> TokenPositions:
        """Positions and segments of the tokens."""
        return token_positions(tokens_BT, None, segments_BT, rotary=None, dtype=x_BTD.dtype)

    def leave(self, x_BTD: Array, tokens_BT: Array, segments_BT: Array | None = None) -> Array:
        """Input of the head [B, D], a sum over time in any case, since time may be sharded.

        Args:
            x_BTD: output of the last block.
            tokens_BT: tokens.
            segments_BT: 1 for a token, 0 for padding.

        Returns:
            [B, D].
        """
        x_BTD = residual(x_BTD if self.config.norm_at == "sum" else self.norm(x_BTD))
        real = tree.at_least_float32(x_BTD.dtype)
        ones_BT = jnp.ones(tokens_BT.shape, jnp.int32)
        counted_BT = (ones_BT if segments_BT is None else segments_BT) > 0
        if self.config.pool == "first":
            counted_BT &= jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1) == 0
        share_BT = counted_BT.astype(real)
        share_BT /= jnp.maximum(share_BT.sum(1, keepdims=True), 1)
        x_BD = jnp.sum(x_BTD.astype(real) * share_BT[..., None], axis=1)
        return matmul_input(x_BD[:, None].astype(x_BTD.dtype)).squeeze(1)

    def logits(self, x_BD: Array) -> Array:
        """Logits [B, C]."""
        return self.head(x_BD)
