"""Several classes for each example, each present or not."""

# B batch, C classes

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spmd.core import batches
from spmd.core.batches import Ids
from spmd.metrics import AUC, Metric
from spmd.tasks import losses
from spmd.tasks.base import Task
from spmd.tasks.objective import Batch
from spmd.tasks.picture import Picture, beside_truth


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiLabel(Task):
    """Findings from images or vectors: binary cross-entropy for each class; the area under its ROC curve.

    Labels are [C], 1 where a class is present, 0 where it is not, -1 where nobody said.
    """

    input: str = "image"
    """Name of the input feature; uint8 is scaled to [0, 1]."""
    label: str = "labels"
    """Name of the feature of labels, [C]."""
    class_names: tuple[str, ...] = ()
    """Names of the classes: the area of each is then measured by itself, beside their mean."""

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """The area under the ROC curve, by class."""
        return (AUC(label=self.label, classes=self.class_names),)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """1 for each label that is known."""
        known = batches.feature(batch, self.label) >= 0
        return {"loss": known.astype(batches.feature(batch, "weight").dtype)}

    def values(self, outputs: Any, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
        """The binary cross-entropy of each label [B, C]."""
        self.ranges(batch, outputs)
        label_BC = jnp.maximum(batch[self.label], 0)  # unknown ones weigh nothing
        return {"loss": losses.binary_cross_entropy(outputs, label_BC)}

    def ranges(self, batch: Any, outputs: Any, model: Any = None) -> dict[str, Ids]:
        """A label is 0, 1, or -1 for unknown; one for each output."""
        batches.check_indices(batch, self.label, "BC", "present (1), absent (0) or unknown (-1)")
        labels = batch[self.label]
        if tuple(outputs.shape) != tuple(labels.shape):
            raise ValueError(
                f"the model's output is {batches.describe_array(outputs)} and feature {self.label!r} is"
                f" {batches.describe_array(labels)}: one output for each label is needed"
                f" (--model.classes {labels.shape[-1]})"
            )
        return {self.label: Ids(2, "values of a label (0 or 1)", low=-1, target=True)}

    def picture(self, batch: Mapping[str, np.ndarray], outputs: Any) -> Picture | None:
        """The labels of each image beside the probabilities of its classes."""
        return beside_truth(self, batch, 1 / (1 + np.exp(-np.asarray(outputs, np.float64))))
