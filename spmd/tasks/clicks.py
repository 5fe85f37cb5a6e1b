"""Prediction of clicks: a binary label from numbers and looked-up categories."""

# B batch

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from spmd.core import batches
from spmd.core.batches import Ids
from spmd.core.fields import check
from spmd.metrics import AUC, CalibrationRatio, Metric
from spmd.parallel.tables import PREFIX
from spmd.tasks import losses
from spmd.tasks.base import Task
from spmd.tasks.objective import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClickPrediction(Task):
    """The probability of a click: binary cross-entropy, area under the ROC curve, calibration."""

    input: str = "numbers"
    """Feature of real values, [B, ...]."""
    label: str = "label"
    """Feature that is 1 for a click, else 0."""

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """AUC, and predicted over observed clicks."""
        return AUC(label=self.label), CalibrationRatio(label=self.label)

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """The numbers, and the rows of each looked-up feature by its name."""
        rows = {k.removeprefix(PREFIX): x for k, x in batch.items() if k.startswith(PREFIX)}
        return batches.feature(batch, self.input), rows

    def values(self, outputs: Any, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
        """The cross-entropy of each example."""
        self.ranges(batch, outputs)
        return {"loss": losses.binary_cross_entropy(outputs, batch[self.label])}

    def ranges(self, batch: Any, outputs: Any, model: Any = None) -> dict[str, Ids]:
        """The labels are 0 or 1; one logit for each."""
        batches.check_indices(batch, self.label, "B", "1 for a click")
        check(
            outputs.shape == batch[self.label].shape
            and jnp.issubdtype(outputs.dtype, jnp.floating),
            f"the model's output is {batches.describe_array(outputs)}: the task takes one logit for each"
            " example, float[B]",
        )
        return {self.label: Ids(2, "labels", target=True)}
