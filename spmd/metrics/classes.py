"""Metrics of classes: accuracy, confusion (mIoU, Dice), area under the ROC curve, calibration."""

# B batch, C classes, Q bins

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spmd.core import batches, tree
from spmd.core.fields import check
from spmd.metrics.base import Batch, Mean, Metric, Sums, Values, Weights, ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy(Mean):
    """Share of elements whose class is among the `top` highest logits [B, ..., C].

    Under mixup (a feature `mix`), that of a blend is the blend of those of its two labels.
    """

    name: str = "accuracy"
    label: str = "label"
    top: int = 1

    def __post_init__(self) -> None:
        check(self.top >= 1, f"metric {self.name!r}: top={self.top} must be at least 1")

    def values(self, outputs: Any, batch: Batch) -> jax.Array:
        """[B, ...] 1 where the prediction is right."""
        real = tree.at_least_float32(outputs.dtype)

        def is_right(label: jax.Array) -> jax.Array:
            if self.top == 1:
                return (outputs.argmax(-1).astype(label.dtype) == label).astype(real)
            chosen = jax.lax.top_k(outputs, min(self.top, outputs.shape[-1]))[1]
            return (chosen.astype(label.dtype) == label[..., None]).any(-1).astype(real)

        return blended(is_right, batch, self.label)


