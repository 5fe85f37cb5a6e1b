"""Predicted masks at the size of their files: what a transform cut and resized lies where it was."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from spmd.data import undo
from spmd.data.resizing import CentralCrop, CropOrPad, Decode, RandomCrop, Resize
from spmd.data.transform import Draws

BOTH = ("image", "mask")


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("transforms", "seen"),
    [
        ((Resize(48, 32, BOTH),), (slice(None), slice(None))),
        ((CentralCrop(24, 1.0, BOTH),), (slice(12, 36), slice(None))),
        ((CropOrPad(20, 40, BOTH),), (slice(14, 34), slice(None))),
        ((CropOrPad(64, 20, BOTH),), (slice(None), slice(2, 22))),
        ((Resize(96, 48, BOTH), CropOrPad(48, 48, BOTH)), (slice(12, 36), slice(None))),
    ],
)
def test_a_mask_lies_where_it_was(transforms, seen):
    mask = np.kron(np.arange(72).reshape(12, 6) % 7, np.ones((4, 4), int)).astype(np.uint8)
    data, transforms = png(mask * 30), (Decode(), *transforms)
    batch = {"image": [data], "mask": [png(mask)]}
    batch = {name: np.array([*x, None], object)[:1] for name, x in batch.items()}
    for each in transforms:
        batch = each(batch, Draws(0, 0, np.zeros(1, np.int64)))
    classes = batch["mask"][0]
    got = undo.undo(np.where(classes < 0, 9, classes).astype(np.uint8), data, transforms)
    want = np.full_like(mask, undo.UNSEEN)
    want[seen] = mask[seen]
    assert got.shape == mask.shape and (got == want).mean() > 0.97
    assert not (got == 9).any()  # padding lies outside
    np.testing.assert_array_equal(got == undo.UNSEEN, want == undo.UNSEEN)


def test_a_random_cut_is_refused():
    with pytest.raises(ValueError, match="random_crop cuts at random"):
        undo.check_undoable((Decode(), RandomCrop(8, images=BOTH)))


def test_the_image_is_the_decoded_feature():
    features = {"mask": ((), "bytes"), "photo": ((), "bytes"), "label": ((), "int32")}
    assert undo.encoded_image((Decode(), Resize(8, images=("photo", "mask"))), features) == "photo"
    assert undo.encoded_image((), features) == ""
    assert undo.encoded_image((Decode(masks=("mask", "photo")),), features) == ""
