"""Parameters in a type narrower than float32: stored in bfloat16, differentiated and updated in float32.

A bfloat16 has 8 significant bits, so that rounding to the nearest loses every update below 1/512 of its
parameter: training stalls. Here an update is computed in float32 and rounded once, up or down at random with
the probability that makes the mean exact (stochastic rounding: Gupta et al. 2015, arXiv 1502.02551; for
bfloat16 training Zamirai et al. 2020, arXiv 2010.06192). Gradients, and with them every sum over tokens,
microbatches and devices, are float32: a gradient function is handed a float32 copy of the parameters.

Nothing in here changes a program whose parameters are float32 or float64.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spmd.core import tree
from spmd.core.bits import mix
from spmd.core.fields import check

PyTree = Any
# Folded into the step's key; no example has this id (strategies.grads.direct.NOISE is -2).
ROUNDING = -3
_LOW_BITS = 16  # of a float32, which bfloat16 lacks


def is_narrow(dtype: Any) -> bool:
    """Whether `dtype` is a floating type below float32."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.dtype(dtype).itemsize < 4


def any_narrow(params: PyTree) -> bool:
    """Whether a leaf is narrow."""
    return any(is_narrow(x.dtype) for x in jax.tree.leaves(params))


def at_least_float32(arrays: PyTree) -> PyTree:
    """The arrays, narrow ones cast to float32."""
    widen = lambda x: x.astype(jnp.float32) if is_narrow(x.dtype) else x
    return jax.tree.map(widen, arrays)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with its state (moments, statistics) and its arithmetic in float32 at least, whatever the type of
    the parameters and gradients that it is given.
    """

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        return tx.update(at_least_float32(updates), state, at_least_float32(params))

    return optax.GradientTransformation(lambda params: tx.init(at_least_float32(params)), update)


def stochastic_round(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """Round to one of the two neighbours in `dtype`, with probabilities that keep the mean.

    Args:
        x: float32 [...]. Values that `dtype` has, infinities and NaN are kept.
        dtype: bfloat16.
        key: the random bits are a function of the key and of an element's index in the unsharded array, so
            that they are the same on every mesh.

    Raises:
        ValueError: for another type than bfloat16, whose values are not the upper halves of float32's.
    """
    check(
        jnp.dtype(dtype) == jnp.bfloat16,
        f"parameters of type {jnp.dtype(dtype)} cannot be updated: of the types below float32 only bfloat16"
        " has its range; use --param-dtype bfloat16 or float32",
    )
    return _add_and_cut(x, jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32))


def round_rows(x_KD: jax.Array, row_K: jax.Array, key: jax.Array) -> jax.Array:
    """Rows of a table in bfloat16, rounded as by `stochastic_round`.

    Args:
        x_KD: float [K, D].
        row_K: int32 [K] numbers of the rows: with the key and the column they decide the random bits.
        key: uint32 [2] of the table and the step.

    Returns:
        bfloat16 [K, D].
    """
    row_K1 = mix(row_K.astype(jnp.uint32) ^ key[0])[:, None]
    column = jnp.arange(x_KD.shape[1], dtype=jnp.uint32)[None] * jnp.uint32(0x9E3779B9)
    draw_KD = mix(row_K1 + column ^ key[1]) >> _LOW_BITS
    return _add_and_cut(x_KD.astype(jnp.float32), draw_KD)


def _add_and_cut(x: jax.Array, draw: jax.Array) -> jax.Array:
    """The upper halves of float32 numbers after adding `draw`, uint32 below 2^16, to the lower ones."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # A carry out of the low bits is one step away from zero, whatever the sign.
    high = ((bits + draw) >> _LOW_BITS).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(high, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def round_like(new: PyTree, params: PyTree, step_key: jax.Array, part: Any = None) -> PyTree:
    """New parameters, float32 at least, in the types of `params`; narrow ones by stochastic rounding.

    Args:
        step_key: fold_in(seed, step); each leaf draws by its path name.
        part: index of this update where a step makes several (one per replica).
    """
    key = jax.random.fold_in(step_key, jnp.int32(ROUNDING))
    key = key if part is None else jax.random.fold_in(key, part)

    def round_leaf(name: str, x: jax.Array, like: jax.Array) -> jax.Array:
        if not is_narrow(like.dtype):
            return x
        leaf_key = jax.random.fold_in(key, jnp.uint32(zlib.crc32(name.encode())))
        return stochastic_round(x, like.dtype, leaf_key)

    return tree.map_named(round_leaf, new, params)


def widen_gradients(grads_of: Callable[..., Any]) -> Callable[..., Any]:
    """A grad.GradsOf whose gradients are float32 at least: it differentiates at a widened copy of the
    parameters. A model that computes in the parameters' type needs it set explicitly (`with_compute_type`).
    """

    def widened(params: PyTree, *rest: Any) -> Any:
        return grads_of(at_least_float32(params), *rest)

    return widened


def with_compute_type(model: Any, param_dtype: str) -> Any:
    """A model config whose empty `dtype` ("that of the parameters") is set to a narrow `param_dtype`, since
    the model receives a float32 copy of its parameters while it trains.
    """
    if is_narrow(param_dtype) and getattr(model, "dtype", None) == "":
        return dataclasses.replace(model, dtype=param_dtype)
    return model