def blended(values_of: Any, batch: Batch, label: str) -> jax.Array:
    """The values of an example; under mixup, the blend of those of its two labels.

    Args:
        values_of: function of class indices [B, ...] that returns values [B, ...].
        batch: the features; under mixup `mix` [B] and the second label, `LABEL_b`.
        label: feature of the class indices.

    Returns:
        [B, ...].
    """
    values = values_of(batches.wide_indices(batches.feature(batch, label)))
    if "mix" not in batch:
        return values
    other = values_of(batches.wide_indices(batches.feature(batch, f"{label}_b")))
    share = batch["mix"].astype(values.dtype)
    share = share.reshape(share.shape + (1,) * (values.ndim - 1))
    return share * values + (1 - share) * other


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confusion(Metric):
    """mIoU and Dice from the confusion matrix of logits [B, ..., C].

    Values: `miou`, the mean over classes of TP / (TP + FP + FN) (Everingham et al. 2015, section 4.3), and
    `dice`, that of 2 TP / (2 TP + FP + FN); classes that neither occur nor are predicted are left out.
    Elements are counted, not weighted.
    """

    name: str = "confusion"
    label: str = "label"
    prefix: str = ""
    """Before the names of the values."""
    classes: tuple[str, ...] = ()
    """Names of the classes in their order: `iou/NAME` and `dice/NAME` of each are values too."""

    def sums(self, outputs: Any, batch: Batch, weights: Weights) -> Sums:
        """int32 [C, C]: elements by (label, prediction)."""
        classes = outputs.shape[-1]
        label = batches.feature(batch, self.label).astype(jnp.int32)
        counted = self.counted(weights, label.shape)
        cell = jnp.where(counted > 0, label, 0) * classes + outputs.argmax(-1).astype(jnp.int32)
        matrix = jnp.zeros(classes**2, jnp.int32).at[cell.reshape(-1)].add(counted.reshape(-1))
        return {"matrix": matrix.reshape(classes, classes)}

    def compute(self, sums: Mapping[str, np.ndarray]) -> float | Values | None:
        """Means over the classes that occur."""
        matrix = np.asarray(sums["matrix"], np.float64)
        both, labels, predictions = np.diag(matrix), matrix.sum(1), matrix.sum(0)
        union = labels + predictions - both
        occurs = union > 0
        iou, dice = both[occurs] / union[occurs], 2 * both[occurs] / (labels + predictions)[occurs]
        mean = lambda x: float(x.mean()) if occurs.any() else None
        values = {"miou": mean(iou), "dice": mean(dice)}
        check(
            len(self.classes) in (0, len(matrix)),
            f"metric {self.name!r}: {len(self.classes)} names for {len(matrix)} classes",
        )
        of_occurring = np.cumsum(occurs) - 1
        for index, name in enumerate(self.classes):
            place = of_occurring[index]
            values[f"iou/{name}"] = float(iou[place]) if occurs[index] else None
            values[f"dice/{name}"] = float(dice[place]) if occurs[index] else None
        return {f"{self.prefix}{name}": value for name, value in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MacroF1(Confusion):
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN), as f1_score(average="macro") of scikit-learn.

    Classes that neither occur nor are predicted are left out.
    """

    name: str = "macro_f1"

    def compute(self, sums: Mapping[str, np.ndarray]) -> float | Values | None:
        """The mean: F1 of a class is its Dice coefficient."""
        values = super().compute(sums)
        assert isinstance(values, dict)
        return values[f"{self.prefix}dice"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AUC(Metric):
    """Area under the ROC curve of a binary score, with a bound on its error.

    Scores are counted in `bins` bins of the sigmoid of the logit; pairs within a bin count half, so that the
    exact area is within `auc_error` of `auc`. outputs: logits [B, ...], [B, ..., 1] or [B, ..., 2].
    """

    name: str = "auc"
    label: str = "label"
    bins: int = 4096
    classes: tuple[str, ...] = ()
    """Names of the classes of labels [B, C]: `auc/NAME` of each is a value too, and `auc` is their mean."""

    def sums(self, outputs: Any, batch: Batch, weights: Weights) -> Sums:
        """int32 [Q] each, or [C, Q]: elements of label 0 and of label 1."""
        label = batches.feature(batch, self.label).astype(jnp.int32)
        logit = _binary_logit(outputs, label, self.name)
        place = (jax.nn.sigmoid(logit) * self.bins).astype(jnp.int32).clip(0, self.bins - 1)
        counted = self.counted(weights, label.shape)
        columns = len(self.classes)
        check(
            not columns or label.shape[1:] == (columns,),
            f"metric {self.name!r}: {columns} names of classes for labels of shape {list(label.shape)}",
        )
        if columns:
            place += self.bins * jnp.arange(columns, dtype=jnp.int32).reshape(1, -1)

        def histogram(chosen: jax.Array) -> jax.Array:
            empty = jnp.zeros(self.bins * max(columns, 1), jnp.int32)
            total = empty.at[place.reshape(-1)].add((counted * chosen).reshape(-1))
            return total.reshape(columns, self.bins) if columns else total

        positive = (label > 0).astype(jnp.int32)
        return {"negatives": histogram(1 - positive), "positives": histogram(positive)}

    def compute(self, sums: Mapping[str, np.ndarray]) -> Values:
        """The area and its bound; None without elements of both labels."""
        rows = [np.asarray(sums[k], np.float64) for k in ("negatives", "positives")]
        if not self.classes:
            area, error = _area(*rows)
            return {self.name: area, f"{self.name}_error": error}
        pairs = [_area(*row) for row in zip(*rows, strict=True)]
        known = [pair for pair in pairs if pair[0] is not None]
        means = [float(np.mean(x)) for x in zip(*known, strict=True)] or [None, None]
        values = dict(zip((self.name, f"{self.name}_error"), means, strict=True))
        names = [f"{self.name}/{name}" for name in self.classes]
        return values | {name: area for name, (area, _) in zip(names, pairs, strict=True)}


def _area(negatives: np.ndarray, positives: np.ndarray) -> tuple[float | None, float | None]:
    """(area under the curve of two histograms [Q], bound on its error); None without elements of both."""
    pairs = negatives.sum() * positives.sum()
    if not pairs:
        return None, None
    below = np.cumsum(negatives) - negatives
    tied = float(np.sum(positives * negatives) / pairs / 2)
    return float(np.sum(positives * below) / pairs) + tied, tied


def _binary_logit(outputs: Any, label: Any, name: str) -> jax.Array:
    """The logit of label 1, of the shape of the labels, in at least float32."""
    logits = outputs.astype(tree.at_least_float32(outputs.dtype))
    if logits.shape == label.shape:
        return logits
    if logits.shape[:-1] == label.shape and logits.shape[-1] in (1, 2):
        return logits[..., -1] - (logits[..., 0] if logits.shape[-1] == 2 else 0)
    raise ValueError(
        f"metric {name!r}: the outputs are of shape {list(logits.shape)} for labels of {list(label.shape)};"
        " it takes one logit for each label, or two"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration(Metric):
    """Expected calibration error of logits [B, ..., C] (Guo et al. 2017, section 2): the mean distance
    between confidence and accuracy over `bins` bins of equal width, by their number of elements.
    """

    name: str = "calibration"
    label: str = "label"
    bins: int = 15

    def sums(self, outputs: Any, batch: Batch, weights: Weights) -> Sums:
        """By bin: elements, right ones, and the sum of their confidence."""
        label = batches.wide_indices(batches.feature(batch, self.label))
        logits = outputs.astype(tree.at_least_float32(outputs.dtype))
        confidence = jax.nn.softmax(logits).max(-1)
        # Bins are open below and closed above: (0, 1/Q], ...
        place = (jnp.ceil(confidence * self.bins).astype(jnp.int32) - 1).clip(0, self.bins - 1)
        counted = self.counted(weights, label.shape)
        right = counted * (logits.argmax(-1).astype(label.dtype) == label).astype(jnp.int32)

        def by_bin(x: jax.Array) -> jax.Array:
            return jnp.zeros(self.bins, x.dtype).at[place.reshape(-1)].add(x.reshape(-1))

        sure = confidence * counted.astype(confidence.dtype)
        return {"count": by_bin(counted), "right": by_bin(right), "confidence": by_bin(sure)}

    def compute(self, sums: Mapping[str, np.ndarray]) -> float | None:
        """The weighted mean distance."""
        gap = np.abs(np.asarray(sums["right"], np.float64) - np.asarray(sums["confidence"]))
        return ratio(gap.sum(), np.asarray(sums["count"], np.float64).sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationRatio(Metric):
    """Predicted over observed positives of a binary label: 1 where the probabilities are right on average (He
    et al. 2014, "Practical lessons from predicting clicks on ads at Facebook", section 3). Logits as AUC
    takes them.
    """

    name: str = "calibration"
    label: str = "label"

    def sums(self, outputs: Any, batch: Batch, weights: Weights) -> Sums:
        """Sum of the probabilities, and number of elements of label 1."""
        label = batches.feature(batch, self.label).astype(jnp.int32)
        counted = self.counted(weights, label.shape)
        share = jax.nn.sigmoid(_binary_logit(outputs, label, self.name))
        return {
            "predicted": (share * counted.astype(share.dtype)).sum(),
            "observed": (label * counted).sum(dtype=jnp.int32),
        }

    def compute(self, sums: Mapping[str, np.ndarray]) -> float | None:
        """The ratio; None where no label is 1."""
        return ratio(sums["predicted"], sums["observed"])
