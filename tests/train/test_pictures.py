"""Predictions drawn beside their truth at each evaluation."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

import spmd
from spmd.data.picture import GAP, TEXT
from spmd.tasks import Classification, MultiLabel, Regression, Segmentation
from spmd.tasks.picture import Picture
from spmd.train import LogConfig
from spmd.train.pictures import render


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_run_draws_the_same_examples_at_each_evaluation_on_any_mesh(tmp_path, devices):
    sheets = {}
    for name, words in {"one": ["--simulate", "1"], "two": ["--simulate", "2"]}.items():
        words = [*words, "--train.steps", "10", "--eval.every", "5", "--log.pictures", "5"]
        exp = spmd.load("digits", [*words, "--run.dir", str(tmp_path / name)])
        exp.train()
        files = sorted((tmp_path / name / "pictures").iterdir())
        assert [file.name for file in files] == ["00000005.png", "00000010.png"]
        events = b"".join(p.read_bytes() for p in (tmp_path / name / "tensorboard").iterdir())
        assert events.count(b"eval/predictions") == 2 and files[0].read_bytes() in events
        sheets[name] = [pixels(file.read_bytes()) for file in files]
    np.testing.assert_array_equal(sheets["one"], sheets["two"])
    # The first example of the split stands first, enlarged.
    source = exp.experiment.data.open("eval")
    first = source.take(np.arange(1))["image"][0, :, :, 0].repeat(14, 0).repeat(14, 1)
    for sheet in sheets["one"]:
        np.testing.assert_array_equal(sheet[GAP : GAP + 112, GAP : GAP + 112, 0], first)
    with pytest.raises(ValueError, match=r"log\.pictures=-1 must not be negative"):
        LogConfig(pictures=-1)


def test_each_task_of_images_says_what_is_drawn():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    mask = rng.integers(-1, 3, (2, 4, 4))
    batch = {"image": image, "label": np.array([1, 0]), "mask": mask, "target": np.ones((2, 2))}
    batch["labels"] = np.array([[1, 0], [0, -1]])
    logits = np.array([[0.0, 3.0], [0.0, 1.0]])
    shown = Classification().picture(batch, logits)
    assert shown is not None and shown.classes["predicted"].tolist() == [1, 1]
    is_red = lambda sheet: (sheet[..., 0] > sheet[..., 1] + 60.0).any()
    below = pixels(render(shown, ("cat", "dog")))[-2 * TEXT :]
    assert not is_red(below[:, : GAP + 112]) and is_red(
        below[:, GAP + 112 :]
    )  # the second is wrong
    shown = Segmentation().picture(batch, np.eye(3)[np.maximum(mask, 0)])
    assert shown is not None
    np.testing.assert_array_equal(shown.masks["predicted"], np.maximum(mask, 0))
    sheet = pixels(render(shown))  # image, truth, prediction, each enlarged to 112 pixels
    panels = [sheet[TEXT + GAP :, GAP + 112 * i :][:112:28, :112:28] for i in range(3)]
    np.testing.assert_array_equal(panels[0], image[0])
    same, labelled = (panels[1] == panels[2]).all(-1), mask[0] >= 0
    assert same[labelled].all() and not same[~labelled].any()
    for task, outputs in ((Regression(), np.zeros((2, 2))), (MultiLabel(), logits)):
        shown = task.picture(batch, outputs)
        assert isinstance(shown, Picture) and render(shown)
        assert task.picture({**batch, "image": np.ones((2, 7))}, outputs) is None
