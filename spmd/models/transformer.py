"""A decoder language model: GPT-2, Llama, and what lies between."""

# B batch, T time, S cached time, D embed, H query heads, G key and value heads, K head_dim, F mlp, V vocab,
# L layers

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from spmd.core.fields import check, free
from spmd.models.attention import (
    Context,
    Implementation,
    TokenPositions,
    attend,
    attend_cached,
    rotary,
    rotate,
)
from spmd.models.layers import Dropout, Embedding, Linear, Norm
from spmd.models.layers.embedding import vocab_logits
from spmd.models.moe import Experts, Load, MixtureOfExperts
from spmd.parallel import scope

Cache = dict[str, jax.Array]  # key, value: [L, B, S, G, K]
CACHE_DIMS = ("layers", "batch", None, "kv_heads", "head_dim")
Saved = Literal["query", "key", "value", "attended", "up", "gate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer:
    """Decoder-only transformer (Vaswani et al. 2017, arXiv 1706.03762), norms first."""

    vocab: int
    """Number of tokens."""
    length: int
    """Longest sequence, in tokens."""
    layers: int = 4
    """Number of blocks."""
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
    """A mixture of feed-forward layers, each as wide as model.mlp, in the place of one."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm."""
    norm_epsilon: float = 1e-5
    """Added to the variance."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Gated SiLU (Shazeer 2020), or GELU in its tanh form (GPT-2)."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary angles (RoPE), or a learned table of `length` rows."""
    rope_theta: float = 500_000.0
    """Base of the rotary angles (Llama 2: 10000, Llama 3: 500000)."""
    bias: bool = False
    """Biases in linear layers and in LayerNorm."""
    tied: bool = False
    """The head is the embedding's table."""
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys (Dehghani et al. 2023)."""
    logit_cap: float = 0.0
    """Logits become cap * tanh(logits / cap) (Gemma 2: 30); 0 is off."""
    vocab_multiple: int = 1
    """Tables get rows up to a multiple of this (GPT-2 on GPUs: 128), which are never predicted."""
    dropout: float = 0.0
    """Dropout rate of the embedding and of what each block adds."""
    init_std: float = 0.02
    """Of the initial weights, those before a residual / sqrt(2 layers) (GPT-2); 0 is 1 / sqrt(fan-in)."""
    dtype: Literal["", "bfloat16", "float32"] = ""
    """Compute type; empty is the parameters' own. Norms, softmax and sums of gradients stay float32."""
    attention: Implementation = free("xla")
    """XLA anywhere; cudnn on NVIDIA GPUs, splash on TPUs, which never hold all scores at once."""
    context: Context = free("ring")
    """With mesh.context, keys and values go round a ring, or (ulysses) heads are exchanged against time."""
    scan: bool = free(True)
    """One compiled block, scanned over the layers; else unrolled: slower to compile, faster to run."""
    remat: Literal["none", "full", "dots", "named"] = free("none")
    """What the backward pass computes anew: nothing, all, all but products with weights, all but `saved`."""
    saved: tuple[Saved, ...] = free(("query", "key", "value", "attended"))
    """The activations that remat=named keeps."""

    def __post_init__(self) -> None:
        for name in ("vocab", "length", "layers", "embed", "heads", "vocab_multiple"):
            value = getattr(self, name)
            check(value >= 1, f"model.{name}={value} must be at least 1")
        for name in ("kv_heads", "head_dim", "mlp", "logit_cap", "init_std"):
            value = getattr(self, name)
            check(value >= 0, f"model.{name}={value} must not be negative")
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
            self.position != "rope" or self.width % 2 == 0,
            f"rotary positions turn pairs: the head dim must be even, given {self.width};"
            " change model.embed or model.head_dim, or use model.position=learned",
        )
        check(
            not (self.experts.num and self.bias),
            "model.bias: experts have no biases; set model.bias to False, or model.experts.num to 0",
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
    def rows(self) -> int:
        """Rows of the embedding's table."""
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple

    @property
    def losses(self) -> dict[str, float]:
        """`{name: weight}` of the losses that a forward pass notes in its scope."""
        balance = self.experts.balance if self.experts.num else 0.0
        return {"balance": balance} if balance else {}

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return Decoder(self, rngs)


class Decoder(nnx.Module):
    """The module: __call__ is the whole model, hidden and logits its halves, decode its cached form; enter,
    through and leave are the parts of hidden, for a pipeline.
    """

    stream = ("batch", "residual_time", "embed")  # what flows from part to part

    def __init__(self, config: Transformer, rngs: nnx.Rngs):
        self.config = config
        table = jax.nn.initializers.normal(config.init_std or config.embed**-0.5)
        self.embed = Embedding(rngs, (config.rows, config.embed), "vocab", table)
        self.position = (
            Embedding(rngs, (config.length, config.embed), "position", table)
            if config.position == "learned"
            else None
        )
        self.dropout = Dropout(config.dropout)
        self.blocks = Block(config, rngs)
        self.norm = _norm(config, rngs, layers=0)
        shape, dims = (config.embed, config.rows), ("embed", "vocab")
        head = lambda: Linear(rngs, "btd,dv->btv", shape, dims, std=config.init_std)
        self.head = None if config.tied else head()

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, T, V]; positions: by default 0, 1, ...; segments: documents of a row, kept apart."""
        return self.logits(self.hidden(tokens_BT, positions_BT, segments_BT))

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> jax.Array:
        """What the head reads: [B, T, D]."""
        return self._run(tokens_BT, positions_BT, segments_BT, None)[0]

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V], at least float32."""
        config = self.config
        spec, kernel = "btd,vd->btv", self.embed.table
        if self.head is not None:
            spec, kernel = self.head.spec, self.head.kernel
        return vocab_logits(spec, x_BTD, kernel[...], vocab=config.vocab, cap=config.logit_cap)

    def cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for `length` tokens of each row, in the compute type; its dims: CACHE_DIMS."""
        config = self.config
        shape = (config.layers, batch_size, length, config.num_kv_heads, config.width)
        return {name: jnp.zeros(shape, self._dtype) for name in ("key", "value")}

    def decode(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """(logits [B, T, V], the cache with these tokens in it).

        A prompt goes in at once, then token by token. positions: place of each token in its row; -1 is
        padding, so rows may differ in length. A token sees what the cache holds up to its position.
        """
        x_BTD, cache = self._run(tokens_BT, positions_BT, None, cache)
        return self.logits(x_BTD), cache

    @property
    def _dtype(self) -> Any:
        return jnp.dtype(self.config.dtype or self.embed.table[...].dtype)

    def enter(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> jax.Array:
        """What the first block reads: [B, T, D]."""
        config, time = self.config, tokens_BT.shape[1]
        check(
            time <= config.length,
            f"a sequence of {time} tokens is longer than model.length={config.length}",
        )
        x_BTD = self.embed(tokens_BT, self._dtype)
        if self.position is not None:
            positions_BT = _positions(tokens_BT, positions_BT)
            x_BTD += self.position(jnp.maximum(positions_BT, 0), self._dtype)
        with scope.layer(config.layers):  # the number that no block has
            return self.dropout(_residual(x_BTD))

    def through(
        self,
        x_BTD: jax.Array,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        *,
        first: jax.Array | int = 0,
    ) -> jax.Array:
        """x behind the blocks whose parameters there are; first: the number of the first one."""
        place = self._place(tokens_BT, positions_BT, segments_BT, x_BTD.dtype)
        return self._blocks(x_BTD, place, None, first)[0]

    def leave(self, x_BTD: jax.Array) -> jax.Array:
        """What the head reads, of what the last block gives: [B, T, D]."""
        x_BTD = self.norm(x_BTD)
        return scope.constrain(x_BTD, "batch", _time("time", x_BTD), "embed")

    def _place(
        self, tokens_BT: jax.Array, positions_BT: Any, segments_BT: Any, dtype: Any
    ) -> TokenPositions:
        config = self.config
        positions_BT = _positions(tokens_BT, positions_BT)
        angles = None
        if config.position == "rope":
            angles = rotary(positions_BT, config.width, config.rope_theta, dtype)
        return TokenPositions(positions_BT, segments_BT, angles)

    def _run(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None,
        segments_BT: jax.Array | None,
        cache: Any,
    ) -> tuple[jax.Array, Any]:
        x_BTD = self.enter(tokens_BT, positions_BT)
        place = self._place(tokens_BT, positions_BT, segments_BT, x_BTD.dtype)
        x_BTD, cache = self._blocks(x_BTD, place, cache, 0)
        return self.leave(x_BTD), cache

    def _blocks(
        self, x_BTD: jax.Array, place: TokenPositions, cache: Any, first: jax.Array | int
    ) -> tuple[jax.Array, Any]:
        x_BTD, (cache, load) = _through(self.blocks, x_BTD, place, cache, first)
        if load is not None and isinstance(self.blocks.mlp, MixtureOfExperts):
            self.blocks.mlp.tell(load)
        return x_BTD, cache


class Block(nnx.Module):
    """All blocks, their parameters stacked [L, ...]; called with the parameters of one."""

    def __init__(self, config: Transformer, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = _norm(config, rngs)
        width = config.mlp or 4 * config.embed
        self.mlp = (
            _mixture(config, rngs, width)
            if config.experts.num
            else FeedForward(config, rngs, width)
        )
        self.dropout = Dropout(config.dropout)
        self.config = config

    def __call__(
        self, x_BTD: jax.Array, place: TokenPositions, cache: Any
    ) -> tuple[jax.Array, tuple[Any, Load | None]]:
        time, load = _time("time", x_BTD), None
        y_BTD = scope.constrain(self.attention_norm(x_BTD), "batch", time, "embed")
        y_BTD, cache = self.attention(y_BTD, place, cache)
        x_BTD = _residual(x_BTD + self.dropout(_residual(y_BTD)))
        y_BTD = scope.constrain(self.mlp_norm(x_BTD), "batch", time, "embed")
        if isinstance(self.mlp, MixtureOfExperts):
            y_BTD, load = self.mlp(y_BTD, place.segments_BT)
        else:
            y_BTD = self.mlp(y_BTD)
        x_BTD = _residual(x_BTD + self.dropout(_residual(y_BTD)))
        return x_BTD, (cache, load)


class Attention(nnx.Module):
    """Queries, keys and values of each head, attention, and the way back to the residual stream."""

    def __init__(self, config: Transformer, rngs: nnx.Rngs):
        def heads(num: int, dim: str) -> Linear:
            shape, dims = (config.embed, num, config.width), ("embed", dim, "head_dim")
            return Linear(rngs, "btd,dhk->bthk", shape, dims, **_options(config))

        def head_norm() -> Norm | None:
            options = {"layers": config.layers, "epsilon": config.norm_epsilon}
            return Norm(rngs, config.width, "head_dim", **options) if config.qk_norm else None

        self.query = heads(config.heads, "heads")
        self.key = heads(config.num_kv_heads, "kv_heads")
        self.value = heads(config.num_kv_heads, "kv_heads")
        self.query_norm, self.key_norm = head_norm(), head_norm()
        shape, dims = (config.heads, config.width, config.embed), ("heads", "head_dim", "embed")
        self.out = Linear(rngs, "bthk,hkd->btd", shape, dims, **_options(config, residual=True))
        self.implementation: Implementation = config.attention
        self.context: Context = config.context

    def __call__(
        self, x_BTD: jax.Array, place: TokenPositions, cache: Any
    ) -> tuple[jax.Array, Any]:
        q_BTHK, k_BTGK, v_BTGK = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        if place.rotary is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, place.rotary), rotate(k_BTGK, place.rotary)
        q_BTHK = _activation("query", q_BTHK, "heads", "head_dim")
        k_BTGK = _activation("key", k_BTGK, "kv_heads", "head_dim")
        v_BTGK = _activation("value", v_BTGK, "kv_heads", "head_dim")
        if cache is None:
            y_BTHK = attend(
                q_BTHK, k_BTGK, v_BTGK, place.segments_BT, self.implementation, self.context
            )
        else:
            cache = {
                "key": _written(cache["key"], k_BTGK, place.positions_BT),
                "value": _written(cache["value"], v_BTGK, place.positions_BT),
            }
            y_BTHK = attend_cached(q_BTHK, cache["key"], cache["value"], place.positions_BT)
        return self.out(_activation("attended", y_BTHK, "heads", "head_dim")), cache


class FeedForward(nnx.Module):
    """Two or, gated, three products around a non-linearity."""

    def __init__(self, config: Transformer, rngs: nnx.Rngs, width: int):
        into = lambda: Linear(
            rngs, "btd,df->btf", (config.embed, width), ("embed", "mlp"), **_options(config)
        )
        self.up = into()
        self.gate = into() if config.activation == "swiglu" else None
        shape, dims = (width, config.embed), ("mlp", "embed")
        self.down = Linear(rngs, "btf,fd->btd", shape, dims, **_options(config, residual=True))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        y_BTF = _activation("up", self.up(x_BTD), "mlp")
        if self.gate is None:
            return self.down(jax.nn.gelu(y_BTF, approximate=True))
        return self.down(jax.nn.silu(_activation("gate", self.gate(x_BTD), "mlp")) * y_BTF)


def _positions(tokens_BT: jax.Array, positions_BT: jax.Array | None) -> jax.Array:
    """Those given, or 0, 1, ..."""
    if positions_BT is None:
        return jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
    return positions_BT


def _mixture(config: Transformer, rngs: nnx.Rngs, width: int) -> MixtureOfExperts:
    num, shared = config.experts.num, config.experts.shared

    def kernels(
        spec: str, sizes: tuple[int, ...], dims: tuple[str, ...], **residual: bool
    ) -> Linear:
        return Linear(rngs, spec, sizes, dims, **_options(config, **residual))

    def into() -> Linear:
        return kernels("btd,edf->btef", (num, config.embed, width), ("experts", "embed", "mlp"))

    return MixtureOfExperts(
        config.experts,
        config.layers,
        router=kernels("btd,de->bte", (config.embed, num), ("embed", "choice")),
        up=into(),
        gate=into() if config.activation == "swiglu" else None,
        down=kernels(
            "btef,efd->bted",
            (num, width, config.embed),
            ("experts", "mlp", "embed"),
            residual=True,
        ),
        shared=FeedForward(config, rngs, shared * width) if shared else None,
    )


def _through(
    blocks: Block, x_BTD: jax.Array, place: TokenPositions, cache: Any, first: jax.Array | int = 0
) -> tuple[jax.Array, tuple[Any, Load | None]]:
    """The blocks one after the other, scanned or unrolled, from the same stacked arrays; a stage of a
    pipeline has some of them, numbered from `first` on.
    """
    config = blocks.config
    graph, weights = nnx.split(blocks)
    num = blocks.attention_norm.scale[...].shape[0]

    def block(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        index, weights, cache = layer
        with scope.layer(index):
            return nnx.merge(graph, weights)(x_BTD, place, cache)

    step = _remat(block, config)
    stack = (first + jnp.arange(num, dtype=jnp.int32), nnx.as_pure(weights), cache)
    if config.scan:
        return jax.lax.scan(step, x_BTD, stack)
    made = []
    for layer in _unstacked(stack, num):
        x_BTD, new = step(x_BTD, layer)
        made.append(new)
    return x_BTD, jax.tree.map(lambda *x: jnp.stack(x), *made)


def _unstacked(stack: Any, layers: int) -> list[Any]:
    """One tree for each layer. By split, whose gradient is one concatenation: that of indexing is a padded
    array of all layers for each layer.
    """
    leaves, structure = jax.tree.flatten(stack)
    parts = [jax.lax.split(x, (1,) * layers, axis=0) for x in leaves]
    return [
        structure.unflatten([p.squeeze(0) for p in layer]) for layer in zip(*parts, strict=True)
    ]


def _remat(block: Callable[..., Any], config: Transformer) -> Callable[..., Any]:
    """`block` as model.remat says (Chen et al. 2016, arXiv 1604.06174)."""
    policies = jax.checkpoint_policies
    policy = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "named": policies.save_only_these_names(*config.saved),
    }
    if config.remat == "none":
        return block
    # Within a scan nothing could be merged with the forward pass anyway.
    return jax.checkpoint(block, policy=policy[config.remat], prevent_cse=not config.scan)


def _written(cache_BSGK: jax.Array, new_BTGK: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """The cache of one layer with new entries at their positions; those at -1 are left out."""
    length = cache_BSGK.shape[1]
    slot_BT = jnp.where(positions_BT < 0, length, positions_BT)
    write = lambda row, new, slot: row.at[slot].set(new, mode="drop")
    cache_BSGK = jax.vmap(write)(cache_BSGK, new_BTGK, slot_BT)
    return scope.constrain(cache_BSGK, *CACHE_DIMS[1:])


def _time(dim: str, x: jax.Array) -> str | None:
    """A dim of time, which a single token does not have."""
    return dim if x.shape[1] > 1 else None


def _residual(x_BTD: jax.Array) -> jax.Array:
    return scope.constrain(x_BTD, "batch", _time("residual_time", x_BTD), "embed")


def _activation(name: Saved, x: jax.Array, *dims: str) -> jax.Array:
    """Placed, and known to remat=named."""
    return checkpoint_name(scope.constrain(x, "batch", _time("time", x), *dims), name)


def _norm(config: Transformer, rngs: nnx.Rngs, layers: int | None = None) -> Norm:
    return Norm(
        rngs,
        config.embed,
        "embed",
        layers=config.layers if layers is None else layers,
        centred=config.norm == "layer",
        bias=config.bias and config.norm == "layer",
        epsilon=config.norm_epsilon,
    )


def _options(config: Transformer, residual: bool = False) -> dict[str, Any]:
    gain = (2 * config.layers) ** -0.5 if residual else 1.0
    return {"layers": config.layers, "bias": config.bias, "std": config.init_std, "gain": gain}
