"""A class for each pixel."""

# B batch, H height, W width, C classes

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from spmd.core import batches
from spmd.core.batches import Ids
from spmd.core.fields import check
from spmd.metrics import Confusion, Metric
from spmd.tasks import losses
from spmd.tasks.base import Task
from spmd.tasks.objective import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(Task):
    """Masks from images: cross-entropy or focal loss by pixel, Dice by image; mIoU and Dice by class.

    Pixels of the mask below 0 are unlabelled: they count in no loss and no metric.
    """

    input: str = "image"
    """Name of the image feature; uint8 is scaled to [0, 1]."""
    label: str = "mask"
    """Name of the feature of class indices [H, W]."""
    pixel: Literal["cross_entropy", "focal"] = "cross_entropy"
    """The loss of a pixel; focal weighs those that are right already less (Lin et al. 2017, equation 4)."""
    gamma: float = 2.0
    """Exponent of the focal loss."""
    dice: float = 0.0
    """Factor of the Dice loss, 1 minus the mean soft Dice of an image's classes (Milletari et al. 2016)."""
    class_names: tuple[str, ...] = ()
    """Names of the classes: their own IoU and Dice are then measured too."""

    def __post_init__(self) -> None:
        for name in ("gamma", "dice"):
            value = getattr(self, name)
            check(value >= 0, f"task.{name}={value} must not be negative")

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """Mean IoU and Dice, and those of each named class."""
        return (Confusion(label=self.label, term=self.pixel, classes=self.class_names),)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """1 for each labelled pixel, and for each image."""
        mask_BHW, weight_B = batches.feature(batch, self.label), batches.feature(batch, "weight")
        labelled = {self.pixel: (mask_BHW >= 0).astype(weight_B.dtype)}
        return labelled | ({"soft_dice": jnp.ones_like(weight_B)} if self.dice else {})

    def values(self, outputs: Any, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
        """The loss of each pixel [B, H, W], and of each image [B]."""
        self.ranges(batch, outputs)
        mask_BHW = batches.wide_indices(batch[self.label])
        loss_BHW = losses.cross_entropy(outputs, jnp.maximum(mask_BHW, 0))
        terms = {"soft_dice": losses.soft_dice(outputs, mask_BHW)} if self.dice else {}
        if self.pixel == "focal":
            loss_BHW = (1 - jnp.exp(-loss_BHW)) ** self.gamma * loss_BHW
        return {self.pixel: loss_BHW, **terms}

    def coefficients(self, model: Any) -> dict[str, float]:
        """1 for the loss of a pixel, `dice` for that of an image."""
        return {self.pixel: 1.0} | ({"soft_dice": self.dice} if self.dice else {})

    def ranges(self, batch: Any, outputs: Any, model: Any = None) -> dict[str, Ids]:
        """The labels are classes of the output, or -1."""
        batches.check_indices(batch, self.label, "BHW", "one class for each pixel")
        batches.check_logits(outputs, batch[self.label], self.label, "classes")
        things = "classes of the model's output"
        return {self.label: Ids(outputs.shape[-1], things, low=-1, target=True)}
