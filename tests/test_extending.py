"""The recipes of docs/extending.md: each a file of its own that trains, stops, resumes and is verified."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import spmd
from tests import printed

RECIPES = printed.recipes()
# What an evaluation of the run must reach on 8 devices, over the recipe's own number of steps.
REACHED = {
    "segmentation": {"eval/miou": 0.88},
    "retrieval": {"eval/hit@10": 0.75},
    "doubling": {"eval/accuracy": 0.85},
    "encoder": {"eval/accuracy": 0.95},
    "belief": {"eval/accuracy": 0.85},
}
SHARDED = ["--simulate", "8", "--train.accumulate", "2", "--log.no-tensorboard"]


def test_every_recipe_is_listed_and_short():
    assert RECIPES.keys() == REACHED.keys()
    for name, text in RECIPES.items():
        assert text.count("\n") <= 60, f"{name}.py has {text.count(chr(10))} lines"


@pytest.fixture(params=REACHED)
def recipe(request, tmp_path, monkeypatch, devices) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{request.param}.py").write_text(RECIPES[request.param])
    return request.param


def arrays(directory: str, file: str) -> dict[str, np.ndarray]:
    words = [*SHARDED, "--run.dir", directory]
    return {k: np.array(x) for k, x in spmd.load(file, words).restore().arrays.items()}


def test_a_recipe_trains_stops_resumes_and_is_verified(recipe, run_main, tmp_path):
    file = f"./{recipe}.py"
    words = ["--experiment", file, *SHARDED]
    done = run_main(*words, "--run.dir", "whole", "--checkpoint.every", "7")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "whole/summary.json").read_text())["metrics"]
    for name, least in REACHED[recipe].items():
        assert metrics[name] >= least, metrics

    # Killed after a checkpoint, then resumed by the same command: the same state.
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts/summary.json").unlink()
    steps = sorted(
        int(p.name) for p in (tmp_path / "parts/checkpoints").iterdir() if p.name.isdigit()
    )
    shutil.rmtree(tmp_path / f"parts/checkpoints/{steps.pop()}")
    done = run_main(*words, "--run.dir", "parts", "--checkpoint.every", "7")
    assert done.returncode == 0 and f"resuming at step {steps[-1]} of" in done.stdout, done.stderr
    want, got = arrays("whole", file), arrays("parts", file)
    for name, leaf in want.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)

    done = run_main("verify", *words, "--steps", "3", "--param-dtype", "float64")
    assert done.returncode == 0 and "verified" in done.stdout, done.stdout + done.stderr
