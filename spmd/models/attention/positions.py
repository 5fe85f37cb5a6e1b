"""Positions of tokens, and rotary angles."""

# B batch, T time, K head_dim

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd.core import tree

Angles = tuple[jax.Array, jax.Array]  # cosines and sines, each [B, T, 1, K / 2]


class TokenPositions(NamedTuple):
    """Positions and segments of the tokens that attention compares.

    positions_BT: index of each token in its document, -1 for padding while decoding. segments_BT: number of
    each token's document in its row, 0 for padding; None is one document for each row. angles: rotary angles;
    None without rotary positions.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    angles: Angles | None


def positions_or_default(tokens_BT: jax.Array, positions_BT: jax.Array | None) -> jax.Array:
    """Positions [B, T]: those given, or 0, 1, ... along each row.

    Args:
        tokens_BT: tokens.
        positions_BT: positions, or None.

    Returns:
        [B, T], int32 by default.
    """
    if positions_BT is None:
        return jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
    return positions_BT


def token_positions(
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    rotary: tuple[int, float] | None,
    dtype: Any,
) -> TokenPositions:
    """TokenPositions of a batch; rotary: (head_dim, theta), or None without rotary positions.

    Args:
        tokens_BT: tokens, or any array of that shape.
        positions_BT: index of each token; None is 0, 1, ...
        segments_BT: document of each token.
        rotary: (head_dim, theta), or None without rotary positions.
        dtype: compute type.

    Returns:
        Positions, segments and rotary angles.
    """
    positions_BT = positions_or_default(tokens_BT, positions_BT)
    angles = rotary_angles(positions_BT, *rotary, dtype) if rotary else None
    return TokenPositions(positions_BT, segments_BT, angles)


def rotary_angles(positions_BT: jax.Array, head_dim: int, theta: float, dtype: Any) -> Angles:
    """Cosines and sines of the angles position * theta^(-2i / K) (Su et al. 2021, arXiv 2104.09864).

    Args:
        positions_BT: index of each token.
        head_dim: width K of a head, even.
        theta: base of the angles.
        dtype: compute type; the angles are at least float32.

    Returns:
        Cosines and sines, each [B, T, 1, K / 2].
    """
    dtype = tree.at_least_float32(dtype)
    rate_K = theta ** (-jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    angle = positions_BT.astype(dtype)[:, :, None, None] * rate_K.reshape(1, 1, 1, -1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHK: jax.Array, angles: Angles) -> jax.Array:
    """x with each pair (x[i], x[i + K/2]) rotated by its angle, paired as in Hugging Face Llama weights.

    Args:
        x_BTHK: queries or keys.
        angles: cosines and sines [B, T, 1, K / 2].

    Returns:
        [B, T, H, K], in the type of x.
    """
    cos, sin = angles
    a, b = jnp.split(x_BTHK.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


def sinusoids(positions_BT: jax.Array, size: int, dtype: Any) -> jax.Array:
    """[B, T, size] sines, then cosines, of wavelengths from 2 pi to 10,000 x 2 pi (Vaswani et al. 2017).

    Args:
        positions_BT: index of each token.
        size: numbers for each token, even.
        dtype: type of the result.

    Returns:
        [B, T, size].
    """
    real = tree.at_least_float32(jnp.dtype(dtype))
    rate_K = 10_000.0 ** -(jnp.arange(size // 2, dtype=real) / (size // 2))
    angle_BTK = positions_BT.astype(real)[..., None] * rate_K.reshape(1, 1, -1)
    return jnp.concatenate([jnp.sin(angle_BTK), jnp.cos(angle_BTK)], axis=-1).astype(dtype)
