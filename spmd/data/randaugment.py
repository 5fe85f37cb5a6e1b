"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719): operations drawn for each image, of one magnitude."""

# N examples of this process, H height, W width, C channels

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from spmd.core.fields import check
from spmd.data.augment import example_shapes, moved_names
from spmd.data.decode import map_rows
from spmd.data.transform import Batch, Draws, Transform

if TYPE_CHECKING:
    from PIL import Image

    from spmd.data import Features

MOST = 10  # the largest magnitude
GREY = 128  # fills what a moved image leaves; a mask's pixels become -1, not labelled

# share is the magnitude over MOST, with a random sign where an operation has two directions
_COLOURS = (
    "autocontrast",
    "equalize",
    "solarize",
    "posterize",
    "color",
    "contrast",
    "brightness",
    "sharpness",
)
# (share, height, width) -> the six numbers of the affine map from the result's pixels to the image's
_MOVES: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "shear_x": lambda share, h, w: (1, 0.3 * share, -0.15 * share * h, 0, 1, 0),
    "shear_y": lambda share, h, w: (1, 0, 0, 0.3 * share, 1, -0.15 * share * w),
    "translate_x": lambda share, h, w: (1, 0, 0.45 * share * w, 0, 1, 0),
    "translate_y": lambda share, h, w: (1, 0, 0, 0, 1, 0.45 * share * h),
    "rotate": lambda share, h, w: _rotation(np.pi / 6 * share, h, w),
}
OPERATIONS = ("identity", *_COLOURS, *_MOVES)


def _rotation(angle: float, height: int, width: int) -> tuple[float, ...]:
    c, s, y, x = np.cos(angle), np.sin(angle), height / 2, width / 2
    return (c, -s, x - c * x + s * y, s, c, y - s * x - c * y)


@dataclasses.dataclass(frozen=True)
class RandAugment(Transform):
    """Applies random operations on colours and positions, each drawn for each image."""

    name: ClassVar[str] = "randaugment"

    operations: int = 2
    """How many, one after the other."""
    magnitude: float = 9
    """Strength, 0 to 10."""
    images: tuple[str, ...] = ()
    """Features that move together, the image first; empty is the one feature [H, W, C]."""

    def __post_init__(self) -> None:
        check(self.operations >= 1, f"randaugment: operations={self.operations} must be at least 1")
        check(
            0 <= self.magnitude <= MOST,
            f"randaugment: magnitude={self.magnitude} must be in [0, {MOST}]",
        )

    def features(self, features: Features) -> Features:
        """The same."""
        names = moved_names(self, self.images, {k: shape for k, (shape, _) in features.items()})
        shape, dtype = features[names[0]]
        check(
            dtype == "uint8" and len(shape) == 3 and shape[-1] in (1, 3),
            f"randaugment takes uint8 images of 1 or 3 channels; {names[0]!r} is {dtype}{list(shape)}",
        )
        for name in names[1:]:
            shape, dtype = features[name]
            check(
                dtype == "int32" and len(shape) == 2,
                f"randaugment moves masks, int32 [H, W], with the image; {name!r} is {dtype}{list(shape)}",
            )
        return features

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        """The batch with each image, and its masks, changed."""
        names = moved_names(self, self.images, example_shapes(batch))
        draws_N = [(draws.uniform(), draws.uniform()) for _ in range(self.operations)]
        choices = [(u * len(OPERATIONS)).astype(np.int64) for u, _ in draws_N]
        shares = [np.where(u < 0.5, -1, 1) * (self.magnitude / MOST) for _, u in draws_N]
        out = {name: batch[name].copy() for name in names}

        def change(row: int) -> None:
            image, *masks = (out[name][row] for name in names)
            for choice_N, share_N in zip(choices, shares, strict=True):
                _apply(OPERATIONS[choice_N[row]], float(share_N[row]), image, masks)

        map_rows(change, range(draws.num))
        return batch | out


def _recoloured(operation: str, share: float, picture: Image.Image) -> Image.Image:
    from PIL import ImageEnhance, ImageOps

    if operation == "autocontrast":
        return ImageOps.autocontrast(picture)
    if operation == "equalize":
        return ImageOps.equalize(picture)
    if operation == "solarize":
        return ImageOps.solarize(picture, int(256 * (1 - abs(share))))
    if operation == "posterize":
        return ImageOps.posterize(picture, 8 - round(4 * abs(share)))
    return getattr(ImageEnhance, operation.capitalize())(picture).enhance(1 + 0.9 * share)


def _apply(operation: str, share: float, image: np.ndarray, masks: list[np.ndarray]) -> None:
    """Change uint8 [H, W, C] and int32 [H, W] in place."""
    height, width, channels = image.shape
    from PIL import Image

    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    if operation in _COLOURS:
        changed = _recoloured(operation, share, picture)
        image[...] = np.asarray(changed).reshape(image.shape)
    elif operation in _MOVES:
        numbers = _MOVES[operation](share, height, width)
        move = lambda x, fill: x.transform(
            (width, height),
            Image.Transform.AFFINE,
            numbers,
            Image.Resampling.NEAREST,
            fillcolor=fill,
        )
        fill = (GREY,) * channels if channels > 1 else GREY
        image[...] = np.asarray(move(picture, fill)).reshape(image.shape)
        for mask in masks:
            mask[...] = np.asarray(move(Image.fromarray(mask), -1))
