"""Predicted masks at the size of their images' files: the inverse of the transforms that resize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from spmd.core.fields import check
from spmd.data import decode as decoding
from spmd.data import ragged
from spmd.data.resizing import CentralCrop, CropOrPad, Decode, RandomCrop, Resize, Resizing
from spmd.data.transform import Draws, Transform

if TYPE_CHECKING:
    from spmd.data import Features

UNSEEN = 255  # of pixels that a crop left out


def check_undoable(transforms: Sequence[Transform]) -> None:
    """ValueError if masks cannot be brought back to the size of their images."""
    for each in transforms:
        known = isinstance(each, Resize | CentralCrop | CropOrPad) and type(each) is not RandomCrop
        check(
            known or not isinstance(each, Resizing),
            f"data.eval_transforms: {each.name} cuts at random, so its masks have no place in the images;"
            " use resize, central_crop or crop_or_pad",
        )


def encoded_image(transforms: Sequence[Transform], features: Features) -> str:
    """The feature whose files the masks belong to; "" where images are not decoded from files.

    Args:
        transforms: those of the split.
        features: of the source, before them.
    """
    encoded = [name for name, (_, dtype) in features.items() if dtype == ragged.BYTES]
    for each in transforms:
        if isinstance(each, Decode):
            return next((name for name, c in each.channels_of(encoded).items() if c), "")
    return ""


def undo(mask_HW: np.ndarray, data: bytes, transforms: Sequence[Transform]) -> np.ndarray:
    """A mask at the size of its image.

    Args:
        mask_HW: classes at the size that the model sees, uint8.
        data: the image's file.
        transforms: those that the image went through.

    Returns:
        Classes at the size of the image, upright by its EXIF rotation: each pixel the class of the nearest
        one that the model saw, UNSEEN where it saw none.
    """
    header = decoding.read_header(data, 1)
    sides, steps = (header.height, header.width), list[tuple[Resizing, tuple[int, int]]]()
    for each in transforms:
        if isinstance(each, Resizing):
            steps.append((each, sides))
            sides = each.size()
    for each, before in reversed(steps):
        box = each.boxes(np.array([before], np.int64), Draws(0, 0, np.zeros(1, np.int64)))[0]
        mask_HW = _placed(mask_HW, each, before, box.tolist())
    return mask_HW


def _placed(
    mask: np.ndarray, by: Resizing, sides: tuple[int, int], box: Sequence[int]
) -> np.ndarray:
    """The mask of a box, in its place in the image."""
    top, left, height, width = box
    if isinstance(by, CropOrPad):  # the box lies in the middle of the margins
        first, second = (
            (side - n) // 2 for side, n in zip(by.size(), (height, width), strict=True)
        )
        part = mask[first : first + height, second : second + width]
    else:
        part = decoding.resize_nearest(mask, (height, width))
    whole = np.full(sides, UNSEEN, np.uint8)
    whole[top : top + height, left : left + width] = part
    return whole
