"""An encoder-decoder: sequences from sequences (translation), by cross-attention."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from flax import nnx

from spmd.core.fields import check, free
from spmd.models.blocks import BlockConfig, BlockStack
from spmd.models.layers.activations import Saved
from spmd.models.translator import DECODER, ENCODER, RelativeTranslator, Translator


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoder(BlockConfig):
    """Encoder-decoder transformer (Vaswani et al. 2017, arXiv 1706.03762), norms first.

    Source and target share a vocabulary and its table. Called with the tokens of the target and of the
    source; pairs are packed by segments on both sides.
    """

    vocab: int
    """Number of tokens, of source and target together."""
    encoder_layers: int = 6
    """Number of blocks that read the source."""
    layers: int = 6
    """Number of blocks that write the target."""
    position: Literal["sinusoid", "rope", "relative"] = "sinusoid"
    """Sinusoids added to the embeddings (Vaswani et al. 2017, section 3.5), rotary angles (RoPE), or a
    learned bias of scores by distance, shared by the layers of a stack (T5)."""
    buckets: int = 32
    """Rows of the relative bias; half of them are of keys behind the query in the encoder."""
    distance: int = 128
    """Tokens from which on all distances share a row of the relative bias."""
    rope_theta: float = 10_000.0
    """Base of the rotary angles."""
    tied: bool = True
    """Whether the head is the embedding's table."""
    head_scale: bool = False
    """The input of the head is divided by sqrt(embed) (T5 with a tied head)."""
    dtype: Literal["", "bfloat16", "float32"] = ""
    """Compute type; empty is that of the parameters. Norms, softmax and sums of gradients stay float32."""
    scan: bool = free(True)
    """Compile a single block and scan it over the layers; unrolled layers compile slower and run faster."""
    remat: Literal["none", "full", "dots", "named"] = free("none")
    """Which activations the backward pass rematerialises: none, all, all but matmuls, all but `saved`."""
    saved: tuple[Saved, ...] = free(("query", "key", "value", "attended"))
    """The activations that remat=named keeps."""

    def __post_init__(self) -> None:
        for name in ("vocab", "encoder_layers", "layers"):
            value = getattr(self, name)
            check(value >= 1, f"model.{name}={value} must be at least 1")
        super().__post_init__()
        check(
            self.position == "relative" or self.width % 2 == 0,
            f"the head dim must be even, given {self.width}: positions are pairs",
        )
        check(
            self.position != "relative" or (self.buckets >= 4 and self.buckets % 4 == 0),
            f"model.buckets={self.buckets} must be a multiple of 4: a half is of keys on either side, half of"
            " each of single distances",
        )
        check(
            self.distance > self.buckets // 2,
            f"model.distance={self.distance} must be more than the {self.buckets // 2} single distances of"
            f" model.buckets={self.buckets}",
        )
        check(not self.window, "model.window: an encoder-decoder has no windows; leave it out")
        check(
            not self.experts.num,
            "model.experts.num: an encoder-decoder has no experts; use spmd.models.transformer",
        )
        check(
            self.mask == "causal",
            "model.mask is that of the decoder, which is causal; the encoder sees all tokens",
        )

    @property
    def encoder(self) -> BlockConfig:
        """The encoder's blocks, which see both sides."""
        fields = dataclasses.fields(BlockConfig)
        own: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields}
        return BlockConfig(**{**own, "mask": "full"})

    @property
    def stacks(self) -> tuple[BlockStack, ...]:
        """The blocks of the encoder, then those of the decoder."""
        return (
            self.encoder.stack_of(self.encoder_layers, name=ENCODER, reads=1),
            self.stack_of(self.layers, name=DECODER, memory=ENCODER),
        )

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with initial weights."""
        kind = RelativeTranslator if self.position == "relative" else Translator
        return kind(self, rngs)
