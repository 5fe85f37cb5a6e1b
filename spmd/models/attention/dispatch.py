"""Attention by the implementation asked for, or an error that says why it cannot run."""

# B batch, T time, H query heads, G key and value heads, K head_dim

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from spmd.core.fields import check
from spmd.models.attention.cudnn import attend_cudnn
from spmd.models.attention.mask import causal_mask, segment_mask
from spmd.models.attention.ring import attend_ring
from spmd.models.attention.splash import attend_splash
from spmd.models.attention.ulysses import attend_ulysses
from spmd.models.attention.xla import attend_xla
from spmd.parallel import scope

Implementation = Literal["xla", "cudnn", "splash"]
Context = Literal["ring", "ulysses"]


def attend(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    implementation: Implementation,
    context: Context = "ring",
) -> jax.Array:
    """Attention [B, T, H, K] of each token to its document up to itself, the softmax at least in float32.

    Args:
        q_BTHK: queries.
        k_BTGK: keys; each serves H / G consecutive query heads.
        v_BTGK: values.
        segments_BT: number of each token's document; None is one document for each row.
        implementation: the kernel.
        context: how attention is computed where the sequence is sharded over devices.

    Raises:
        ValueError: the implementation cannot run here; there is no silent fall back to a slower one.
    """
    if scope.sharding_axes("time"):
        return _attend_sharded(q_BTHK, k_BTGK, v_BTGK, segments_BT, implementation, context)
    if implementation == "splash":
        return attend_splash(q_BTHK, k_BTGK, v_BTGK, segments_BT)
    same_BTS = None if segments_BT is None else segment_mask(segments_BT, segments_BT)
    if implementation == "cudnn":
        return attend_cudnn(q_BTHK, k_BTGK, v_BTGK, same_BTS)
    causal_BTS = causal_mask(q_BTHK.shape[1])
    mask_BTS = causal_BTS if same_BTS is None else causal_BTS & same_BTS
    return attend_xla(q_BTHK, k_BTGK, v_BTGK, mask_BTS)


def _attend_sharded(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    implementation: Implementation,
    context: Context,
) -> jax.Array:
    """The same where each device holds a part of the sequence."""
    if segments_BT is None:
        segments_BT = jnp.ones(q_BTHK.shape[:2], jnp.int32)
    if context == "ulysses":
        kernel = functools.partial(attend, implementation=implementation)
        return attend_ulysses(q_BTHK, k_BTGK, v_BTGK, segments_BT, kernel)
    check(
        implementation == "xla",
        f"model.attention={implementation} takes unsharded sequences, and model.context=ring shards them; use"
        " --model.context ulysses, or --model.attention xla",
    )
    return attend_ring(q_BTHK, k_BTGK, v_BTGK, segments_BT)
