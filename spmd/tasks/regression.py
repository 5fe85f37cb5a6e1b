"""Real numbers from images or vectors."""

# B batch, N numbers

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from spmd.core import batches
from spmd.metrics import MAE, RMSE, Metric, difference
from spmd.tasks.base import Task
from spmd.tasks.objective import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """Numbers [N] of each example: mean squared error; RMSE and MAE."""

    input: str = "image"
    """Name of the input feature; uint8 is scaled to [0, 1]."""
    target: str = "target"
    """Name of the feature of wanted numbers, [N] as the model's outputs."""

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """RMSE and MAE."""
        return RMSE(target=self.target), MAE(target=self.target)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """1 for each number."""
        return {"loss": jnp.ones(batches.feature(batch, self.target).shape, batch["weight"].dtype)}

    def values(self, outputs: Any, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
        """The squared error of each number [B, N]."""
        return {"loss": jnp.square(difference(outputs, batch, self.target, "task Regression"))}
