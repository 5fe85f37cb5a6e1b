"""The module of an encoder-decoder: embedding, two stacks of blocks, cross-attention, cached decoding."""

# B batch, T time, S time of the source, D embed, V vocab, R buckets of a relative bias, H heads

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spmd.core.fields import check
from spmd.models.attention.cache import Cache, empty_cache
from spmd.models.attention.multihead import Memory
from spmd.models.attention.positions import (
    Rotary,
    TokenPositions,
    positions_or_default,
    sinusoids,
    token_positions,
)
from spmd.models.attention.relative import RelativeBias
from spmd.models.blocks import Block
from spmd.models.layers import Dropout, Embedding, Linear
from spmd.models.layers.activations import matmul_input, residual
from spmd.models.layers.embedding import vocab_logits
from spmd.models.layers.initial import param
from spmd.models.stack import ALL_LAYERS, Chunk, LayerStack, Stack
from spmd.parallel import scope

if TYPE_CHECKING:
    from spmd.models.encoder_decoder import EncoderDecoder

ENCODER, DECODER = "encoder", "decoder"


class DecoderCache(NamedTuple):
    """Keys and values that decoding reads: of earlier tokens, and of the encoded source.

    own: [L, B W, T, G, K] of the tokens of W rows for each source. memory: [L, B, S, G, K] of its tokens.
    segments_BS: 1 for the tokens of a source, 0 for padding.
    """

    own: Cache
    memory: Cache
    segments_BS: Array


