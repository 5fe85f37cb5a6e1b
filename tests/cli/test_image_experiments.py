"""The experiments on images take two steps on generated files of the form that they expect."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from PIL import Image

from spmd.cli import main
from tests.marks import slow_but


def idx(root):
    """The four files of MNIST's form."""
    rng = np.random.default_rng(0)
    root.mkdir()
    for prefix, num in (("train", 24), ("t10k", 8)):
        for name, shape, high in (
            ("images-idx3", (num, 28, 28), 256),
            ("labels-idx1", (num,), 10),
        ):
            header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
            values = rng.integers(0, high, shape).astype(np.uint8).tobytes()
            (root / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(header + values))


def pairs(root, size, mode, classes):
    """Images and masks, and the actions of a driver."""
    rng = np.random.default_rng(0)
    for split, num in (("train", 8), ("eval", 4)):
        for kind in ("image", "mask"):
            (root / split / kind).mkdir(parents=True)
        rows = ["frame,track,steer,gas,brake"]
        for i in range(num):
            pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / split / f"image/{i:04}.png")
            mask = rng.integers(0, classes, size).astype(np.uint8)
            Image.fromarray(mask).save(root / split / f"mask/{i:04}.png")
            rows.append(f"{i:04},{i // 3},{i / 10},0.1,0")
        (root / split / "actions.csv").write_text("\n".join(rows) + "\n")


def brain(root):
    pairs(root, (233, 197), "L", 3)


def road(root):
    pairs(root, (96, 96), "RGB", 4)


ROADS = ("--data.path", "set/train/actions.csv", "--data.eval-path", "set/eval/actions.csv")
SMALL = {
    "fashion_resnet": (idx, ("--model.width", "2"), "accuracy"),
    "fashion_vit": (idx, ("--model.layers", "1", "--model.embed", "8"), "accuracy"),
    "brain_unet": (brain, ("--model.widths", "2", "4"), "dice/white"),
    "road_segmentation": (road, ("--model.widths", "2", "4"), "iou/car"),
    "road_steering": (road, ("--model.widths", "2", "4", *ROADS), "rmse"),
}


@pytest.mark.gate
@pytest.mark.parametrize("name", slow_but(("brain_unet",), SMALL))
def test_two_steps_on_generated_files(name, tmp_path, monkeypatch):
    write, words, metric = SMALL[name]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "set")
    sizes = ["--data.batch-size", "8", "--data.eval-batch-size", "8"]
    steps = ["--train.steps", "2", "--optimizer.warmup-steps", "1", "--run.dir", "out"]
    assert main(["--experiment", name, "--data.path", "set", *words, *sizes, *steps]) == 0
    metrics = json.loads((tmp_path / "out/summary.json").read_text())["metrics"]
    assert np.isfinite(metrics[f"eval/{metric}"]) and np.isfinite(metrics["train/loss"])


@pytest.mark.parametrize("name", SMALL)
def test_without_files_one_line_says_what_to_give(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--experiment", name, "--run.dir", "out"]) == 2
    assert "data.path is empty; give a path, --data.path PATH" in capsys.readouterr().err
