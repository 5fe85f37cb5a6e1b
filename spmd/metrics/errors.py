"""Metrics of real values: mean absolute and root mean squared error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spmd.core import batches, tree
from spmd.core.fields import check
from spmd.metrics.base import Batch, Mean, Metric, Sums, Weights, ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAE(Mean):
    """Mean absolute error of outputs of the shape of feature `target`."""

    name: str = "mae"
    target: str = "target"

    def values(self, outputs: Any, batch: Batch) -> jax.Array:
        """|output - target| of each element."""
        return jnp.abs(difference(outputs, batch, self.target, f"metric {self.name!r}"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSE(Metric):
    """Root of the mean squared error of outputs of the shape of feature `target`."""

    name: str = "rmse"
    target: str = "target"

    def sums(self, outputs: Any, batch: Batch, weights: Weights) -> Sums:
        """Sum of squared errors, and weight."""
        square = jnp.square(difference(outputs, batch, self.target, f"metric {self.name!r}"))
        weight = self.weight(weights, square.shape).astype(square.dtype)
        return {"sum": jnp.sum(square * weight), "weight": weight.sum()}

    def compute(self, sums: Mapping[str, np.ndarray]) -> float | None:
        """sqrt(sum / weight)."""
        mean = ratio(sums["sum"], sums["weight"])
        return None if mean is None else mean**0.5


def difference(outputs: Any, batch: Batch, target: str, reader: str) -> jax.Array:
    """outputs - target, in at least float32.

    Args:
        outputs: numbers of the shape of feature `target`, which may have one more dim, of size 1.
        batch: the features, each [B, ...].
        target: name of the feature of wanted numbers.
        reader: who asks, for the message.

    Returns:
        the differences, of the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    wanted = batches.feature(batch, target)
    if outputs.shape == (*wanted.shape, 1):  # a network of one output, and a column of numbers
        outputs = outputs[..., 0]
    check(
        outputs.shape == wanted.shape,
        f"{reader}: the outputs are of shape {list(outputs.shape)}, and feature {target!r} of"
        f" {list(wanted.shape)}: they must be the same",
    )
    real = tree.at_least_float32(outputs.dtype)
    return outputs.astype(real) - wanted.astype(real)