class Translator(nnx.Module):
    """Embedding, the blocks of encoder and decoder, norms and logits.

    The stream is {memory [B, S, D], x [B, T, D]}: the encoder's blocks transform the memory, those of the
    decoder x, while the memory travels with it. A pipeline runs enter, through, between and leave.
    """

    stream: ClassVar[dict[str, Any]] = {
        "memory": ("batch", "residual_time", "embed"),
        "x": ("batch", "residual_time", "embed"),
    }

    def __init__(self, config: EncoderDecoder, rngs: nnx.Rngs):
        self.config = config
        init = jax.nn.initializers.normal(config.init_std or config.embed**-0.5)
        self.embed = Embedding(rngs, (config.vocab, config.embed), "vocab", init)
        self.dropout = Dropout(config.dropout)
        self.encoder = Block(config.encoder, rngs, config.encoder_layers)
        self.encoder_norm = config.build_norm(rngs)
        self.decoder = Block(config, rngs, config.layers, cross=True)
        self.decoder_norm = config.build_norm(rngs)
        self.stack = Stack(config.scan, config.remat, config.saved)
        shape, dims = (config.embed, config.vocab), ("embed", "vocab")
        head = lambda: Linear(rngs, "btd,dv->btv", shape, dims, std=config.init_std)
        self.head = None if config.tied else head()

    def __call__(self, tokens_BT: Array, source_BS: Array, *packing: Array | None) -> Array:
        """Logits [B, T, V].

        Args:
            tokens_BT: tokens of the target, each before the one that its logits predict.
            source_BS: tokens of the source.
            packing: of packed pairs the positions and the segments of the target [B, T], then those of the
                source [B, S]; None each where a row is one pair. Padding has segment 0.
        """
        return self.logits(self.hidden(tokens_BT, source_BS, *packing))

    def hidden(self, *inputs: Array | None) -> Array:
        """Input of the head [B, T, D]."""
        stream = self.through(self.enter(*inputs), *inputs, chunk=Chunk(ENCODER))
        stream = self.between(stream, *inputs, stack=DECODER)
        return self.leave(self.through(stream, *inputs, chunk=Chunk(DECODER)), *inputs)

    @property
    def stacks(self) -> tuple[LayerStack, ...]:
        """The blocks of the encoder, then those of the decoder."""
        return self.config.stacks

    def enter(self, *inputs: Array | None) -> dict[str, Array]:
        """The stream into the encoder: the embeddings of both sides."""
        (tokens_BT, positions_BT, _), (source_BS, positions_BS, _) = _sides(*inputs)
        layers = self.config.encoder_layers + self.config.layers
        return {
            "memory": self._embed(source_BS, positions_BS, layer=layers),
            "x": self._embed(tokens_BT, positions_BT, layer=layers + 1),
            **self._tables(),
        }

    def through(
        self, stream: dict[str, Array], *inputs: Array | None, chunk: Chunk = ALL_LAYERS
    ) -> dict[str, Array]:
        """The stream behind blocks of the encoder, or of the decoder.

        Args:
            stream: `memory` [B, S, D] and `x` [B, T, D].
            inputs: the model's inputs.
            chunk: stack and first layer of these blocks.

        Returns:
            The stream, one of its arrays replaced.
        """
        target, source = _sides(*inputs)
        memory_BSD, x_BTD = stream["memory"], stream["x"]
        bias = self._bias(chunk.stack, stream)
        if chunk.stack == ENCODER:
            memory_BSD = self._run(self.encoder, memory_BSD, source, chunk.first, bias=bias)
        else:
            # Numbers that no block of the encoder has, so that dropout differs.
            first = self.config.encoder_layers + chunk.first
            memory = Memory(matmul_input(memory_BSD), source[2])
            x_BTD = self._run(self.decoder, x_BTD, target, first, memory, bias=bias)
        return stream | {"memory": memory_BSD, "x": x_BTD}

    def between(
        self, stream: dict[str, Array], *inputs: Array | None, stack: str
    ) -> dict[str, Array]:
        """The stream into the decoder: the memory is the normed output of the encoder.

        Args:
            stream: `memory` [B, S, D] and `x` [B, T, D].
            inputs: the model's inputs.
            stack: the stack that follows.

        Returns:
            The stream.
        """
        return stream | {"memory": residual(self.encoder_norm(stream["memory"]))}

    def leave(self, stream: dict[str, Array], *inputs: Array | None) -> Array:
        """Input of the head [B, T, D], from the stream behind the decoder."""
        x_BTD = self.decoder_norm(stream["x"])
        if self.config.head_scale:
            x_BTD *= jnp.asarray(self.config.embed**-0.5, x_BTD.dtype)
        return matmul_input(x_BTD)

    def logits(self, x_BTD: Array) -> Array:
        """Logits [B, T, V], at least float32, from the input of the head."""
        spec, kernel = "btd,vd->btv", self.embed.table
        if self.head is not None:
            spec, kernel = self.head.spec, self.head.kernel
        return vocab_logits(spec, x_BTD, kernel[...], vocab=self.config.vocab)

    def encode(
        self, source_BS: Array, segments_BS: Array, length: int, rows: int = 1
    ) -> DecoderCache:
        """The encoded sources, and empty caches for the tokens of their targets.

        Args:
            source_BS: tokens of the sources, from position 0 on.
            segments_BS: 1 for a token, 0 for padding behind them.
            length: most tokens of a target.
            rows: targets of each source, decoded side by side (beams).

        Returns:
            The cache that `decode` takes.
        """
        config, batch = self.config, source_BS.shape[0]
        x_BSD = self._embed(source_BS, None, layer=0)
        side = (source_BS, None, segments_BS)
        x_BSD = self._run(self.encoder, x_BSD, side, 0, bias=self._bias(ENCODER, self._tables()))
        x_BSD = matmul_input(residual(self.encoder_norm(x_BSD)))

        def project(block: Block, x_BSD: Array, _: None) -> tuple[Array, dict[str, Any]]:
            assert block.cross is not None
            return x_BSD, {"memory": block.cross.project_memory(x_BSD)}

        memory = self.stack(self.decoder, x_BSD, project)[1]["memory"]
        shape = (config.layers, batch * rows, length, config.num_kv_heads, config.width)
        return DecoderCache(empty_cache(shape, x_BSD.dtype), memory, segments_BS)

    def decode(
        self, tokens_BT: Array, positions_BT: Array, cache: DecoderCache
    ) -> tuple[Array, DecoderCache]:
        """(logits [B, T, V], the cache with these tokens in it), for tokens of the targets.

        Args:
            tokens_BT: tokens, each before the one that its logits predict.
            positions_BT: index of each in its target.
            cache: of the sources and the earlier tokens; B is its sources times rows.

        Returns:
            Logits, and the cache.
        """
        x_BTD = self._embed(tokens_BT, positions_BT, layer=0)
        positions = self._positions((tokens_BT, positions_BT, None), x_BTD.dtype)
        positions = positions._replace(bias=self._bias(DECODER, self._tables()))

        def apply(block: Block, x_BTD: Array, layer: Any) -> tuple[Array, dict[str, Any]]:
            memory = Memory(None, cache.segments_BS, layer["memory"])
            return block(x_BTD, positions, layer["own"], memory=memory)

        inputs = {"own": cache.own, "memory": cache.memory}
        x_BTD, outputs = self.stack(self.decoder, x_BTD, apply, inputs)
        logits_BTV = self.logits(self.leave({"x": x_BTD}))
        return logits_BTV, cache._replace(own=outputs["cache"])

    def _embed(self, tokens_BT: Array, positions_BT: Array | None, *, layer: int) -> Array:
        dtype = jnp.dtype(self.config.dtype or self.embed.table[...].dtype)
        x_BTD = self.embed(tokens_BT, dtype)
        if self.config.position == "sinusoid":
            positions_BT = positions_or_default(tokens_BT, positions_BT)
            x_BTD = x_BTD * self.config.embed**0.5 + sinusoids(positions_BT, x_BTD.shape[-1], dtype)
        with scope.layer(layer):
            return self.dropout(residual(x_BTD))

    def _tables(self) -> dict[str, Array]:
        """Tables of the relative bias, as the stream holds them; none here."""
        return {}

    def _bias(self, stack: str, stream: dict[str, Array]) -> RelativeBias | None:
        """The relative bias of a stack, from the stream; None without."""
        del stack, stream

    def _run(
        self,
        blocks: Block,
        x_BTD: Array,
        side: tuple[Any, ...],
        first: Array | int,
        memory: Memory | None = None,
        bias: RelativeBias | None = None,
    ) -> Array:
        positions = self._positions(side, x_BTD.dtype)
        if bias is not None:
            positions = positions._replace(bias=bias.with_row(x_BTD.shape[1]))
        apply = functools.partial(_apply, positions=positions, memory=memory)
        return self.stack(blocks, x_BTD, apply, first=first)[0]

    def _positions(self, side: tuple[Any, ...], dtype: Any) -> TokenPositions:
        config = self.config
        rotary = Rotary(config.width, config.rope_theta) if config.position == "rope" else None
        return token_positions(*side, rotary=rotary, dtype=dtype)


