"""Attention over a sharded sequence by exchanging heads for time (DeepSpeed Ulysses)."""

# B batch, T time, C time of one device, H query heads, G key and value heads, K head_dim

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax

from spmd.core.fields import check
from spmd.models.attention.ring import KEY_DIMS, QUERY_DIMS, SEGMENT_DIMS
from spmd.parallel import scope

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def attend_ulysses(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array,
    kernel: Kernel,
) -> jax.Array:
    """Attention [B, T, H, K]: an all-to-all gives each device all tokens of some heads, another reverses it.

    Jacobs et al. 2023, arXiv 2309.14509.

    Args:
        q_BTHK: queries, sharded along time.
        k_BTGK: keys.
        v_BTGK: values.
        segments_BT: number of each token's document.
        kernel: (q, k, v, segments) -> attention, on unsharded sequences.

    Raises:
        ValueError: the heads do not divide over the devices.
    """
    axes, num, tensor = (
        tuple(scope.sharding_axes("time")),
        scope.num_shards("time"),
        scope.num_shards("heads"),
    )
    heads, kv_heads = q_BTHK.shape[2], k_BTGK.shape[2]
    common = math.gcd(heads, kv_heads)
    allowed = [n for n in range(1, common + 1) if common % (n * tensor) == 0]
    check(
        num in allowed,
        f"model.context=ulysses shards attention by heads: the {heads} heads and {kv_heads} key and value"
        f" heads do not divide by mesh.context={num}"
        + (f" x mesh.tensor={tensor}" if tensor > 1 else "")
        + f"; mesh.context may be {', '.join(map(str, allowed)) or 'none'}, or use --model.context ring",
    )

    def attend_block(q_BCHK, k_BCGK, v_BCGK, segments_BC):
        gather_time = functools.partial(
            jax.lax.all_to_all, axis_name=axes, split_axis=2, concat_axis=1, tiled=True
        )
        segments_BT = jax.lax.all_gather(segments_BC, axes, axis=1, tiled=True)
        with scope.bind(sharding_axes=None):
            y_BTHK = kernel(
                gather_time(q_BCHK), gather_time(k_BCGK), gather_time(v_BCGK), segments_BT
            )
        return jax.lax.all_to_all(y_BTHK, axes, split_axis=1, concat_axis=2, tiled=True)

    in_dims = (QUERY_DIMS, KEY_DIMS, KEY_DIMS, SEGMENT_DIMS)
    return scope.blockwise(attend_block, in_dims, QUERY_DIMS)(q_BTHK, k_BTGK, v_BTGK, segments_BT)
