"""Classification of images or vectors."""

# B batch, C classes

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from spmd.core import batches
from spmd.core.batches import Ids
from spmd.core.fields import check
from spmd.metrics import Accuracy, Metric, blended
from spmd.tasks import losses
from spmd.tasks.base import Task
from spmd.tasks.objective import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Classes from images or vectors: softmax cross-entropy, accuracy; both blended under mixup."""

    input: str = "image"
    """Name of the input feature; uint8 is scaled to [0, 1]."""
    label: str = "label"
    """Name of the class-index feature."""
    label_smoothing: float = 0.0
    """Mass spread evenly over the classes."""
    class_weights: tuple[float, ...] = ()
    """Factor of an example's loss, by its class; empty is 1. Those that average to 1 keep its scale."""
    train_metrics = ("accuracy",)

    def __post_init__(self) -> None:
        check(
            0 <= self.label_smoothing < 1,
            f"task.label_smoothing={self.label_smoothing} must be in [0, 1)",
        )

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """Accuracy."""
        return (Accuracy(label=self.label),)

    def values(self, outputs: Any, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
        """The cross-entropy of each example; of a blend, the blend of those of its labels."""
        self.ranges(batch, outputs)
        smoothing, scales = self.label_smoothing if train else 0.0, self.class_weights
        loss_of = lambda label_B: losses.cross_entropy(outputs, label_B, smoothing, scales)
        return {"loss": blended(loss_of, batch, self.label)}

    def ranges(self, batch: Any, outputs: Any, model: Any = None) -> dict[str, Ids]:
        """The labels are classes of the output; one for each example."""
        names = [self.label, f"{self.label}_b"] if "mix" in batch else [self.label]
        for name in names:
            batches.check_indices(batch, name, "B", "one class for each example")
        batches.check_logits(outputs, batch[self.label], self.label, "classes")
        classes = Ids(outputs.shape[-1], "classes of the model's output", target=True)
        return dict.fromkeys(names, classes)
