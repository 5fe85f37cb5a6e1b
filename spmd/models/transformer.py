"""A decoder language model: GPT-2, Llama and their combinations."""

# B batch, T time, D embed, V vocab, L layers, S cached time, G key and value heads, K head_dim

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spmd.core.fields import check, free
from spmd.models.attention import Cache, RopeScaling, TokenPositions
from spmd.models.attention.cache import empty_cache
from spmd.models.attention.positions import Rotary, positions_or_default, token_positions
from spmd.models.blocks import BlockConfig, BlockStack
from spmd.models.layers import Dropout, Embedding, Linear
from spmd.models.layers.activations import Saved, matmul_input, residual
from spmd.models.layers.embedding import vocab_logits
from spmd.models.stacked import StackedBlocks
from spmd.parallel import scope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer(BlockConfig):
    """Decoder-only transformer (Vaswani et al. 2017, arXiv 1706.03762), norms first."""

    vocab: int
    """Number of tokens."""
    length: int
    """Longest sequence, in tokens."""
    layers: int = 4
    """Number of blocks."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary angles (RoPE), or a learned table of `length` rows."""
    rope_theta: float = 500_000.0
    """Base of the rotary angles (Llama 2: 10000, Llama 3: 500000)."""
    rope_theta_window: float = 0.0
    """That of blocks with a window, whose angles are not scaled (Gemma 3: 10000); 0: as of the others."""
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    """Slower rotary angles for longer sequences."""
    embed_scale: bool = False
    """Embeddings are multiplied by sqrt(embed), rounded to the compute type (Gemma)."""
    tied: bool = False
    """Whether the head is the embedding's table."""
    logit_cap: float = 0.0
    """Logits become cap * tanh(logits / cap) (Gemma 2: 30); 0 is off."""
    vocab_multiple: int = 1
    """The vocabulary is padded to a multiple of this (GPT-2 on GPUs: 128); padding is never predicted."""
    dtype: Literal["", "bfloat16", "float32"] = ""
    """Compute type; empty is that of the parameters. Norms, softmax and sums of gradients stay float32."""
    scan: bool = free(True)
    """Compile a single block and scan it over the layers; unrolled layers compile slower and run faster."""
    remat: Literal["none", "full", "dots", "named"] = free("none")
    """Which activations the backward pass rematerialises: none, all, all but matmuls, all but `saved`."""
    saved: tuple[Saved, ...] = free(("query", "key", "value", "attended"))
    """The activations that remat=named keeps."""

    def __post_init__(self) -> None:
        for name in ("vocab", "length", "layers", "vocab_multiple"):
            value = getattr(self, name)
            check(value >= 1, f"model.{name}={value} must be at least 1")
        check(
            self.layers >= self.experts.every,
            f"model.experts.every={self.experts.every} leaves none of the {self.layers} layers with experts",
        )
        check(self.logit_cap >= 0, f"model.logit_cap={self.logit_cap} must not be negative")
        super().__post_init__()
        check(
            self.position != "rope" or self.width % 2 == 0,
            f"rotary positions turn pairs: the head dim must be even, given {self.width};"
            " change model.embed or model.head_dim, or use model.position=learned",
        )

    @property
    def rows(self) -> int:
        """Rows of the embedding's table."""
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple

    @property
    def rotary(self) -> Rotary | None:
        """The rotary angles; None without."""
        angles = Rotary(self.width, self.rope_theta, self.rope_scaling)
        return angles if self.position == "rope" else None

    @property
    def window_rotary(self) -> Rotary | None:
        """Those of blocks with a window, where they are others."""
        angles = Rotary(self.width, self.rope_theta_window)
        return angles if self.position == "rope" and self.rope_theta_window else None

    @property
    def losses(self) -> dict[str, float]:
        """`{name: weight}` of the losses that a forward pass notes in its scope."""
        balance = self.experts.balance if self.experts.num else 0.0
        return {"balance": balance} if balance else {}

    @property
    def stacks(self) -> tuple[BlockStack, ...]:
        """The blocks."""
        return (self.stack_of(self.layers),)

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with initial weights."""
        return Decoder(self, rngs)


class Decoder(StackedBlocks):
    """Embedding, blocks, norm and logits [B, T, V]; decode is the cached form.

    Called with tokens [B, T] of packed documents, positions [B, T], the index of each token in its document
    (None is 0, 1, ... along the row), and segments [B, T], the number of its document (None is one for each
    row).
    """

    def __init__(self, config: Transformer, rngs: nnx.Rngs):
        std, shape = config.init_std, (config.embed, config.rows)
        init = jax.nn.initializers.normal(std or config.embed**-0.5)
        self.embed = Embedding(rngs, (config.rows, config.embed), "vocab", init)
        learned = lambda: Embedding(rngs, (config.length, config.embed), "position", init)
        self.position = learned() if config.position == "learned" else None
        self.dropout = Dropout(config.dropout)
        super().__init__(config, rngs)  # in this order, which decides the initial values
        self.norm = config.build_norm(rngs)
        head = lambda: Linear(rngs, "btd,dv->btv", shape, ("embed", "vocab"), std=std)
        self.head = None if config.tied else head()

    def enter(
        self, tokens_BT: Array, positions_BT: Array | None = None, segments_BT: Array | None = None
    ) -> Array:
        """Input of the first block [B, T, D].

        Args:
            tokens_BT: tokens.
            positions_BT: index of each; None is 0, 1, ...
            segments_BT: document of each.

        Returns:
            [B, T, D].
        """
        time, length = tokens_BT.shape[1], self.config.length
        check(time <= length, f"a sequence of {time} tokens is longer than model.length={length}")
        x_BTD = self.embed(tokens_BT, self._dtype)
        if self.config.embed_scale:
            x_BTD *= jnp.asarray(self.config.embed**0.5, x_BTD.dtype)
        if self.position is not None:
            positions_BT = positions_or_default(tokens_BT, positions_BT)
            x_BTD += self.position(jnp.maximum(positions_BT, 0), self._dtype)
        with scope.layer(self.config.layers):  # a number that no block has
            return self.dropout(residual(x_BTD))

    def positions(self, x_BTD: Array, *inputs: Array | None) -> TokenPositions:
        """Positions and segments of the tokens, and rotary angles."""
        tokens_BT, *packing = inputs
        assert tokens_BT is not None
        angles = {"rotary": self.config.rotary, "window_rotary": self.config.window_rotary}
        return token_positions(tokens_BT, *packing, **angles, dtype=x_BTD.dtype)

    def leave(self, x_BTD: Array, *inputs: Array | None) -> Array:
        """Input of the head [B, T, D], from the output of the last block."""
        return matmul_input(self.norm(x_BTD))

    def logits(self, x_BTD: Array) -> Array:
        """Logits [B, T, V], at least float32, from the input of the head."""
        spec, kernel = "btd,vd->btv", self.embed.table
        if self.head is not None:
            spec, kernel = self.head.spec, self.head.kernel
        config = self.config
        return vocab_logits(spec, x_BTD, kernel[...], vocab=config.vocab, cap=config.logit_cap)

    def cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for `length` tokens of each row, in the compute type; its dims: CACHE_DIMS."""
        config = self.config
        shape = (config.layers, batch_size, length, config.num_kv_heads, config.width)
        return empty_cache(shape, self._dtype)

    def decode(self, tokens_BT: Array, positions_BT: Array, cache: Cache) -> tuple[Array, Cache]:
        """(logits [B, T, V], the cache with these tokens in it).

        A prompt is given at once, then token by token. A token attends to the cache up to its position.

        Args:
            tokens_BT: tokens.
            positions_BT: index of each in its row; -1 is padding, so rows may differ in length.
            cache: of all layers.

        Returns:
            Logits, and the cache.
        """
        x_BTD = self.enter(tokens_BT, positions_BT)
        positions = self.positions(x_BTD, tokens_BT, positions_BT)
        x_BTD, new_cache = self.run_blocks(x_BTD, positions, cache)
        assert new_cache is not None
        return self.logits(self.leave(x_BTD)), new_cache

    @property
    def _dtype(self) -> Any:
        return jnp.dtype(self.config.dtype or self.embed.table[...].dtype)
