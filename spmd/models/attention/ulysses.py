"""Attention over a sharded sequence by exchanging heads for time (DeepSpeed Ulysses)."""

# B batch, T time, S time of keys, C time of one device, H query heads, G key and value heads, K head_dim

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax

from spmd.core.fields import check
from spmd.models.attention.mask import Mask
from spmd.models.attention.ring import KEY_DIMS, QUERY_DIMS, SEGMENT_DIMS
from spmd.parallel import scope

# (q, k, v, mask, bias) -> attention of unsharded sequences
Kernel = Callable[[jax.Array, jax.Array, jax.Array, Mask, jax.Array | None], jax.Array]


def attend_ulysses(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    bias_HTS: jax.Array | None,
    kernel: Kernel,
) -> jax.Array:
    """Attention [B, T, H, K]: an all-to-all gives each device all tokens of some heads, another reverses it.

    Jacobs et al. 2023, arXiv 2309.14509.

    Args:
        q_BTHK: queries, sharded along time.
        k_BSGK: keys, sharded alike.
        v_BSGK: values.
        mask: the keys that a query sees.
        bias_HTS: [H or 1, T, S], added to the scores.
        kernel: attention of unsharded sequences.

    Returns:
        [B, T, H, K], in the type of the queries.

    Raises:
        ValueError: the heads do not divide over the devices.
    """
    axes, num, tensor = (
        tuple(scope.sharding_axes("time")),
        scope.num_shards("time"),
        scope.num_shards("heads"),
    )
    heads, kv_heads = q_BTHK.shape[2], k_BSGK.shape[2]
    common = math.gcd(heads, kv_heads)
    allowed = [n for n in range(1, common + 1) if common % (n * tensor) == 0]
    check(
        num in allowed,
        f"model.context=ulysses shards attention by heads: the {heads} heads and {kv_heads} key and value"
        f" heads do not divide by mesh.context={num}"
        + (f" x mesh.tensor={tensor}" if tensor > 1 else "")
        + f"; mesh.context may be {', '.join(map(str, allowed)) or 'none'}, or use --model.context ring",
    )

    (batch, time), keys = q_BTHK.shape[:2], k_BSGK.shape[1]
    segments_BT, segments_BS = mask.both_segments(batch, time, keys)
    extra, extra_dims = {}, {}
    if not mask.joint or time != keys:
        extra["key_segments"], extra_dims["key_segments"] = segments_BS, SEGMENT_DIMS
    if mask.prefix_B is not None:
        extra["prefix"], extra_dims["prefix"] = mask.prefix_B, ("batch",)
    if bias_HTS is not None:
        heads_dim = "heads" if bias_HTS.shape[0] > 1 else None
        extra["bias"], extra_dims["bias"] = bias_HTS, (heads_dim, None, None)

    in_dims = (QUERY_DIMS, KEY_DIMS, KEY_DIMS, SEGMENT_DIMS, *extra_dims.values())
    attend_block = functools.partial(
        _attend_block, names=tuple(extra), axes=axes, mask=mask, kernel=kernel
    )
    run = scope.blockwise(attend_block, in_dims, QUERY_DIMS)
    return run(q_BTHK, k_BSGK, v_BSGK, segments_BT, *extra.values())


def _attend_block(
    q_BCHK: jax.Array,
    k_BCGK: jax.Array,
    v_BCGK: jax.Array,
    segments_BC: jax.Array,
    *rest: jax.Array,
    names: tuple[str, ...],
    axes: tuple[str, ...],
    mask: Mask,
    kernel: Kernel,
) -> jax.Array:
    """Attention [B, C, H, K] of a device's part of the sequence; rest: other arrays, by their `names`."""
    parts = dict(zip(names, rest, strict=True))
    gather_time = functools.partial(
        jax.lax.all_to_all, axis_name=axes, split_axis=2, concat_axis=1, tiled=True
    )
    gather_segments = functools.partial(jax.lax.all_gather, axis_name=axes, axis=1, tiled=True)
    segments_BT = gather_segments(segments_BC)
    segments_BS = segments_BT
    if "key_segments" in parts:
        segments_BS = gather_segments(parts["key_segments"])
    local_mask = dataclasses.replace(
        mask,
        prefix_B=parts.get("prefix"),
        query_segments_BT=segments_BT,
        key_segments_BS=segments_BS,
    )
    bias_HTS = parts.get("bias")
    if bias_HTS is not None and bias_HTS.shape[0] > 1:  # those of the heads that arrive
        size = bias_HTS.shape[0] // jax.lax.axis_size(axes)
        start = jax.lax.axis_index(axes) * size
        bias_HTS = jax.lax.dynamic_slice_in_dim(bias_HTS, start, size)
    with scope.bind(sharding_axes=None):
        y_BTHK = kernel(
            gather_time(q_BCHK), gather_time(k_BCGK), gather_time(v_BCGK), local_mask, bias_HTS
        )
    return jax.lax.all_to_all(y_BTHK, axes, split_axis=1, concat_axis=2, tiled=True)
