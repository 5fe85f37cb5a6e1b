"""Transforms of colours: normalize, color_jitter."""

# N examples of this process, H height, W width, C channels

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from spmd.core.fields import check
from spmd.data.augment import as_floating, example_shapes, image_name
from spmd.data.transform import Batch, Draws, Transform

if TYPE_CHECKING:
    from spmd.data import Features

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


@dataclasses.dataclass(frozen=True)
class Normalize(Transform):
    """Subtracts a mean and divides by a standard deviation, in values of [0, 1]: the result is float32.

    A batch of uint8 is a quarter of the bytes, and tasks scale it to [0, 1] on the device: models whose first
    layers are normalised train without this one; weights trained elsewhere need it.
    """

    name: ClassVar[str] = "normalize"

    mean: tuple[float, ...] = IMAGENET_MEAN
    """A value for each channel, or one for all."""
    std: tuple[float, ...] = IMAGENET_STD
    """A value for each channel, or one for all."""
    image: str = ""
    """Feature that is normalised; empty is the one feature [H, W, C]."""

    def __post_init__(self) -> None:
        check(all(s > 0 for s in self.std), f"normalize: std={self.std} must be more than 0")

    def features(self, features: Features) -> Features:
        """The image in float32."""
        name = image_name(self, self.image, {k: shape for k, (shape, _) in features.items()})
        shape = features[name][0]
        for field in ("mean", "std"):
            num = len(getattr(self, field))
            check(
                num in (1, shape[-1]),
                f"normalize: {field} has {num} values and {name!r} {shape[-1]} channels; give one for each,"
                " joined by +, or one for all",
            )
        return {**features, name: (shape, "float32")}

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        """The batch with the image normalised."""
        name = image_name(self, self.image, example_shapes(batch))
        image = as_floating(batch[name]).astype(np.float32, copy=False)
        image -= np.array(self.mean, np.float32)
        image /= np.array(self.std, np.float32)
        return batch | {name: image}


@dataclasses.dataclass(frozen=True)
class ColorJitter(Transform):
    """Random brightness, contrast and saturation, in this order.

    Each factor is uniform in [1 - x, 1 + x]: of the pixels, of their distance from the image's mean grey, of
    their distance from their own grey. Values are clipped to their range.
    """

    name: ClassVar[str] = "color_jitter"

    brightness: float = 0.4
    """Largest change of the brightness."""
    contrast: float = 0.4
    """Largest change of the contrast."""
    saturation: float = 0.4
    """Largest change of the saturation; grey images have none."""
    image: str = ""
    """Feature that is changed; empty is the one feature [H, W, C]."""

    def __post_init__(self) -> None:
        for field in ("brightness", "contrast", "saturation"):
            value = getattr(self, field)
            check(0 <= value <= 1, f"color_jitter: {field}={value} must be in [0, 1]")

    def features(self, features: Features) -> Features:
        """The same."""
        name = image_name(self, self.image, {k: shape for k, (shape, _) in features.items()})
        shape, dtype = features[name]
        check(
            shape[-1] in (1, 3) and dtype in ("uint8", "float32"),
            f"color_jitter takes uint8 or float32 images of 1 or 3 channels, and {name!r} is"
            f" {dtype}{list(shape)}",
        )
        return features

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        """The batch with the colours changed."""
        name = image_name(self, self.image, example_shapes(batch))
        given = batch[name]
        image = as_floating(given)
        factor = lambda most: (1 + most * (2 * draws.uniform() - 1)).astype(np.float32)
        brightness_N, contrast_N, saturation_N = (
            factor(most)[:, None, None, None]
            for most in (self.brightness, self.contrast, self.saturation)
        )
        image *= brightness_N
        np.clip(image, 0, 1, out=image)
        mean_N = grey(image).mean((1, 2, 3), keepdims=True)
        image -= mean_N
        image *= contrast_N
        image += mean_N
        np.clip(image, 0, 1, out=image)
        if image.shape[-1] == 3:
            own = grey(image)
            image -= own
            image *= saturation_N
            image += own
            np.clip(image, 0, 1, out=image)
        if given.dtype == np.uint8:
            image = np.rint(image * np.float32(255)).astype(np.uint8)
        return batch | {name: image}


def grey(image: np.ndarray) -> np.ndarray:
    """[N, H, W, C] -> [N, H, W, 1]."""
    return image if image.shape[-1] == 1 else (image @ GREY)[..., None]
