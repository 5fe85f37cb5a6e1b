"""Transforms that decode images and resize them: decode, resize, central_crop, random_resized_crop.

`decode` reads headers only; the transform that resizes hands its box and size to the decoder, which computes
the pixels that are needed (spmd.data.decode).
"""

# N examples of this process, H height, W width, C channels

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from spmd.core.fields import check, closest
from spmd.data import decode as decoding
from spmd.data import ragged
from spmd.data.augment import example_shapes, moved_names
from spmd.data.decode import Box, Encoded
from spmd.data.transform import Batch, Draws, Transform

if TYPE_CHECKING:
    from spmd.data import Features

ATTEMPTS = 10  # boxes drawn before a random crop falls back to the centre


@dataclasses.dataclass(frozen=True)
class Decode(Transform):
    """Decodes JPEG, PNG and what else pillow reads; EXIF rotation is applied.

    Grey images, palettes, CMYK and 16 bits become uint8 of the channels asked for; an alpha channel is
    dropped, unless there are 4. A mask is grey or has a palette: int32 [H, W], its values as they are.
    """

    name: ClassVar[str] = "decode"

    channels: int = 3
    """1 grey, 3 RGB or 4 RGBA."""
    images: tuple[str, ...] = ()
    """Encoded features; empty is all but the masks."""
    masks: tuple[str, ...] = ()
    """Encoded features whose pixels are classes; empty is those called mask."""

    def __post_init__(self) -> None:
        check(self.channels in (1, 3, 4), f"decode: channels={self.channels} must be 1, 3 or 4")

    def channels_of(self, encoded: Sequence[str]) -> dict[str, int]:
        """{feature: channels, 0 for a mask} of the features that are decoded."""
        masks = self.masks or tuple(name for name in encoded if name == "mask")
        images = self.images or tuple(name for name in encoded if name not in masks)
        return dict.fromkeys(images, self.channels) | dict.fromkeys(masks, 0)

    def features(self, features: Features) -> Features:
        """Images uint8 [-1, -1, C], masks int32 [-1, -1]: their sizes are not known yet."""
        encoded = [name for name, (_, dtype) in features.items() if dtype == ragged.BYTES]
        channels = self.channels_of(encoded)
        shown = ", ".join(f"{k} {d}{list(s)}" for k, (s, d) in features.items())
        check(bool(channels), f"decode takes encoded images, features of bytes; there are {shown}")
        for name in channels:
            check(
                name in encoded,
                f"decode: there is no encoded feature {name!r}.{closest(name, encoded)} The features are"
                f" {shown}",
            )
        sides = (ragged.UNKNOWN, ragged.UNKNOWN)
        decoded = {
            k: ((*sides, c), "uint8") if c else (sides, "int32") for k, c in channels.items()
        }
        return {**features, **decoded}

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        """The batch with headers read; pixels are decoded by the next transform."""
        encoded = [name for name, x in batch.items() if x.dtype.hasobject]
        out = dict(batch)
        for name, channels in self.channels_of(encoded).items():
            rows = [decoding.read_header(data, channels) for data in batch[name]]
            out[name] = ragged.column(rows)
        return out


