"""Positions of tokens, and rotary angles."""

# B batch, T time, K head_dim

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from spmd.core import tree
from spmd.core.fields import check

Angles = tuple[jax.Array, jax.Array]  # cosines and sines, each [B, T, 1, K / 2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary angles are slowed down for sequences longer than those of pretraining."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """All angles / factor (Chen et al. 2023, arXiv 2306.15595), or those of long wavelengths (Llama 3.1)."""
    factor: float = 8.0
    """By how much, at least 1."""
    low_frequency: float = 1.0
    """llama3: angles that turn less often than this in `length` tokens are divided by the factor."""
    high_frequency: float = 4.0
    """llama3: those that turn more often than this stay; between the two both are blended."""
    length: int = 8192
    """llama3: longest sequence of pretraining."""

    def __post_init__(self) -> None:
        check(self.factor >= 1, f"model.rope_scaling.factor={self.factor} must be at least 1")
        check(
            0 < self.low_frequency < self.high_frequency,
            f"model.rope_scaling.low_frequency={self.low_frequency} must be between 0 and"
            f" model.rope_scaling.high_frequency={self.high_frequency}",
        )

    def scale(self, rate_K: jax.Array) -> jax.Array:
        """Scaled rotary angles.

        Args:
            rate_K: angle per token [K / 2] of each pair.

        Returns:
            The same, slowed down, [K / 2].
        """
        if self.kind == "none":
            return rate_K
        if self.kind == "linear":
            return rate_K / self.factor
        turns_K = rate_K * (self.length / (2 * math.pi))
        between = (turns_K - self.low_frequency) / (self.high_frequency - self.low_frequency)
        kept_K = jnp.clip(between, 0, 1)
        return rate_K * (kept_K + (1 - kept_K) / self.factor)


class Rotary(NamedTuple):
    """Rotary angles of heads of width head_dim, of base theta."""

    head_dim: int
    theta: float
    scaling: RopeScaling = RopeScaling()


class TokenPositions(NamedTuple):
    """Positions and segments of the tokens that attention compares.

    positions_BT: index of each token in its document, -1 for padding while decoding. segments_BT: number of
    each token's document in its row, 0 for padding; None is one document for each row. angles: rotary angles;
    None without rotary positions. window_angles: those of blocks with a window; None where they are the same.
    bias: a relative.RelativeBias that is added to the scores; None without.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    angles: Angles | None
    window_angles: Angles | None = None
    bias: Any = None

    def angles_of(self, window: int) -> Angles | None:
        """The angles of a block with this window; 0 is none."""
        return self.window_angles if window and self.window_angles else self.angles


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
    rotary: Rotary | None,
    window_rotary: Rotary | None = None,
    dtype: Any,
) -> TokenPositions:
    """TokenPositions of a batch.

    Args:
        tokens_BT: tokens, or any array of that shape.
        positions_BT: index of each token in its document; None is 0, 1, ... along the row.
        segments_BT: number of its document; None is one for each row.
        rotary: the angles of a head, or None without rotary positions.
        window_rotary: that of blocks with a window, where it is another.
        dtype: compute type.

    Returns:
        Positions, segments and rotary angles.
    """
    positions_BT = positions_or_default(tokens_BT, positions_BT)
    angles, window_angles = (
        rotary_angles(positions_BT, each, dtype) if each else None
        for each in (rotary, window_rotary)
    )
    return TokenPositions(positions_BT, segments_BT, angles, window_angles)


def rotary_angles(positions_BT: jax.Array, rotary: Rotary, dtype: Any) -> Angles:
    """Cosines and sines of the angles position * theta^(-2i / K) (Su et al. 2021, arXiv 2104.09864).

    Args:
        positions_BT: index of each token.
        rotary: width K of a head, even; base theta of the angles, and their scaling.
        dtype: compute type; the angles are at least float32.

    Returns:
        Cosines and sines, each [B, T, 1, K / 2].
    """
    dtype, (head_dim, theta, scaling) = tree.at_least_float32(dtype), rotary
    rate_K = scaling.scale(theta ** (-jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim))
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
