"""Multi-head attention: projections, norms of heads, rotary positions, the mask and the cache."""

# B batch, T time, S time of a memory, D embed, H query heads, G key and value heads, K head_dim

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.core.fields import check
from spmd.models.attention.cache import Cache, update_cache
from spmd.models.attention.dispatch import Bias, Context, Implementation, attend
from spmd.models.attention.mask import Mask
from spmd.models.attention.positions import TokenPositions, rotate
from spmd.models.attention.xla import attend_cached
from spmd.models.layers import Linear, Norm
from spmd.models.layers.activations import activation


class Memory(NamedTuple):
    """The output of an encoder, to which cross-attention attends, and the segments of its tokens.

    segments_BS: numbers, 0 for padding; a query sees tokens of its own number. None is one segment.
    cache: in place of x_BSD its keys and values, as `project_memory` gives them.
    """

    x_BSD: jax.Array | None
    segments_BS: jax.Array | None
    cache: Cache | None = None


class Attention(nnx.Module):
    """Multi-head attention with grouped keys and values (Ainslie et al. 2023, arXiv 2305.13245).

    Args:
        rngs: source of the initial values.
        embed: width D of the residual stream.
        heads: query heads H.
        kv_heads: key and value heads G, each serving H / G query heads.
        head_dim: width K of a head.
        layers: how many are stacked.
        bias: whether the linear layers have biases.
        qkv_bias: whether the projections of queries, keys and values have, the other having none.
        std: standard deviation of the initial kernels; 0 is 1 / sqrt(fan-in).
        residual_gain: factor on that of the projection back to the residual stream.
        qk_norm: RMSNorm of queries and keys (Dehghani et al. 2023, arXiv 2302.05442).
        qk_norm_over: what it normalises together: each head, or all heads of a token.
        epsilon: of these norms.
        norm_offset: of their scales (layers.Norm).
        scale: factor on the scores; None is K^-1/2.
        softcap: scaled scores become cap * tanh(scores / cap); 0 is off.
        mask: causal or full, within segments.
        implementation: the kernel.
        context: how attention is computed where the sequence is sharded.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        embed: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        layers: int,
        bias: bool = False,
        qkv_bias: bool = False,
        std: float = 0.0,
        residual_gain: float = 1.0,
        qk_norm: bool = False,
        qk_norm_over: Literal["head", "all"] = "head",
        epsilon: float = 1e-5,
        norm_offset: float = 0.0,
        scale: float | None = None,
        softcap: float = 0.0,
        mask: Literal["causal", "full"] = "causal",
        implementation: Implementation = "xla",
        context: Context = "ring",
    ):
        options = {"layers": layers, "std": std}

        def project(num: int, dim: str) -> Linear:
            shape, dims = (embed, num, head_dim), ("embed", dim, "head_dim")
            return Linear(rngs, "btd,dhk->bthk", shape, dims, bias=bias or qkv_bias, **options)

        def head_norm(num: int, dim: str) -> Norm | None:
            if not qk_norm:
                return None
            sizes, dims = (num, head_dim), (dim, "head_dim")
            first = 0 if qk_norm_over == "all" else 1
            norm = {"layers": layers, "epsilon": epsilon, "offset": norm_offset}
            return Norm(rngs, sizes[first:], dims[first:], **norm)

        self.query = project(heads, "heads")
        self.key = project(kv_heads, "kv_heads")
        self.value = project(kv_heads, "kv_heads")
        self.query_norm = head_norm(heads, "heads")
        self.key_norm = head_norm(kv_heads, "kv_heads")
        shape, dims = (heads, head_dim, embed), ("heads", "head_dim", "embed")
        self.out = Linear(
            rngs, "bthk,hkd->btd", shape, dims, bias=bias, **options, gain=residual_gain
        )
        self.mask: Literal["causal", "full"] = mask
        self.implementation: Implementation = implementation
        self.context: Context = context
        self.scale, self.softcap = head_dim**-0.5 if scale is None else scale, softcap

    def __call__(
        self, x_BTD: jax.Array, positions: TokenPositions, cache: Cache | None, window: int = 0
    ) -> tuple[jax.Array, Cache | None]:
        """(attention's output [B, T, D], the layer's cache with the keys and values of these tokens)."""
        q_BTHK, k_BTGK, v_BTGK = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        angles = positions.angles_of(window)
        if angles is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, angles), rotate(k_BTGK, angles)
        q_BTHK = activation("query", q_BTHK, "heads", "head_dim")
        k_BTGK = activation("key", k_BTGK, "kv_heads", "head_dim")
        v_BTGK = activation("value", v_BTGK, "kv_heads", "head_dim")
        if cache is None:
            mask, bias = self._mask(positions, window), positions.bias
            y_BTHK = self._attend(q_BTHK, k_BTGK, v_BTGK, mask, bias and bias.of_row)
        else:
            check(
                self.mask == "causal",
                "model.mask=full: a token sees later ones, so that tokens cannot be decoded in turn; only a"
                " model with --model.mask causal can",
            )
            cache = update_cache(cache, k_BTGK, v_BTGK, positions.positions_BT)
            options = {"window": window, "scale": self.scale, "softcap": self.softcap}
            keys, values = cache["key"], cache["value"]
            if positions.bias is not None:
                slots_S = jnp.arange(keys.shape[1], dtype=jnp.int32)
                options["bias"] = positions.bias.between(
                    positions.positions_BT[:, :, None], slots_S.reshape(1, 1, -1)
                )
            y_BTHK = attend_cached(q_BTHK, keys, values, positions.positions_BT, **options)
        return self.out(activation("attended", y_BTHK, "heads", "head_dim")), cache

    def cross(self, x_BTD: jax.Array, segments_BT: jax.Array | None, memory: Memory) -> jax.Array:
        """Attention's output [B, T, D] for queries that see all of a memory's tokens, within segments.

        Keys and values have no positions but those that the memory itself has. A cached memory of B / W rows
        serves W consecutive rows of queries each (the beams of a source), of segment 1.

        Args:
            x_BTD: input of the queries.
            segments_BT: segment of each query; None is one for all.
            memory: the tokens that are attended to.

        Returns:
            [B, T, D].
        """
        q_BTHK = activation("query", self.query(x_BTD), "heads", "head_dim")
        if self.query_norm is not None:
            q_BTHK = self.query_norm(q_BTHK)
        shape, cache = q_BTHK.shape, memory.cache
        if cache is None:
            assert memory.x_BSD is not None
            cache = self.project_memory(memory.x_BSD)
        else:
            q_BTHK = q_BTHK.reshape(cache["key"].shape[0], -1, *shape[2:])
            segments_BT = None
        mask = Mask(kind="full", query_segments_BT=segments_BT, key_segments_BS=memory.segments_BS)
        y_BTHK = self._attend(q_BTHK, cache["key"], cache["value"], mask).reshape(shape)
        return self.out(activation("attended", y_BTHK, "heads", "head_dim"))

    def project_memory(self, x_BSD: jax.Array) -> Cache:
        """The keys and values of a memory, which do not depend on the queries.

        Args:
            x_BSD: output of an encoder.

        Returns:
            `key` and `value` [B, S, G, K].
        """
        k_BSGK = activation("key", self.key(x_BSD), "kv_heads", "head_dim")
        v_BSGK = activation("value", self.value(x_BSD), "kv_heads", "head_dim")
        if self.key_norm is not None:
            k_BSGK = self.key_norm(k_BSGK)
        return {"key": k_BSGK, "value": v_BSGK}

    def _attend(
        self,
        q_BTHK: jax.Array,
        k_BSGK: jax.Array,
        v_BSGK: jax.Array,
        mask: Mask,
        bias: Bias | None = None,
    ) -> jax.Array:
        return attend(
            q_BTHK,
            k_BSGK,
            v_BSGK,
            mask,
            scale=self.scale,
            softcap=self.softcap,
            bias=bias,
            implementation=self.implementation,
            context=self.context,
        )

    def _mask(self, positions: TokenPositions, window: int) -> Mask:
        segments_BT, before = positions.segments_BT, max(window - 1, 0)
        return Mask(
            kind="window" if window else self.mask,
            window=(before, before if self.mask == "full" else 0),
            query_segments_BT=segments_BT,
            key_segments_BS=segments_BT,
        )
