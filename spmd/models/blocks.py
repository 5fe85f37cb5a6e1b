"""The block of a transformer: attention and a feed-forward layer, each added to the residual stream."""

# B batch, T time, D embed, H query heads, G key and value heads, K head_dim

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
from flax import nnx

from spmd.core.fields import check, free
from spmd.models.attention import Cache, TokenPositions
from spmd.models.attention.dispatch import Context, Implementation
from spmd.models.attention.multihead import Attention, Memory
from spmd.models.feed_forward import GATED, Activation, FeedForward
from spmd.models.layers import Dropout, Norm
from spmd.models.layers.activations import matmul_input, residual
from spmd.models.moe import ExpertLoad, ExpertMixture, Experts
from spmd.models.stack import LayerStack


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Fields of a block; base of the configs of models that stack such blocks."""

    embed: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 0
    """Key and value heads, shared by groups of query heads (GQA); 0 is as many as query heads."""
    head_dim: int = 0
    """Width of a head; 0 is embed / heads."""
    mlp: int = 0
    """Width of the feed-forward layer; 0 is 4 * embed."""
    experts: Experts = dataclasses.field(default_factory=Experts)
    """Mixture of experts, each as wide as model.mlp, in place of a feed-forward layer."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm."""
    norm_epsilon: float = 1e-5
    """Added to the variance."""
    norm_at: Literal["input", "output", "both", "sum"] = "input"
    """Where each layer has its norm: before it, after it, before the sum (OLMo 2), both (Gemma 2), or after
    the sum (BERT)."""
    norm_offset: float = 0.0
    """Added to the scales of norms, which start at 1 - offset (Gemma: 1)."""
    activation: Activation = "swiglu"
    """Gated by SiLU or GELU (Shazeer 2020), GELU in its tanh form (GPT-2) or by erf (BERT), or ReLU (T5)."""
    bias: bool = False
    """Biases in linear layers and in LayerNorm."""
    qkv_bias: bool = False
    """Biases of queries, keys and values, whether or not other layers have them (Qwen 2)."""
    qk_norm: bool = False
    """RMSNorm of queries and keys (Dehghani et al. 2023)."""
    qk_norm_over: Literal["head", "all"] = "head"
    """Whether qk_norm normalises each head by itself, or all heads of a token together (OLMo 2)."""
    score_width: int = 0
    """Products of queries and keys are divided by its root (Gemma 2); 0 is the width of a head."""
    score_cap: float = 0.0
    """Scores of attention become cap * tanh(scores / cap) (Gemma 2: 50); 0 is off."""
    mask: Literal["causal", "full"] = "causal"
    """Keys that a token sees in its document: up to itself (decoder), or all (encoder)."""
    window: tuple[int, ...] = ()
    """Keys less than this many tokens away are seen, by block, repeated (Gemma 2: 4096 0); 0 is no limit."""
    dropout: float = 0.0
    """Dropout rate of the embedding and of what each block adds."""
    init_std: float = 0.02
    """Std of the initial weights, / sqrt(2 layers) before a residual (GPT-2); 0 is 1 / sqrt(fan-in)."""
    attention: Implementation = free("xla")
    """XLA anywhere; cudnn on NVIDIA GPUs, splash on TPUs, which never hold all scores at once."""
    context: Context = free("ring")
    """Attention under mesh.context: keys and values are sent round a ring, or heads exchanged for time."""

    def __post_init__(self) -> None:
        for name in ("embed", "heads"):
            value = getattr(self, name)
            check(value >= 1, f"model.{name}={value} must be at least 1")
        for name in ("kv_heads", "head_dim", "mlp", "init_std", "score_width", "score_cap"):
            value = getattr(self, name)
            check(value >= 0, f"model.{name}={value} must not be negative")
        check(
            all(size >= 0 for size in self.window),
            f"model.window={self.window} must not be negative",
        )
        check(0 <= self.dropout < 1, f"model.dropout={self.dropout} must be in [0, 1)")
        check(
            bool(self.head_dim) or self.embed % self.heads == 0,
            f"model.embed={self.embed} does not divide by model.heads={self.heads};"
            " change one, or give model.head_dim",
        )
        check(
            self.heads % self.num_kv_heads == 0,
            f"model.heads={self.heads} does not divide by model.kv_heads={self.kv_heads}; use one of"
            f" {', '.join(str(n) for n in range(1, self.heads + 1) if self.heads % n == 0)}",
        )
        check(
            not (self.experts.num and self.bias),
            "model.bias: experts have no biases; set model.bias to False, or model.experts.num to 0",
        )
        check(
            not self.experts.num or self.activation in ("swiglu", "gelu"),
            f"model.activation={self.activation}: experts take swiglu or gelu",
        )

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.embed // self.heads

    @property
    def mlp_width(self) -> int:
        """Width of the feed-forward layer."""
        return self.mlp or 4 * self.embed

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate."""
        return self.activation in GATED

    @property
    def windows(self) -> tuple[int, ...]:
        """Windows of the blocks of a period; 0 is none."""
        return self.window or (0,)

    @property
    def period(self) -> int:
        """Blocks after which the pattern of windows and experts repeats."""
        return math.lcm(len(self.windows), self.experts.every)

    @property
    def repeats(self) -> str:
        """The fields that make the pattern."""
        patterns = {
            "model.window": len(self.windows) > 1,
            "model.experts.every": self.experts.every > 1,
        }
        return " and ".join(name for name, repeated in patterns.items() if repeated)

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kind of each block of a period: 0; with experts in some blocks only, these are 1."""
        every = self.experts.every
        return tuple(int(every > 1 and i % every == every - 1) for i in range(self.period))

    def by_kind(self, layers: int) -> list[tuple[BlockConfig, tuple[int, ...]]]:
        """(config, numbers of its blocks) of each kind among the first `layers`."""
        configs: list[BlockConfig] = [self]
        if self.experts.every > 1:
            dense = dataclasses.replace(self, experts=Experts())
            mixture = dataclasses.replace(self, experts=dataclasses.replace(self.experts, every=1))
            configs = [dense, mixture]
        kind_of = lambda i: self.kinds[i % self.period]
        numbers = lambda kind: tuple(i for i in range(layers) if kind_of(i) == kind)
        return [(config, numbers(kind)) for kind, config in enumerate(configs)]

    def window_of(self, block: int) -> int:
        """Window of a block, by its number; 0 is none."""
        return self.windows[block % len(self.windows)]

    def keys_seen(self, block: int, length: int) -> int:
        """Keys for each query of a block: those that a causal mask hides and that a window would reach beyond
        the ends of the sequence included.
        """
        window = self.window_of(block)
        seen = 2 * window - 1 if self.mask == "full" else window
        return min(length, seen) if window else length

    def build_norm(self, rngs: nnx.Rngs, layers: int = 0) -> Norm:
        """A norm of the residual stream, stacked over layers; 0 is a single one."""
        centred, epsilon = self.norm == "layer", self.norm_epsilon
        options = {"bias": self.bias and centred, "epsilon": epsilon, "offset": self.norm_offset}
        return Norm(rngs, (self.embed,), ("embed",), layers=layers, centred=centred, **options)

    def build_attention(self, rngs: nnx.Rngs, **options: Any) -> Attention:
        """Attention of these heads; options: of its initial values, and how many are stacked."""
        return Attention(
            rngs,
            self.embed,
            self.heads,
            self.num_kv_heads,
            self.width,
            bias=self.bias,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            qk_norm_over=self.qk_norm_over,
            epsilon=self.norm_epsilon,
            norm_offset=self.norm_offset,
            scale=(self.score_width or self.width) ** -0.5,
            softcap=self.score_cap,
            mask=self.mask,
            implementation=self.attention,
            context=self.context,
            **options,
        )

    def stack_of(self, layers: int, *, name: str = "blocks", **options: Any) -> BlockStack:
        """A stack of these blocks, as a model declares it; options: further fields of BlockStack.

        Args:
            layers: number of blocks.
            name: of the model's attribute.
            options: further fields of BlockStack.
        """
        repeats = {"period": self.period, "repeats": self.repeats}
        return BlockStack(name=name, layers=layers, block=self, **repeats, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockStack(LayerStack):
    """A stack of blocks, as a planner counts it: the attribute `stacks` of a config has one for each stack.

    A model that declares its stacks is planned over stages, contexts and tensors.
    """

    block: BlockConfig
    """Sizes and kinds of its blocks."""
    reads: int = 0
    """Which of the model's inputs [B, T, ...] has the tokens that the blocks see."""
    length: int = 0
    """Number of tokens, where no input has them (the patches of an image)."""
    memory: str = ""
    """Name of the stack whose output the blocks attend to; empty is none."""


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Vaswani et al. 2017, arXiv 1706.03762, norms first).

    With `norm_at` the norms are after these layers, x + norm(attention(x)), or before and after them, or
    after the sums, norm(x + attention(x)).

    Its parameters are stacked over layers; it is called with those of one (models.stack).

    Args:
        config: sizes and kinds of its layers.
        rngs: source of the initial values.
        layers: how many are stacked.
        depth: layers of the model, where these are only some: residual layers start at 1 / sqrt(2 depth).
        cross: whether tokens attend to a memory too, between the two (the decoder of an encoder-decoder).
    """

    def __init__(
        self,
        config: BlockConfig,
        rngs: nnx.Rngs,
        layers: int,
        *,
        depth: int = 0,
        cross: bool = False,
    ):
        embed, mlp = config.embed, config.mlp_width
        gain = (2 * (depth or layers)) ** -0.5
        options = {"layers": layers, "std": config.init_std, "residual_gain": gain}
        first = config.norm_at in ("input", "both")
        last = config.norm_at in ("output", "both", "sum")
        norm = lambda present: config.build_norm(rngs, layers) if present else None
        self.attention_norm = norm(first)
        self.attention = config.build_attention(rngs, **options)
        self.attention_out_norm = norm(last)
        self.cross_norm = norm(cross and first)
        self.cross = config.build_attention(rngs, **options) if cross else None
        self.cross_out_norm = norm(cross and last)
        self.mlp_norm, self.mlp_out_norm = norm(first), norm(last)
        options |= {"activation": config.activation}
        if config.experts.num:
            self.mlp = ExpertMixture(rngs, config.experts, embed, mlp, **options)
        else:
            self.mlp = FeedForward(rngs, embed, mlp, bias=config.bias, **options)
        self.dropout = Dropout(config.dropout)
        self.norms_sum = config.norm_at == "sum"

    def __call__(
        self,
        x_BTD: jax.Array,
        positions: TokenPositions,
        cache: Cache | None = None,
        *,
        window: int = 0,
        memory: Memory | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """(residual stream [B, T, D], {cache: the layer's with these tokens, load: of its experts}).

        A block without a cache or experts has no such output.

        window: a token sees keys less than this many tokens away; 0 is no limit. memory: what cross-attention
        attends to.
        """
        y_BTD = _input(x_BTD, self.attention_norm)
        y_BTD, cache = self.attention(y_BTD, positions, cache, window)
        x_BTD = self._add(x_BTD, y_BTD, self.attention_out_norm)
        if self.cross is not None and memory is not None:
            y_BTD = _input(x_BTD, self.cross_norm)
            y_BTD = self.cross.cross(y_BTD, positions.segments_BT, memory)
            x_BTD = self._add(x_BTD, y_BTD, self.cross_out_norm)
        y_BTD, load = _input(x_BTD, self.mlp_norm), None
        if isinstance(self.mlp, ExpertMixture):
            y_BTD, load = self.mlp(y_BTD, positions.segments_BT)
        else:
            y_BTD = self.mlp(y_BTD)
        outputs = {"cache": cache, "load": load}
        x_BTD = self._add(x_BTD, y_BTD, self.mlp_out_norm)
        return x_BTD, {k: v for k, v in outputs.items() if v is not None}

    def _add(self, x_BTD: jax.Array, y_BTD: jax.Array, norm: Norm | None) -> jax.Array:
        """The residual stream with what a layer adds."""
        y_BTD = residual(y_BTD)
        if norm is not None and self.norms_sum:
            return residual(norm(x_BTD + self.dropout(y_BTD)))
        return residual(x_BTD + self.dropout(y_BTD if norm is None else norm(y_BTD)))

    def record_load(self, load_L: ExpertLoad) -> None:
        """Notes the loads of the experts of layers, stacked; nothing without experts."""
        if isinstance(self.mlp, ExpertMixture):
            self.mlp.record_load(load_L)


def _input(x_BTD: jax.Array, norm: Norm | None) -> jax.Array:
    """The input of a layer, from the residual stream."""
    return matmul_input(x_BTD if norm is None else norm(x_BTD))


def build_blocks(config: BlockConfig, rngs: nnx.Rngs, layers: int) -> Block | nnx.List[Block]:
    """Stacked blocks: one Block; of unlike blocks one for each kind of `config.kinds`, with those of it.

    With experts in every n-th of L blocks, `0` are the dense ones [L - L // n, ...] and `1` those with
    experts [L // n, ...], each in their order.

    Args:
        config: of a block.
        rngs: random keys.
        layers: L.
    """
    kinds = config.by_kind(layers)
    if len(kinds) == 1:
        return Block(config, rngs, layers)
    return nnx.List(Block(kind, rngs, len(blocks), depth=layers) for kind, blocks in kinds)
