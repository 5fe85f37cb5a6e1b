"""run.py data show and check: what is in a folder, a picture of it, bad and repeated records."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from spmd.data import picture


@pytest.fixture
def mine(tmp_path):
    """A folder with its splits: 24 + 6 images, one of them grey, one rotated, one in both splits."""
    rng = np.random.default_rng(0)
    for i in range(30):
        folder = tmp_path / "mine" / ("train" if i < 24 else "eval") / ("cat", "dog")[i % 3 == 0]
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (20, 30 + i, 3)).astype(np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 2 else 1
        image.convert("L" if i == 1 else "RGB").save(folder / f"{i}.jpg", exif=exif)
    root = tmp_path / "mine"
    (root / "eval/dog/again.jpg").write_bytes((root / "train/cat/4.jpg").read_bytes())
    return root


def test_show_prints_classes_and_draws_examples(mine, run_main, tmp_path):
    words = ["data", "show", "--experiment", "image_folder", "--data.path", mine]
    words += ["--data.transforms", "decode,random_resized_crop:20"]
    out = tmp_path / "grid.png"
    done = run_main(*words, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "train: 24 examples" in done.stdout and "classes: cat 16, dog 8" in done.stdout
    assert "classes: cat 4, dog 3" in done.stdout
    assert "-> uint8[20, 20, 3]" in done.stdout
    sheet = np.asarray(Image.open(out))
    # 32 examples in rows of eight, enlarged to 80 pixels; every cell has a picture.
    cell = 80 + picture.GAP
    assert sheet.shape == (4 * (cell + picture.TEXT) + picture.GAP, 8 * cell + picture.GAP, 3)
    for i in range(32):
        y, x = i // 8 * (cell + picture.TEXT), i % 8 * cell
        assert sheet[y + picture.GAP : y + cell, x + picture.GAP : x + cell].std() > 5
    again = run_main(*words, "--out", out)
    assert again.returncode == 2 and "exists; name a new file" in again.stderr


def test_check_reads_every_record_and_names_what_is_wrong(mine, run_main):
    words = ["data", "check", "--experiment", "image_folder", "--data.path", mine]
    done = run_main(*words)
    assert done.returncode == 1, done.stderr
    assert "train: 24 examples, 0 bad" in done.stdout
    assert "images: RGB 23, L 1, rotated 1; 20 to 32 pixels high, 20 to 53 wide" in done.stdout
    assert "label: cat 16, dog 8" in done.stdout
    assert "the same content in both splits: 1" in done.stdout
    assert "train cat/4.jpg = eval dog/again.jpg" in done.stdout
    (mine / "eval/dog/again.jpg").unlink()
    assert run_main(*words).returncode == 0
    torn = mine / "train/cat/5.jpg"
    torn.write_bytes(torn.read_bytes()[:700])
    (mine / "train/cat/zero.jpg").write_bytes(b"")
    done = run_main(*words)
    assert done.returncode == 1
    assert "train: 25 examples, 2 bad" in done.stdout
    assert "(cat/5.jpg) of the train data: 'image': it cannot be decoded" in done.stdout
    assert "(cat/zero.jpg) of the train data: 'image': the file is empty" in done.stdout


def test_check_reads_arrays_and_refuses_texts(run_main):
    done = run_main("data", "check", "--experiment", "digits")
    assert "train: 1438 examples, 0 bad" in done.stdout and "label: 0 151," in done.stdout
    done = run_main("data", "check", "--experiment", "lm_stdlib")
    assert done.returncode == 2 and "a text has none" in done.stderr


def test_masks_are_laid_over_images():
    pixels = np.full((1, 2, 2, 3), 100, np.uint8)
    mask = np.array([[[0, 1], [-1, 2]]])
    got = picture.overlay(pixels, mask)[0]
    np.testing.assert_array_equal(got[0, 0], [100, 100, 100])
    np.testing.assert_array_equal(got[0, 1], (100 + picture.COLOURS[0]) // 2)
    np.testing.assert_array_equal(got[1, 0], [50, 50, 50])
    np.testing.assert_array_equal(got[1, 1], (100 + picture.COLOURS[1]) // 2)
    normal = np.linspace(-2, 2, 12, dtype=np.float32).reshape(1, 2, 2, 3)
    rgb = picture.to_rgb(normal)
    assert rgb.min() == 0 and rgb.max() == 255
