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


def image_of(batch: Mapping[str, Any], name: str) -> np.ndarray | None:
    """The feature of a batch where it is images that can be drawn, [N, H, W, 1, 3 or 4]; else None."""
    x = batch.get(name)
    return x if x is not None and x.ndim == 4 and x.shape[3] in (1, 3, 4) else None
