"""An encoder of texts (BERT): each token sees all of its text; logits of the text or of each token."""

# B batch, T time, D embed, C classes, V vocab

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spmd.core import tree
from spmd.core.fields import check, free
from spmd.models.attention.positions import TokenPositions, positions_or_default, token_positions
from spmd.models.feed_forward import Activation, activated
from spmd.models.layers import Dense, Dropout, Embedding
from spmd.models.layers.activations import Saved, matmul_input, residual
from spmd.models.layers.embedding import vocab_logits
from spmd.models.layers.initial import param, zeros
from spmd.models.stacked import StackedBlocks, StackedConfig
from spmd.parallel import scope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder(StackedConfig):
    """BERT's encoder (Devlin et al. 2019, arXiv 1810.04805): learned positions, norms after the sums."""

    vocab: int
    """Number of tokens."""
    length: int
    """Longest text, in tokens."""
    classes: int = 0
    """Number of logits of a text, or of a token; 0 where output is vocab."""
    types: int = 0
    """Token types (segments A and B of BERT: 2), whose embeddings are added; 0 is none."""
    output: Literal["text", "tokens", "vocab"] = "text"
    """Logits: classes of a text, classes of each token (tagging), or tokens that were hidden (masked language
    model)."""
    pool: Literal["mean", "first", "tanh"] = "mean"
    """Input of a text's head: the mean of its tokens, its first token, or that through a linear layer and
    tanh (BERT's pooler)."""
    bigrams: int = 0
    """Rows of a table of hashed pairs of neighbours, whose mean is added to the input of a text's head
    (fastText, Joulin et al. 2017, arXiv 1607.01759); 0 is none."""
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
            least = int(name != "classes" or self.has_classes)
            value = getattr(self, name)
            check(value >= least, f"model.{name}={value} must be at least {least}")
        for name in ("types", "bigrams"):
            value = getattr(self, name)
            check(value >= 0, f"model.{name}={value} must not be negative")
        check(
            not self.classes or self.has_classes,
            f"model.classes={self.classes}: with model.output=vocab logits are of tokens; leave it at 0",
        )
        check(
            self.output == "text" or not (self.bigrams or self.pool != "mean"),
            f"model.pool={self.pool} and model.bigrams={self.bigrams} are of a text's head, and the output is"
            f" {self.output}; leave them out",
        )
        super().__post_init__()
        check(self.mask == "full", "model.mask: an encoder sees both sides; leave it at full")

    @property
    def has_classes(self) -> bool:
        """Whether logits are of classes; those of a masked language model are of tokens."""
        return self.output != "vocab"

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with initial weights."""
        return TextEncoder(self, rngs)


class TextEncoder(StackedBlocks):
    """Embeddings of tokens, positions and types, a norm, blocks, logits [B, C] or [B, T, C] or [B, T, V].

    Called with tokens [B, T]; segments [B, T], 1 for a token and 0 for padding, or numbers of packed texts;
    types [B, T]; positions [B, T]. None are: no padding, type 0, positions 0, 1, ... along the row.
    """

    config: Encoder

    def __init__(self, config: Encoder, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        embed = config.embed
        init = jax.nn.initializers.normal(config.init_std or embed**-0.5)
        table = lambda rows, dim: Embedding(rngs, (rows, embed), dim, init)
        self.embed = table(config.vocab, "vocab")
        self.position = table(config.length, "position")
        self.norm = config.build_norm(rngs)  # of the embeddings, or of the output with norms first
        self.dropout = Dropout(config.dropout)
        square = lambda: Dense(rngs, (embed, embed), ("embed", "mlp"))
        head = lambda: Dense(rngs, (embed, config.classes), ("embed", "classes"))
        masked = config.output == "vocab"
        self.head = None if masked else head()
        self.types = table(config.types, "position") if config.types else None
        self.pooler = square() if config.pool == "tanh" else None
        self.bigrams = table(config.bigrams, "vocab") if config.bigrams else None
        self.transform = square() if masked else None
        self.transform_norm = config.build_norm(rngs) if masked else None
        self.vocab_bias = param(rngs, (config.vocab,), ("vocab",), zeros) if masked else None

    def enter(
        self,
        tokens_BT: Array,
        segments_BT: Array | None = None,
        types_BT: Array | None = None,
        positions_BT: Array | None = None,
    ) -> Array:
        """Input of the first block [B, T, D].

        Args:
            tokens_BT: tokens.
            segments_BT: number of each token's text, 0 for padding.
            types_BT: type of each; None is 0.
            positions_BT: index of each in its text; None is 0, 1, ...

        Returns:
            [B, T, D].
        """
        time, dtype = tokens_BT.shape[1], self.embed.table[...].dtype
        check(
            time <= self.config.length,
            f"a text of {time} tokens is longer than model.length={self.config.length}",
        )
        places_BT = jnp.maximum(positions_or_default(tokens_BT, positions_BT), 0)
        x_BTD = self.embed(tokens_BT, dtype) + self.position(places_BT, dtype)
        if self.types is not None:
            x_BTD += self.types(jnp.zeros_like(tokens_BT) if types_BT is None else types_BT, dtype)
        if self.config.norm_at == "sum":
            x_BTD = self.norm(x_BTD)
        with scope.layer(self.config.layers):  # a number that no block has
            return self.dropout(residual(x_BTD))

    def positions(self, x_BTD: Array, *inputs: Array | None) -> TokenPositions:
        """Positions and segments of the tokens."""
        tokens_BT, segments_BT, _, positions_BT = (*inputs, None, None, None)[:4]
        assert tokens_BT is not None
        return token_positions(tokens_BT, positions_BT, segments_BT, rotary=None, dtype=x_BTD.dtype)

    def leave(
        self,
        x_BTD: Array,
        tokens_BT: Array,
        segments_BT: Array | None = None,
        types_BT: Array | None = None,
        positions_BT: Array | None = None,
    ) -> Array:
        """Input of the head, [B, D] of a text, or [B, T, D].

        Args:
            x_BTD: output of the last block.
            tokens_BT: tokens.
            segments_BT: number of each token's text, 0 for padding.
            types_BT: not read.
            positions_BT: not read.

        Returns:
            [B, D] or [B, T, D].
        """
        del types_BT, positions_BT
        x_BTD = residual(x_BTD if self.config.norm_at == "sum" else self.norm(x_BTD))
        if self.transform is not None and self.transform_norm is not None:
            y_BTD = self.transform(matmul_input(x_BTD))
            return matmul_input(self.transform_norm(activated(self.config.activation, y_BTD)))
        if self.config.output == "tokens":
            return matmul_input(x_BTD)
        ones_BT = jnp.ones(tokens_BT.shape, jnp.int32)
        counted_BT = (ones_BT if segments_BT is None else segments_BT) > 0
        chosen_BT = counted_BT
        if self.config.pool != "mean":
            chosen_BT &= jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1) == 0
        x_BD = _mean(x_BTD, chosen_BT)
        if self.pooler is not None:
            x_BD = jnp.tanh(self.pooler(x_BD))
        if self.bigrams is not None:
            x_BD += self._bag(tokens_BT, counted_BT, x_BD.dtype)
        return x_BD

    def logits(self, x: Array) -> Array:
        """Logits [B, C], [B, T, C] or [B, T, V], from the input of the head."""
        if self.head is not None:
            return self.head(x)
        assert self.vocab_bias is not None
        table_VD = self.embed.table[...]
        logits_BTV = vocab_logits("btd,vd->btv", x, table_VD, vocab=self.config.vocab)
        return logits_BTV + self.vocab_bias[...].astype(logits_BTV.dtype).reshape(1, 1, -1)

    def _bag(self, tokens_BT: Array, counted_BT: Array, dtype: Any) -> Array:
        """Mean embedding [B, D] of the pairs of neighbours, in training after dropout."""
        assert self.bigrams is not None
        after = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
        spread = lambda x: x * jnp.uint32(HASH)
        pair_BT = spread(tokens_BT.astype(jnp.uint32)) + after(tokens_BT).astype(jnp.uint32)
        row_BT = (spread(pair_BT) >> 8) % jnp.uint32(self.config.bigrams)
        bag_BD = _mean(
            self.bigrams(row_BT.astype(jnp.int32), dtype), counted_BT & after(counted_BT)
        )
        with scope.layer(self.config.layers + 1):
            return self.dropout(bag_BD)


HASH = 2654435761  # Knuth's multiplier, odd: pairs are spread over the rows


def _mean(x_BTD: Array, chosen_BT: Array) -> Array:
    """Mean [B, D] of the chosen tokens, 0 without any; a sum over time, since time may be sharded."""
    real = tree.at_least_float32(x_BTD.dtype)
    share_BT = chosen_BT.astype(real)
    share_BT /= jnp.maximum(share_BT.sum(1, keepdims=True), 1)
    x_BD = jnp.sum(x_BTD.astype(real) * share_BT[..., None], axis=1)
    return matmul_input(x_BD[:, None].astype(x_BTD.dtype)).squeeze(1)
