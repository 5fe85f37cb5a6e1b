"""SASRec: the next item from a user's history, by a causal transformer."""

# B batch, T time (items of a history), D embed, V items

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spmd.core import batches
from spmd.core.fields import check, free
from spmd.models.attention.positions import TokenPositions, token_positions
from spmd.models.layers import Dropout, Embedding
from spmd.models.layers.activations import matmul_input, residual
from spmd.models.layers.embedding import vocab_logits
from spmd.models.stacked import StackedBlocks, StackedConfig
from spmd.parallel import scope


@dataclasses.dataclass(frozen=True, kw_only=True)
class SASRec(StackedConfig):
    """Self-attentive sequential recommendation (Kang and McAuley 2018, arXiv 1808.09781), with a softmax over
    the complete catalogue in place of a negative for each item (Klenitskiy and Vasilev 2023, arXiv
    2309.07602).

    Histories are filled up on the left, so that positions count from the last item.
    """

    items: int = 0
    """Rows of items; 0 is that of the data."""
    length: int = 50
    """Longest history."""
    multiple: int = 8
    """The catalogue is padded to a multiple of this, so that devices divide it."""
    layers: int = 2
    embed: int = 64
    heads: int = 2
    norm: Literal["rms", "layer"] = "layer"
    activation: Literal["swiglu", "gelu", "gelu_exact"] = "gelu"
    bias: bool = True
    dropout: float = 0.3
    dtype: Literal["", "bfloat16", "float32"] = ""
    """Compute type; empty is that of the parameters."""
    scan: bool = free(True)
    """Compile a single block and scan it over the layers; unrolled layers compile slower and run faster."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "layers", "multiple"):
            value = getattr(self, name)
            check(value >= 1, f"model.{name}={value} must be at least 1")
        check(self.items >= 0, f"model.items={self.items} must not be negative")
        check(not self.experts.num, "model.experts.num: SASRec has no experts")
        check(self.mask == "causal", "model.mask: SASRec sees earlier items only; use causal")

    @property
    def vocab(self) -> int:
        """Items that may be predicted."""
        return self.items

    @property
    def rows(self) -> int:
        """Rows of the table of items."""
        return -(-self.items // self.multiple) * self.multiple

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with initial weights."""
        return _SASRec(self, rngs)


class _SASRec(StackedBlocks):
    def __init__(self, config: SASRec, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.init_std or config.embed**-0.5)
        self.embed = Embedding(rngs, (config.rows, config.embed), "vocab", init)
        self.position = Embedding(rngs, (config.length, config.embed), "position", init)
        self.dropout = Dropout(config.dropout)
        super().__init__(config, rngs)
        self.norm = config.build_norm(rngs)

    def enter(self, history_BT: Array) -> Array:
        """Input of the first block [B, T, D], from rows of items, -1 where a history has not begun."""
        time, length = history_BT.shape[1], self.config.length
        check(time <= length, f"a history of {time} items is longer than model.length={length}")
        x_BTD = self.embed(jnp.maximum(history_BT, 0), self._dtype)
        place_BT = jax.lax.broadcasted_iota(jnp.int32, history_BT.shape, 1) + (length - time)
        x_BTD += self.position(place_BT, self._dtype)
        with scope.layer(self.config.layers):  # a number that no block has
            return self.dropout(residual(x_BTD))

    def positions(self, x_BTD: Array, *inputs: Array) -> TokenPositions:
        """Segment 1 for items, 0 for what fills up."""
        valid_BT = (inputs[0] >= 0).astype(jnp.int32)
        return token_positions(inputs[0], None, valid_BT, rotary=None, dtype=x_BTD.dtype)

    def leave(self, x_BTD: Array, *inputs: Array) -> Array:
        """Input of the head [B, T, D]."""
        return matmul_input(self.norm(x_BTD))

    def logits(self, x_BTD: Array) -> Array:
        """Logits [B, T, V] of the items, by their rows; the catalogue is sharded as a vocabulary is."""
        table_VD = self.embed.table[...]
        return vocab_logits("btd,vd->btv", x_BTD, table_VD, vocab=self.config.items)

    def queries(self, batch: Mapping[str, Array]) -> Array:
        """Vectors [B, D] of histories, whose products with those of items are the logits."""
        history_BT = batches.wide_indices(batches.feature(batch, "history"))
        return self.hidden(history_BT)[:, -1]

    def candidates(self, batch: Mapping[str, Array]) -> Array:
        """Vectors [B, D] of items."""
        item_B = batches.wide_indices(batches.feature(batch, "item"))
        return self.embed(jnp.maximum(item_B, 0)[:, None], self._dtype)[:, 0]

    @property
    def _dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.dtype or self.embed.table[...].dtype)
