"""Attention by the implementation asked for, or an error that says why it cannot run."""

# B batch, T time, S time of keys, H query heads, G key and value heads, K head_dim

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from spmd.core.fields import check
from spmd.models.attention.cudnn import attend_cudnn
from spmd.models.attention.kernels import check_kernel
from spmd.models.attention.mask import Mask
from spmd.models.attention.ring import attend_ring
from spmd.models.attention.ring_full import attend_ring_full
from spmd.models.attention.splash import attend_splash
from spmd.models.attention.ulysses import attend_ulysses
from spmd.models.attention.xla import attend_xla
from spmd.parallel import scope

Implementation = Literal["xla", "cudnn", "splash"]
Context = Literal["ring", "ulysses"]
# (positions of queries [T], of keys [S]) -> [H or 1, T, S], added to the scaled scores
Bias = Callable[[jax.Array, jax.Array], jax.Array]


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Bias | None = None,
    implementation: Implementation = "xla",
    context: Context = "ring",
) -> jax.Array:
    """Attention [B, T, H, K] of each query to the keys that it sees, the softmax at least in float32.

    Args:
        q_BTHK: queries.
        k_BSGK: keys; each serves H / G consecutive query heads.
        v_BSGK: values.
        mask: the keys that a query sees.
        scale: factor on the scores; None is K^-1/2.
        softcap: scaled scores become cap * tanh(scores / cap) (Gemma 2, arXiv 2408.00118, section 2), before
            the bias and the mask; 0 is off.
        bias: function of the positions, counted along the row, that is added to the scores (T5, ALiBi).
        implementation: the kernel.
        context: how attention is computed where the sequence is sharded over devices.

    Returns:
        [B, T, H, K], in the type of the queries.

    Raises:
        ValueError: the implementation cannot run here or cannot compute this; there is no silent fall back
            to a slower one.
    """
    factor: float = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    needs = _features(mask, q_BTHK.shape[1], k_BSGK.shape[1], softcap, bias is not None)
    sharded = bool(scope.sharding_axes("time"))
    if sharded and context == "ring":
        _check_ring(mask, implementation, needs)
        ring = attend_ring_full if mask.kind == "full" else attend_ring
        return ring(q_BTHK, k_BSGK, v_BSGK, mask, factor, softcap)
    check_kernel(f"model.attention={implementation}", needs)
    bias_HTS = None if bias is None else _evaluate(bias, q_BTHK, k_BSGK)
    kernel = functools.partial(
        _attend_local, scale=factor, softcap=softcap, implementation=implementation
    )
    if sharded:
        return attend_ulysses(q_BTHK, k_BSGK, v_BSGK, mask, bias_HTS, kernel)
    return kernel(q_BTHK, k_BSGK, v_BSGK, mask, bias_HTS)


def _attend_local(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    bias_HTS: jax.Array | None,
    *,
    scale: float,
    softcap: float,
    implementation: Implementation,
) -> jax.Array:
    """The same of unsharded sequences, the bias as an array."""
    (batch, time), keys = q_BTHK.shape[:2], k_BSGK.shape[1]
    may_be_empty = mask.may_be_empty(time, keys)
    if implementation == "xla":
        options = {"scale": scale, "softcap": softcap, "bias": bias_HTS}
        visible_BTS = mask.visible(batch, time, keys)
        return attend_xla(q_BTHK, k_BSGK, v_BSGK, visible_BTS, **options, may_be_empty=may_be_empty)
    if implementation == "splash":
        y_BTHK = attend_splash(q_BTHK, k_BSGK, v_BSGK, mask, scale, softcap)
    else:
        y_BTHK = attend_cudnn(q_BTHK, k_BSGK, v_BSGK, mask, scale, bias_HTS)
    visible_BTS = mask.visible(batch, time, keys) if may_be_empty else None
    if visible_BTS is not None:
        y_BTHK = jnp.where(visible_BTS.any(-1)[:, :, None, None], y_BTHK, 0)
    return y_BTHK


def _evaluate(bias: Bias, q_BTHK: jax.Array, k_BSGK: jax.Array) -> jax.Array:
    """The bias [H or 1, T, S] of all positions."""
    (time, heads), keys = q_BTHK.shape[1:3], k_BSGK.shape[1]
    bias_HTS = bias(jnp.arange(time, dtype=jnp.int32), jnp.arange(keys, dtype=jnp.int32))
    check(
        bias_HTS.shape in ((heads, time, keys), (1, time, keys)),
        f"the bias of attention has the shape {bias_HTS.shape}; it is [heads or 1, queries, keys]:"
        f" {(heads, time, keys)} or {(1, time, keys)}",
    )
    return bias_HTS


def _features(mask: Mask, time: int, keys: int, softcap: float, bias: bool) -> set[str]:
    """Names in KERNELS of the features that a kernel needs."""
    optional = {
        "a window on both sides": mask.kind == "window" and mask.window[1] > 0,
        "separate segments of keys": not mask.joint,
        "cross-attention": time != keys,
        "a soft cap": softcap > 0,
        "a bias": bias,
    }
    return {f"a {mask.kind} mask"} | {name for name, needed in optional.items() if needed}


def _check_ring(mask: Mask, implementation: Implementation, needs: set[str]) -> None:
    check(
        implementation == "xla",
        f"model.attention={implementation} takes unsharded sequences, and model.context=ring shards them; use"
        " --model.context ulysses, or --model.attention xla",
    )
    full = " with a full mask" if mask.kind == "full" else ""
    check_kernel(f"model.context=ring{full}", needs)
