"""MNIST's file format: read, sliced, and refused where it is damaged."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from spmd.data.idx import Idx


def write_idx(path, array):
    """An uint8 array as an idx file, gzipped where the name says so."""
    data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_set(root, train=30, test=10, suffix=".gz", side=28):
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix, num in (("train", train), ("t10k", test)):
        arrays[prefix] = (
            rng.integers(0, 256, (num, side, side)).astype(np.uint8),
            rng.integers(0, 10, num).astype(np.uint8),
        )
        write_idx(root / f"{prefix}-images-idx3-ubyte{suffix}", arrays[prefix][0])
        write_idx(root / f"{prefix}-labels-idx1-ubyte{suffix}", arrays[prefix][1])
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_slices_are_the_rows_of_the_files(suffix, tmp_path):
    images, labels = write_set(tmp_path, suffix=suffix)["train"]
    config = Idx(path=str(tmp_path), train_split="train[:80%]", eval_split="train[24:]")
    for split, rows in (("train", slice(0, 24)), ("eval", slice(24, 30))):
        source = config.open(split)
        batch = source.take(np.arange(len(source)))
        np.testing.assert_array_equal(batch["image"], images[rows, ..., None])
        np.testing.assert_array_equal(batch["label"], labels[rows])
        assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    assert len(Idx(path=str(tmp_path)).open("eval")) == 10


def test_the_content_does_not_depend_on_the_place(tmp_path):
    for place in ("a", "b"):
        write_set(tmp_path / place)
    describe = lambda place: Idx(path=str(tmp_path / place)).content("train", lambda: None)
    first = describe("a")
    assert describe("b") == first
    write_idx(tmp_path / "b/train-labels-idx1-ubyte.gz", np.zeros(30, np.uint8))
    assert describe("b") != first


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: f.unlink(), "has no file train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        (lambda f: f.write_bytes(f.read_bytes()[:200]), "train-images-idx3-ubyte.gz cannot be unpacked"),
        (lambda f: f.write_bytes(gzip.compress(b"image" * 9)), "no idx file of bytes with 3 dims"),
        (lambda f: f.write_bytes(gzip.compress(gzip.decompress(f.read_bytes())[:-5])), "it has 23515"),
        (lambda f: write_idx(f, np.zeros((29, 28, 28), np.uint8)), "has 29 images"),
        (lambda f: write_idx(f, np.zeros((30, 32, 32), np.uint8)), "images of 32 x 32 pixels"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(spoil, message, tmp_path):
    write_set(tmp_path)
    spoil(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(ValueError, match="train-images") as error:
        Idx(path=str(tmp_path)).open("train")
    assert message in str(error.value)


def test_splits_are_train_and_test(tmp_path):
    write_set(tmp_path)
    with pytest.raises(ValueError, match=r"data\.eval_split='val' is neither 'train' nor 'test'"):
        Idx(path=str(tmp_path), eval_split="val").open("eval")
    with pytest.raises(ValueError, match="31 is beyond the split, which has 30 examples"):
        Idx(path=str(tmp_path), train_split="train[:31]").open("train")
