"""Transforms that replace a rectangle: by noise (random_erasing), by that of a partner (cutmix)."""

# N examples of this process, H height, W width, C channels

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from spmd.core.fields import check
from spmd.data.augment import example_shapes, image_name, partner_labels, with_partner_labels
from spmd.data.transform import Batch, Draws, Transform, mix_bits

if TYPE_CHECKING:
    from spmd.data import Features


@dataclasses.dataclass(frozen=True)
class RandomErasing(Transform):
    """Replaces a random rectangle of some images by noise (Zhong et al. 2020, arXiv 1708.04896).

    Its area is uniform in [0.02, 0.4] of the image's, its proportion log-uniform in [0.3, 1 / 0.3]; a side
    that is longer than the image's is shortened. The noise is uniform over the range of the pixels.
    """

    name: ClassVar[str] = "random_erasing"

    probability: float = 0.5
    """Share of the images that are changed."""
    image: str = ""
    """Feature that is changed; empty is the one feature [H, W, C]."""

    def __post_init__(self) -> None:
        check(
            0 < self.probability <= 1,
            f"random_erasing: probability={self.probability} must be in (0, 1]",
        )

    def features(self, features: Features) -> Features:
        """The same."""
        image_name(self, self.image, {k: shape for k, (shape, _) in features.items()})
        return features

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        """The batch with the rectangles replaced."""
        name = image_name(self, self.image, example_shapes(batch))
        image = batch[name].copy()
        height, width, channels = image.shape[1:]
        chosen_N = draws.uniform() < self.probability
        area_N = (0.02 + 0.38 * draws.uniform()) * height * width
        proportion_N = np.exp(math.log(0.3) * (2 * draws.uniform() - 1))
        top_N, left_N, noise_N = (draws.uniform() for _ in range(3))
        rows_N = np.clip(np.rint(np.sqrt(area_N * proportion_N)), 1, height).astype(np.int64)
        columns_N = np.clip(np.rint(np.sqrt(area_N / proportion_N)), 1, width).astype(np.int64)
        top_N = (top_N * (height - rows_N + 1)).astype(np.int64)
        left_N = (left_N * (width - columns_N + 1)).astype(np.int64)
        for n in np.flatnonzero(chosen_N):
            shape = (rows_N[n], columns_N[n], channels)
            start = np.uint64(noise_N[n] * 2.0**53)
            bits = mix_bits(start + np.arange(math.prod(shape), dtype=np.uint64))
            levels = (bits >> np.uint64(56)).reshape(shape)  # 0 to 255
            noise = levels if image.dtype == np.uint8 else levels / 255
            image[n, top_N[n] : top_N[n] + rows_N[n], left_N[n] : left_N[n] + columns_N[n]] = noise
        return batch | {name: image}


@dataclasses.dataclass(frozen=True)
class CutMix(Transform):
    """Replaces a rectangle by that of another image, and blends the losses by its area (Yun et al. 2019).

    Adds `mix`, the share of the example, and `label_b` for each label, the partner's, as mixup does.
    """

    name: ClassVar[str] = "cutmix"
    partners: ClassVar[int] = 1

    alpha: float = 1.0
    """Parameter of the Beta distribution of the rectangle's area; 1 is uniform."""
    image: str = ""
    """Feature whose rectangles are replaced; empty is the one feature [H, W, C]."""

    def __post_init__(self) -> None:
        check(self.alpha > 0, f"cutmix: alpha={self.alpha} must be more than 0")

    def features(self, features: Features) -> Features:
        """The same, `mix`, and a `_b` for each label."""
        image_name(self, self.image, {k: shape for k, (shape, _) in features.items()})
        return with_partner_labels(self, features)

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        """The batch with rectangles of the partners; a bad record is nobody's partner."""
        from scipy.special import betaincinv

        name = image_name(self, self.image, example_shapes(batch))
        image = batch[name].copy()
        ((other, good_N),) = draws.partners
        height, width = image.shape[1:3]
        side_N = np.sqrt(1 - betaincinv(self.alpha, self.alpha, draws.uniform()))
        side_N = np.where(good_N, side_N, 0)
        y_N, x_N = (
            draws.uniform() * height,
            draws.uniform() * width,
        )  # the middle; the rest is clipped
        top_N, bottom_N = _ends(y_N, side_N * height, height)
        left_N, right_N = _ends(x_N, side_N * width, width)
        for n in range(len(image)):
            part = (n, slice(top_N[n], bottom_N[n]), slice(left_N[n], right_N[n]))
            image[part] = other[name][part]
        replaced_N = (bottom_N - top_N) * (right_N - left_N) / (height * width)
        mix_N = (1 - replaced_N).astype(np.float32)
        return batch | partner_labels(batch, other) | {name: image, "mix": mix_N}


def _ends(middle_N: np.ndarray, length_N: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """(first, last + 1) int64 of intervals, within 0 to `limit`."""
    return tuple(  # type: ignore[return-value]
        np.clip(np.rint(middle_N + sign * length_N / 2), 0, limit).astype(np.int64)
        for sign in (-1, 1)
    )
