"""Losses as (sum, weight): a mean is taken once, over the global batch, never on a device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from spmd import tree


def cross_entropy(logits_BC: jax.Array, label_B: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """[B] cross-entropy in at least float32; labels are class indices.

    smoothing: mass spread evenly over all classes (Szegedy et al. 2016, section 7).
    """
    logits_BC = logits_BC.astype(tree.wide(logits_BC.dtype))
    loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, label_B)
    if smoothing:
        uniform_B = -jnp.mean(jax.nn.log_softmax(logits_BC), axis=-1)
        loss_B = (1 - smoothing) * loss_B + smoothing * uniform_B
    return loss_B
