"""The first steps of the ImageNet experiments, shrunken, from a folder of JPEGs with their own transforms."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import spmd

SMALL = {
    "imagenet_resnet50": ["--model.depth", 18, "--model.width", 4],
    "imagenet_vit_s16": ["--model.layers", 1, "--model.embed", 32, "--model.heads", 2],
}


@pytest.mark.gate
@pytest.mark.parametrize("name", SMALL)
def test_first_steps_from_a_folder(name, tmp_path, run_main):
    rng = np.random.default_rng(0)
    for split, num in (("train", 8), ("val", 2)):
        for c, shade in enumerate((60, 180)):
            folder = tmp_path / f"images/{split}/n0{c}"
            folder.mkdir(parents=True)
            for i in range(num):
                pixels = np.clip(rng.normal(shade, 30, (230 + 7 * i, 280, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.JPEG")
    words = ["--data", "folder", "--data.path", "images", "--data.batch-size", 4]
    words += ["--data.eval-batch-size", 4, "--optimizer.warmup-steps", 1, "--train.steps", 3]
    done = run_main("--experiment", name, *words, *SMALL[name], "--simulate", 1, "--run.dir", "run")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run/summary.json").read_text())["metrics"]
    assert np.isfinite(metrics["train/loss"]) and 0 <= metrics["eval/accuracy"] <= 1


def test_goyals_schedule():
    exp = spmd.load("imagenet_resnet50").experiment
    epoch = 1251
    rate = exp.optimizer.rate(90 * epoch, exp.data.batch_size)
    at = lambda epochs: float(rate(round(epochs * epoch)))
    assert at(0) == pytest.approx(0.1) and at(2.5) == pytest.approx(0.25, rel=1e-3)
    for place, peak in (
        (5, 0.4),
        (29.9, 0.4),
        (30.1, 0.04),
        (59.9, 0.04),
        (60.1, 4e-3),
        (89, 4e-4),
    ):
        assert at(place) == pytest.approx(peak), place
