"""cuDNN's flash attention on NVIDIA GPUs."""

# B batch, T time, S time of keys, H query heads, G key and value heads, K head_dim

from __future__ import annotations

import jax
import jax.numpy as jnp

from spmd.core.fields import check
from spmd.models.attention.mask import Mask
from spmd.parallel import scope


def attend_cudnn(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    scale: float,
    bias_HTS: jax.Array | None,
) -> jax.Array:
    """Attention [B, T, H, K] by cuDNN, which skips what a causal mask hides, or a window to the left.

    Args:
        q_BTHK: queries, in 16 bits, K a multiple of 8 and at most 256.
        k_BSGK: keys.
        v_BSGK: values.
        mask: the keys that a query sees.
        scale: factor on the scores.
        bias_HTS: [H or 1, T, S], added to the scores.

    Returns:
        [B, T, H, K], in the type of the queries.

    Raises:
        ValueError: the platform, the type or the head dim is not cuDNN's.
    """
    platform, head_dim = scope.platform(), q_BTHK.shape[-1]
    instead = "use --model.attention xla"
    check(
        platform in ("gpu", "cuda"),
        f"model.attention=cudnn runs on NVIDIA GPUs, this run is on {platform}; {instead}",
    )
    check(
        q_BTHK.dtype in (jnp.bfloat16, jnp.float16),
        f"model.attention=cudnn computes in 16 bits, given {q_BTHK.dtype};"
        f" set --model.dtype bfloat16, or {instead}",
    )
    check(
        head_dim % 8 == 0 and head_dim <= 256,
        f"model.attention=cudnn takes a head dim that is a multiple of 8 and at most 256, given {head_dim};"
        f" change model.head_dim, or {instead}",
    )
    (batch, time), keys = q_BTHK.shape[:2], k_BSGK.shape[1]
    left = mask.window[0] if mask.kind == "window" and mask.window[1] == 0 else None
    causal = time == keys and (mask.kind == "causal" or left is not None)
    visible_BTS = (mask.segments if causal else mask.visible)(batch, time, keys)
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        None if bias_HTS is None else bias_HTS[None].astype(q_BTHK.dtype),
        None if visible_BTS is None else visible_BTS[:, None],
        scale=scale,
        is_causal=causal,
        local_window_size=(left, 0) if causal and left is not None else None,
        implementation="cudnn",
    )