@dataclasses.dataclass(frozen=True)
class Resizing(Transform):
    """Base of the transforms that cut a box out of each image and resize it to one size."""

    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        raise NotImplementedError

    def boxes(self, sides_N2: np.ndarray, draws: Draws) -> np.ndarray:
        """Boxes (top, left, height, width) int64 [N, 4] in images of these heights and widths [N, 2]."""
        raise NotImplementedError

    def cut(self, image: Any, box: Box) -> np.ndarray:
        """The box of an image, encoded or [H, W, ...], at the size of the result."""
        return _pixels(image, box, self.size())

    def features(self, features: Features) -> Features:
        """The features with the new height and width."""
        names = self._names({k: shape for k, (shape, _) in features.items()})
        resized = {
            name: ((*self.size(), *features[name][0][2:]), features[name][1]) for name in names
        }
        return {**features, **resized}

    def _names(self, shapes: Any) -> tuple[str, ...]:
        return moved_names(self, getattr(self, "images", ()), shapes, sized=False)

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        """The batch with each example's box, in all features that move, at the new size."""
        names = self._names(example_shapes(batch))
        sides = [
            [(x.height, x.width) for x in batch[name]]
            if batch[name].dtype.hasobject
            else [batch[name].shape[1:3]] * draws.num
            for name in names
        ]
        sides_N2 = np.array(sides[0], np.int64)
        boxes_N4 = self.boxes(sides_N2, draws)
        for name, others in zip(names[1:], sides[1:], strict=True):
            for row in np.flatnonzero((np.array(others, np.int64) != sides_N2).any(1)):
                a, b = sides[0][row], others[row]
                draws.bad.setdefault(
                    int(row),
                    f"{name!r} is {b[0]} x {b[1]} pixels and {names[0]!r} {a[0]} x {a[1]}; they must be of"
                    " one size",
                )
        return batch | {name: self._resized(name, batch[name], boxes_N4, draws) for name in names}

    def _resized(
        self, name: str, images: np.ndarray, boxes_N4: np.ndarray, draws: Draws
    ) -> np.ndarray:
        """[N, *size, ...] of a feature; a row that cannot be decoded is zeros, and noted as bad."""
        size = self.size()
        rest, dtype = images.shape[3:], images.dtype
        if dtype.hasobject:  # encoded: an image of some channels, or a mask
            channels = images[0].channels
            rest, dtype = ((channels,), np.uint8) if channels else ((), np.int32)
        out = np.zeros((len(images), *size, *rest), dtype)

        def fill(row: int) -> str:
            box: Any = tuple(int(v) for v in boxes_N4[row])
            try:
                out[row] = self.cut(images[row], box)
            except decoding.Undecodable as error:
                return f"{name!r}: {error}"
            return ""

        # Rows that are bad already would be cut by boxes of another image.
        good = [row for row in range(len(images)) if row not in draws.bad]
        for row, problem in zip(good, decoding.map_rows(fill, good), strict=True):
            if problem:
                draws.bad.setdefault(row, problem)
        return out


def _pixels(image: Any, box: Box, size: tuple[int, int]) -> np.ndarray:
    """The box of an image, encoded or [H, W, ...], at another size."""
    if isinstance(image, Encoded):
        return decoding.decode(image, box, size)
    top, left, height, width = box
    part = image[top : top + height, left : left + width]
    if image.ndim == 3:
        return decoding.resize(part, (0, 0, height, width), size)
    return decoding.resize_nearest(part, size)


def _check_side(transform: str, field: str, value: int) -> None:
    check(value >= 1, f"{transform}: {field}={value} must be at least 1 pixel")


@dataclasses.dataclass(frozen=True)
class Resize(Resizing):
    """Resizes images to one size, whatever their proportions were: bilinear, masks by the nearest pixel."""

    name: ClassVar[str] = "resize"

    height: int
    """Pixels."""
    width: int = 0
    """Pixels; 0 is the height."""
    images: tuple[str, ...] = ()
    """Features that are resized together; empty is the one image."""

    def __post_init__(self) -> None:
        _check_side("resize", "height", self.height)
        _check_side("resize", "width", self.width or self.height)

    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        return self.height, self.width or self.height

    def boxes(self, sides_N2: np.ndarray, draws: Draws) -> np.ndarray:
        """The images, whole."""
        return np.concatenate([np.zeros_like(sides_N2), sides_N2], axis=1)


@dataclasses.dataclass(frozen=True)
class CentralCrop(Resizing):
    """The square in the middle, resized: with a ratio of 0.875 the usual evaluation crop (256 to 224)."""

    name: ClassVar[str] = "central_crop"

    pixels: int
    """Side of the result."""
    ratio: float = 0.875
    """Side of the square over the shorter side of the image; 1 is the largest square."""
    images: tuple[str, ...] = ()
    """Features that are cropped together; empty is the one image."""

    def __post_init__(self) -> None:
        _check_side("central_crop", "pixels", self.pixels)
        check(0 < self.ratio <= 1, f"central_crop: ratio={self.ratio} must be in (0, 1]")

    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        return self.pixels, self.pixels

    def boxes(self, sides_N2: np.ndarray, draws: Draws) -> np.ndarray:
        """The squares in the middle."""
        side_N = np.maximum(np.rint(sides_N2.min(1) * self.ratio).astype(np.int64), 1)
        first_N2 = (sides_N2 - side_N[:, None]) // 2
        return np.concatenate([first_N2, np.stack([side_N, side_N], 1)], axis=1)


