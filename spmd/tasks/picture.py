"""How the predictions of a task are shown beside their truth."""

# N examples, H height, W width, C channels

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np


class Picture(NamedTuple):
    """Examples to draw; the titles are those of the picture, as `truth` and `predicted`.

    image: [N, H, W, 1, 3 or 4]. masks: {title: classes [N, H, W]}, each drawn over a copy of the image.
    classes: {title: [N]}, their numbers. numbers: {title: [N, ...]}.
    """

    image: np.ndarray
    masks: Mapping[str, np.ndarray] = MappingProxyType({})
    classes: Mapping[str, np.ndarray] = MappingProxyType({})
    numbers: Mapping[str, np.ndarray] = MappingProxyType({})


def beside_truth(task: Any, batch: Mapping[str, Any], outputs: Any) -> Picture | None:
    """Outputs of a task on images, whose truth is the feature that its field `label` or `target` names.

    Args:
      task: with a field `input`.
      batch: {feature: [N, ...]}.
      outputs: [N, ...].

    Returns:
      Classes [N] beside logits [N, C], masks [N, H, W] beside logits [N, H, W, C], numbers beside numbers of
      their shape; None for anything else.
    """
    image = batch.get(getattr(task, "input", ""))
    truth = batch.get(getattr(task, "label", getattr(task, "target", "")))
    if image is None or truth is None or not isinstance(outputs, np.ndarray):
        return None
    if image.ndim != 4 or image.shape[3] not in (1, 3, 4):
        return None
    if outputs.shape == truth.shape:
        return Picture(image, numbers={"truth": truth, "predicted": outputs})
    if outputs.shape[:-1] != truth.shape or truth.dtype.kind not in "iu":
        return None
    both = {"truth": truth, "predicted": outputs.argmax(-1)}
    if truth.ndim == 1:
        return Picture(image, classes=both)
    return Picture(image, masks=both) if truth.shape == image.shape[:3] else None
