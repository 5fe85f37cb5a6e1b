"""cuDNN's flash attention on NVIDIA GPUs."""

# B batch, T time, S time of keys, H query heads, G key and value heads, K head_dim

from __future__ import annotations

import jax
import jax.numpy as jnp

from spmd.core.fields import check
from spmd.parallel import scope


def attend_cudnn(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, same_BTS: jax.Array | None
) -> jax.Array:
    """Causal attention [B, T, H, K] by cuDNN.

    Args:
        q_BTHK: queries, in 16 bits, K a multiple of 8 and at most 256.
        k_BTGK: keys.
        v_BTGK: values.
        same_BTS: True where query and key are of one document; None is one document for each row.

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
    mask = None if same_BTS is None else same_BTS[:, None]
    return jax.nn.dot_product_attention(
        q_BTHK, k_BTGK, v_BTGK, mask=mask, is_causal=True, implementation="cudnn"
    )