@dataclasses.dataclass(frozen=True)
class CropOrPad(Resizing):
    """Cuts the middle out of larger images, and pads smaller ones, on both sides: pixels keep their values.

    Images are padded with zeros, masks with -1, which is no class.
    """

    name: ClassVar[str] = "crop_or_pad"

    height: int
    """Pixels."""
    width: int = 0
    """Pixels; 0 is the height."""
    images: tuple[str, ...] = ()
    """Features that are cut together; empty is the one image."""

    def __post_init__(self) -> None:
        _check_side(self.name, "height", self.height)
        _check_side(self.name, "width", self.width or self.height)

    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        return self.height, self.width or self.height

    def boxes(self, sides_N2: np.ndarray, draws: Draws) -> np.ndarray:
        """The middle, as far as the images go."""
        box_N2 = np.minimum(sides_N2, np.array(self.size(), np.int64))
        return np.concatenate([(sides_N2 - box_N2) // 2, box_N2], axis=1)

    def cut(self, image: Any, box: Box) -> np.ndarray:
        """The box of an image, between margins."""
        part = _pixels(image, box, box[2:])
        margins = [
            ((side - n) // 2, side - n - (side - n) // 2)
            for side, n in zip(self.size(), part.shape[:2], strict=True)
        ]
        margins += [(0, 0)] * (part.ndim - 2)
        return np.pad(part, margins, constant_values=-1 if part.ndim == 2 else 0)


@dataclasses.dataclass(frozen=True)
class RandomCrop(CropOrPad):
    """Cuts a part of one size at a random place, and pads smaller images: pixels keep their values."""

    name: ClassVar[str] = "random_crop"

    def boxes(self, sides_N2: np.ndarray, draws: Draws) -> np.ndarray:
        """A random place in each image."""
        box_N2 = np.minimum(sides_N2, np.array(self.size(), np.int64))
        place_N2 = np.stack([draws.uniform(), draws.uniform()], 1)
        first_N2 = (place_N2 * (sides_N2 - box_N2 + 1)).astype(np.int64)
        return np.concatenate([first_N2, box_N2], axis=1)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(Resizing):
    """A random part of the image, of a random area and proportion, resized (Szegedy et al. 2015).

    The area is uniform in [area, 1] of the image's, the proportion log-uniform in [3/4, 4/3]. A box that is
    not inside the image is drawn anew, ten times; then it is the largest in the middle of such a proportion.
    """

    name: ClassVar[str] = "random_resized_crop"

    pixels: int
    """Side of the result."""
    area: float = 0.08
    """Smallest part of the image's area."""
    images: tuple[str, ...] = ()
    """Features that are cropped together; empty is the one image."""

    def __post_init__(self) -> None:
        _check_side("random_resized_crop", "pixels", self.pixels)
        check(0 < self.area <= 1, f"random_resized_crop: area={self.area} must be in (0, 1]")

    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        return self.pixels, self.pixels

    def boxes(self, sides_N2: np.ndarray, draws: Draws) -> np.ndarray:
        """The first box of each row that is inside its image."""
        limit = math.log(4 / 3)
        boxes_N4 = _proportionate(sides_N2)
        pending_N = np.ones(len(sides_N2), bool)
        for _ in range(ATTEMPTS):  # all draws are taken, so that no row's depend on another row
            area_N = (self.area + (1 - self.area) * draws.uniform()) * sides_N2.prod(1)
            proportion_N = np.exp(limit * (2 * draws.uniform() - 1))
            place_N2 = np.stack([draws.uniform(), draws.uniform()], 1)
            box_N2 = np.stack([np.sqrt(area_N / proportion_N), np.sqrt(area_N * proportion_N)], 1)
            box_N2 = np.rint(box_N2).astype(np.int64)
            inside_N = ((box_N2 >= 1) & (box_N2 <= sides_N2)).all(1)
            first_N2 = (place_N2 * (sides_N2 - box_N2 + 1)).astype(np.int64)
            chosen_N = pending_N & inside_N
            boxes_N4[chosen_N] = np.concatenate([first_N2, box_N2], axis=1)[chosen_N]
            pending_N &= ~inside_N
        return boxes_N4


def _proportionate(sides_N2: np.ndarray) -> np.ndarray:
    """The largest boxes [N, 4] in the middle whose proportion is in [3/4, 4/3]."""
    height_N, width_N = sides_N2.T
    box_N2 = np.stack(
        [
            np.minimum(height_N, np.maximum(width_N * 4 // 3, 1)),
            np.minimum(width_N, np.maximum(height_N * 4 // 3, 1)),
        ],
        axis=1,
    )
    return np.concatenate([(sides_N2 - box_N2) // 2, box_N2], axis=1)