class RelativeTranslator(Translator):
    """A Translator with relative position bias, whose tables travel in the stream: all stages read them."""

    stream: ClassVar[dict[str, Any]] = {
        **Translator.stream,
        "encoder_bias": (None, "heads"),
        "decoder_bias": (None, "heads"),
    }

    def __init__(self, config: EncoderDecoder, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        init = jax.nn.initializers.normal(config.init_std or config.embed**-0.5)
        table = lambda: param(rngs, (config.buckets, config.heads), ("position", "heads"), init)
        self.encoder_bias, self.decoder_bias = table(), table()

    def _tables(self) -> dict[str, Array]:
        tables = {"encoder_bias": self.encoder_bias, "decoder_bias": self.decoder_bias}
        return {name: scope.constrain(t[...], None, "heads") for name, t in tables.items()}

    def _bias(self, stack: str, stream: dict[str, Array]) -> RelativeBias | None:
        return RelativeBias(stream[f"{stack}_bias"], stack == ENCODER, self.config.distance)


def _apply(block: Block, x_BTD: Array, _: None, **options: Any) -> tuple[Array, dict[str, Any]]:
    return block(x_BTD, **options)


def _sides(
    tokens_BT: Array | None,
    source_BS: Array | None,
    positions_BT: Array | None = None,
    segments_BT: Array | None = None,
    positions_BS: Array | None = None,
    segments_BS: Array | None = None,
) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]:
    """(tokens, positions, segments) of the target and of the source."""
    check(
        source_BS is not None, "an encoder-decoder reads a source beside the tokens of its target"
    )
    return (tokens_BT, positions_BT, segments_BT), (source_BS, positions_BS, segments_BS)
