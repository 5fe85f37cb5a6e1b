"""Sequences from sequences, by an encoder-decoder."""

# B batch, T time, V vocab

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from spmd.core import tree
from spmd.core.batches import Ids
from spmd.core.fields import check
from spmd.tasks.language import LanguageModel
from spmd.tasks.objective import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translation(LanguageModel):
    """The next token of a target, given its source; the loss is smoothed, evaluations are not."""

    features: tuple[str, ...] = (
        *("tokens", "source", "positions", "segments"),
        *("source_positions", "source_segments"),
    )
    """Features that the model is called with, in order; those from the third on only where the batch has
    them."""
    label_smoothing: float = 0.1
    """Mass spread evenly over the vocabulary (Vaswani et al. 2017, section 5.4)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            0 <= self.label_smoothing < 1,
            f"task.label_smoothing={self.label_smoothing} must be in [0, 1)",
        )

    def values(self, outputs: Any, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
        """The cross-entropy of each token, smoothed in training, and its squared log-partition."""
        values = super().values(outputs, batch, train=train)
        if train and self.label_smoothing:
            logits_BTV = outputs.astype(tree.at_least_float32(outputs.dtype))
            partition_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
            uniform_BT = partition_BT - jnp.mean(logits_BTV, axis=-1)
            smoothing = self.label_smoothing
            values["loss"] = (1 - smoothing) * values["loss"] + smoothing * uniform_BT
        return values

    def ranges(self, batch: Any, outputs: Any, model: Any) -> dict[str, Ids]:
        """Tokens of both sides and targets are of the vocabulary."""
        ranges = super().ranges(batch, outputs, model)
        return ranges | {self.features[1]: ranges[self.features[0]]}
