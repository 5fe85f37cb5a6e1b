"""The choice of experts, and how evenly a sequence's tokens load them."""

# B batch, T time, E experts, k experts of a token

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from spmd.parallel import scope


def choose_experts(
    scores_BTE: jax.Array, top_k: int, offset_E: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(experts of each token, their shares), each [B, T, k].

    Args:
        scores_BTE: the router's softmax.
        top_k: experts of a token.
        offset_E: added to the scores for the choice alone (Wang et al. 2024, arXiv 2408.15664); the shares
            are the scores of the chosen experts, normalised to a sum of 1.

    Returns:
        Indices, int32, and shares.
    """
    biased = scores_BTE
    if offset_E is not None:
        biased += jax.lax.stop_gradient(offset_E).astype(biased.dtype).reshape(1, 1, -1)
    dims = ("batch", "time" if scores_BTE.shape[1] > 1 else None, None)
    # On each device's tokens: the compiler would gather the scores of all devices for a top_k.
    run = scope.blockwise(functools.partial(_top_k, top_k=top_k), (dims, dims), (dims, dims))
    return run(scores_BTE, biased)


def _top_k(scores_BTE: jax.Array, biased_BTE: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    choice_BTk = jax.lax.top_k(biased_BTE, top_k)[1]
    share_BTk = jnp.take_along_axis(scores_BTE, choice_BTk, axis=-1)
    return choice_BTk, share_BTk / share_BTk.sum(-1, keepdims=True)


def sequence_balance(
    scores_BTE: jax.Array, choice_BTk: jax.Array, segments_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(load-balance loss [B], how often each expert was chosen [B, E]), padding excluded.

    The loss is taken within each sequence, so that the sharding of the batch does not change it (DeepSeek-V3,
    arXiv 2412.19437, equations 17 to 20); it is 1 where loads are even.

    Args:
        scores_BTE: the router's softmax.
        choice_BTk: chosen experts.
        segments_BT: 0 is padding; None is none.

    Returns:
        The loss [B], and the share of choices [B, E].
    """
    num, top_k = scores_BTE.shape[-1], choice_BTk.shape[-1]
    real_BT1 = jnp.ones((*choice_BTk.shape[:2], 1), scores_BTE.dtype)
    if segments_BT is not None:
        real_BT1 = (segments_BT[..., None] != 0).astype(scores_BTE.dtype)
    chosen_BTE = jax.nn.one_hot(choice_BTk, num, dtype=scores_BTE.dtype).sum(2)
    counts_BE = (chosen_BTE * real_BT1).sum(1)
    tokens_B1 = jnp.maximum(real_BT1.sum(1), 1)
    share_BE = (scores_BTE * real_BT1).sum(1) / tokens_B1
    return (counts_BE * share_BE / tokens_B1).sum(-1) * num / top_k, counts_BE
