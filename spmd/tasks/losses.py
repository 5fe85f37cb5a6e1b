"""Losses as (sum, weight): a mean is taken once, over the global batch, never on a device."""

# B batch, T time, C classes, V vocab

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spmd.core import batches, tree
from spmd.core.fields import check
from spmd.metrics import Mean


def cross_entropy(
    logits_BC: jax.Array,
    label_B: jax.Array,
    smoothing: float = 0.0,
    class_weights: Sequence[float] = (),
) -> jax.Array:
    """Cross-entropy in at least float32.

    Args:
        logits_BC: [B, ..., C].
        label_B: [B, ...] class indices.
        smoothing: mass spread evenly over all classes (Szegedy et al. 2016, section 7).
        class_weights: factor of the loss by its class, C of them; none is 1.

    Returns:
        [B, ...].

    Raises:
        ValueError: class_weights are not C numbers above 0.
    """
    num = len(class_weights)
    check(
        num in (0, logits_BC.shape[-1]) and all(0 < w < float("inf") for w in class_weights),
        f"task.class_weights={tuple(class_weights)} must be {logits_BC.shape[-1]} numbers above 0, one for"
        " each class of the model's output",
    )
    logits_BC = logits_BC.astype(tree.at_least_float32(logits_BC.dtype))
    loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, label_B)
    if smoothing:
        uniform_B = -jnp.mean(jax.nn.log_softmax(logits_BC), axis=-1)
        loss_B = (1 - smoothing) * loss_B + smoothing * uniform_B
    if num:
        loss_B *= jnp.asarray(class_weights, loss_B.dtype)[label_B]
    return loss_B


def binary_cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Cross-entropy of yes and no, in at least float32.

    Args:
        logits: [...] of yes.
        label: [...] 1 for yes, 0 for no.

    Returns:
        the losses [...].
    """
    logits = logits.astype(tree.at_least_float32(logits.dtype))
    return jax.nn.softplus(logits) - label.astype(logits.dtype) * logits


def soft_dice(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """[B] 1 minus the mean over classes of the soft Dice coefficient of each image (Milletari et al. 2016,
    arXiv 1606.04797, with the squares left out).

    A class that an image neither has nor is given counts as met.

    Args:
        logits: [B, ..., C].
        mask: class indices [B, ...]; pixels below 0 count nowhere.

    Returns:
        the losses [B].
    """
    logits = logits.astype(tree.at_least_float32(logits.dtype))
    counted = (mask >= 0)[..., None].astype(logits.dtype)
    share = jax.nn.softmax(logits) * counted
    wanted = jax.nn.one_hot(mask, logits.shape[-1], dtype=logits.dtype)  # zeros below 0
    pixels = tuple(range(1, logits.ndim - 1))
    both_BC = jnp.sum(share * wanted, pixels)
    either_BC = jnp.sum(share, pixels) + jnp.sum(wanted, pixels)
    return 1 - jnp.mean((2 * both_BC + 1) / (either_BC + 1), axis=-1)


class TokenLosses(NamedTuple):
    """loss: cross-entropy; partition: log of the sum of exponentials; right: 1 where the target leads."""

    loss_BT: jax.Array
    partition_BT: jax.Array
    right_BT: jax.Array


def token_losses(logits_BTV: jax.Array, target_BT: jax.Array) -> TokenLosses:
    """Losses by token, in at least float32; that of a target which is no token means nothing.

    Reductions over the vocabulary only, so that a sharded vocabulary stays sharded (Narayanan et al. 2021,
    arXiv 2104.04473): a gather or an argmax would bring all logits together.

    Args:
        logits_BTV: [B, T, V].
        target_BT: [B, T] token indices.

    Returns:
        [B, T] each.
    """
    logits_BTV = logits_BTV.astype(tree.at_least_float32(logits_BTV.dtype))
    partition_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    token = jax.lax.broadcasted_iota(target_BT.dtype, logits_BTV.shape, 2)
    of_target = jnp.where(token == target_BT[..., None], logits_BTV, 0)
    target_logit_BT = of_target.sum(-1)
    right_BT = (target_logit_BT >= logits_BTV.max(-1)).astype(logits_BTV.dtype)
    return TokenLosses(partition_BT - target_logit_BT, partition_BT, right_BT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenAccuracy(Mean):
    """Share of tokens whose target has the highest logit."""

    name: str = "accuracy"

    def values(self, outputs: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """[B, T] 1 where the target leads."""
        return token_losses(outputs, batches.wide_indices(batch["targets"])).right_BT


def split_time(arrays: Any, chunks: int, time: int) -> Any:
    """Chunks of arrays whose logits are computed one after the other.

    Args:
        arrays: a tree of [B, T, ...].
        chunks: M, task.chunks.
        time: T.

    Returns:
        The tree of [M, B, T / M, ...]; chunk m has tokens m, m + M, ...

    Raises:
        ValueError: M does not divide T.
    """
    check(
        time % chunks == 0, f"task.chunks={chunks} does not divide the {time} tokens of a sequence"
    )
    part = lambda x: jnp.moveaxis(x.reshape(len(x), -1, chunks, *x.shape[2:]), 2, 0)
    return jax.tree.map(part, arrays)
