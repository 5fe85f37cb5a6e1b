"""DLRM on a generated log of clicks: the log, the model's pairs, and a run that stops and resumes."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from spmd.data.clicks import Clicks, ClickSource, category_names
from spmd.models.dlrm import DLRM

IDS = (5, 40, 300)


def test_a_row_of_the_log_is_a_function_of_its_number():
    config = Clicks(ids=IDS, examples=5000, eval_examples=400, numbers=4)
    train, evaluation = ClickSource(config, "train"), config.open("eval")
    every = train.take(np.arange(5000))
    some = np.array([4711, 3, 3, 999])
    for name, x in train.take(some).items():
        np.testing.assert_array_equal(x, every[name][some])
        shape, dtype = config.features[name]
        assert x.shape == (4, *shape) and x.dtype == dtype
    for name, num in zip(category_names(3), IDS, strict=True):
        counts = np.bincount(every[name], minlength=num)
        assert len(counts) == num and counts[0] == counts.max() > 2 * counts[num // 2]
    assert not np.array_equal(evaluation.take(some[:2])["numbers"], every["numbers"][some[:2]])
    # The labels follow the odds that they are drawn from.
    _, _, odds = train.draw(np.arange(5000))
    expected = 1 / (1 + np.exp(-odds))
    assert abs(every["label"].mean() - expected.mean()) < 0.02
    assert every["label"][expected > 0.6].mean() > 0.5 > every["label"][expected < 0.2].mean()


def test_the_model_is_that_of_the_paper():
    """Against numpy: the products of all pairs of vectors, beside what the numbers become."""
    model = DLRM(ids=IDS, numbers=4, dim=6, bottom=(8,), top=(5,))
    net = model.build(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(3, 4)).astype(np.float32)
    rows = {name: rng.normal(size=(3, 6)).astype(np.float32) for name in model.names}
    layers = {
        "/".join(map(str, path)): np.asarray(x[...])
        for path, x in nnx.to_flat_state(nnx.state(net, nnx.Param))
    }
    relu = lambda x: np.maximum(x, 0)
    layer = lambda name, x: x @ layers[f"{name}/kernel"] + layers[f"{name}/bias"]
    dense = relu(layer("bottom/1", relu(layer("bottom/0", numbers))))
    vectors = [dense, *(rows[name] for name in model.names)]
    pairs = [(vectors[i] * vectors[j]).sum(1) for i in range(4) for j in range(i)]
    hidden = relu(layer("top/0", np.concatenate([dense, np.stack(pairs, 1)], 1)))
    want = layer("head", hidden)[:, 0]
    got = net(jax.numpy.asarray(numbers), jax.tree.map(jax.numpy.asarray, rows))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    with pytest.raises(ValueError, match=r"names 2 categories, and model\.ids 3"):
        DLRM(ids=IDS, features=("a", "b"))


@pytest.mark.slow  # test_extending has a run of tables that stops and resumes
def test_clicks_continue_on_fewer_devices(run_main, tmp_path):
    """Steps 7 to 12 on two devices instead of four: the same evaluation."""
    words = ["--experiment", "clicks", "--data.examples", "12288", "--data.eval-examples", "1000"]
    words += [
        "--log.no-tensorboard",
        "--checkpoint.every",
        "6",
        "--eval.every",
        "12",
        "--optimizer.warmup-steps",
        "2",
    ]
    words += ["--run.dir", str(tmp_path / "run")]

    def train(devices: int) -> tuple[str, float]:
        done = run_main(*words, "--simulate", str(devices))
        assert done.returncode == 0, done.stderr
        metrics = json.loads((tmp_path / "run/summary.json").read_text())["metrics"]
        return done.stdout, metrics["eval/auc"]

    _, want = train(4)
    (tmp_path / "run/summary.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/12")
    printed, got = train(2)
    assert "resuming at step 6 of 12" in printed
    assert got == pytest.approx(want, abs=1e-3) and 0.5 < got < 0.83
