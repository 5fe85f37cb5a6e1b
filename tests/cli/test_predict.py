"""run.py predict: a row for each example, in Parquet or JSON lines, from any mesh."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import spmd
from spmd.cli import predict


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_predictions_are_those_of_the_run(suffix, run_main, tmp_path, digits_run):
    words = ["predict", "--experiment", "digits", "--run.dir", digits_run, "--simulate", "1"]
    out = tmp_path / f"out.{suffix}"
    # 359 examples in batches of 100: the last one is padded.
    done = run_main(*words, "--out", out, "--data.eval-batch-size", "100")
    assert done.returncode == 0, done.stderr
    assert f"{out}: 359 rows, step 60" in done.stdout
    if suffix == "parquet":
        rows = pq.read_table(out).to_pylist()
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["example"] for row in rows] == list(range(359))
    exp = spmd.load("digits", ["--run.dir", str(digits_run), "--simulate", "1"])
    snapshot = exp.restore()
    examples = snapshot.program.open_evaluation().take(np.arange(359))
    want = snapshot.predict(examples)
    np.testing.assert_allclose([row["output"] for row in rows], want, rtol=1e-5, atol=1e-5)
    right = want.argmax(-1) == examples["label"]
    assert right.mean() == pytest.approx(snapshot.evaluate()["eval/accuracy"])
    assert [*tmp_path.glob(".out*")] == []

    again = run_main(*words, "--out", out)
    assert again.returncode == 2
    assert f"--out {out} exists; name a new file" in again.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the new file: run.py predict --experiment NAME --out FILE.parquet"),
        (["--out", "x.csv"], "--out x.csv is neither .parquet nor .jsonl, nor a folder"),
        (["--out", "no/where.jsonl"], "--out no/where.jsonl: there is no directory no"),
    ],
)
def test_mistakes_with_predictions(words, message, run_main, digits_run):
    done = run_main("predict", "--experiment", "digits", "--run.dir", digits_run, *words)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


class Files:
    """Examples that are files."""

    def name_of(self, index: int) -> str:
        return f"{index}.png"


@pytest.mark.parametrize("name", ["example", "file"])
def test_an_output_may_not_have_the_name_of_a_column(name):
    outputs = {"scores": np.ones((2, 3)), name: np.ones(2)}
    with pytest.raises(ValueError, match=f"an output named '{name}'.*its outputs: scores, {name}"):
        predict.columns_of(outputs, 0, Files())
    columns = predict.columns_of({"scores": outputs["scores"]}, 7)
    assert [*columns] == ["example", "scores"] and columns["example"].tolist() == [7, 8]


SEGMENTS = """
from flax import nnx

from spmd import Experiment
from spmd.data import registry
from spmd.data.images import Images
from spmd.optim import SGD
from spmd.tasks import Segmentation
from spmd.train import CheckpointConfig, TrainConfig


class Pixels(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.conv(x)


def config():
    how = registry.parse("decode,resize:8:8:image+mask")
    data = Images(target="mask", path="mine", batch_size=8, transforms=how, eval_transforms=how)
    optimizer = SGD(learning_rate=3.0, momentum=0.9)
    return Experiment(
        model=Pixels,
        task=Segmentation(),
        data=data,
        optimizer=optimizer,
        train=TrainConfig(steps=60),
        checkpoint=CheckpointConfig(best="eval/miou"),
    )
"""


@pytest.mark.gate
def test_masks_of_a_folder_of_images(run_main, tmp_path):
    from PIL import Image

    (tmp_path / "segments.py").write_text(SEGMENTS)
    rng = np.random.default_rng(0)
    for i in range(30):
        mask = np.kron(rng.integers(0, 2, (4, 4)), np.ones((4, 4), int)).astype(np.uint8)
        image = np.repeat(mask[..., None] * 200, 3, axis=2).astype(np.uint8)
        places = ("mine/image", "mine/mask") if i < 24 else ("other/sub", "truth")
        for place, pixels in zip(places, (image, mask), strict=True):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / place / f"{i}.png")
    words = ["--experiment", "segments.py", "--simulate", "1"]
    done = run_main(*words)
    assert done.returncode == 0, done.stderr
    # Other images have no masks.
    done = run_main("predict", *words, "--data.path", "other", "--out", "masks")
    assert done.returncode == 0, done.stderr
    for i in range(24, 30):
        got = np.asarray(Image.open(tmp_path / f"masks/sub/{i}.png"))
        truth = np.asarray(Image.open(tmp_path / f"truth/{i}.png"))
        assert got.shape == truth.shape and (got == truth).mean() > 0.95
