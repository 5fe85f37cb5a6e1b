"""The recipes of docs/extending.md: each a file of its own that trains, stops, resumes and is verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import spmd
from spmd.core import tree
from spmd.parallel import scope
from spmd.strategies import base
from tests import printed
from tests.cases import assert_same_values
from tests.marks import slow_but

RECIPES = printed.recipes()
# What an evaluation of the run must reach on 8 devices, over the recipe's own number of steps: at least so
# much of a score, at most so much of a loss.
REACHED = {
    "segmentation": {"eval/miou": 0.88},
    "retrieval": {"eval/hit@10": 0.75},
    "ratings": {"eval/loss": 0.25},
    "doubling": {"eval/accuracy": 0.85},
    "encoder": {"eval/accuracy": 0.95},
    "belief": {"eval/accuracy": 0.85},
}
SHARDED = ["--simulate", "8", "--train.accumulate", "2", "--log.no-tensorboard"]


def test_every_recipe_is_listed_and_short():
    assert RECIPES.keys() == REACHED.keys()
    for name, text in RECIPES.items():
        assert text.count("\n") <= 60, f"{name}.py has {text.count(chr(10))} lines"


IN_THE_GATE_ONLY = {"segmentation"}
LONG = {"ratings", "encoder"}


@pytest.fixture(
    params=[
        pytest.param(
            name,
            marks=[pytest.mark.gate] * (name in IN_THE_GATE_ONLY)
            + [pytest.mark.slow] * (name in LONG),
        )
        for name in REACHED
    ]
)
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
        reached = metrics[name] <= least if name == "eval/loss" else metrics[name] >= least
        assert reached, metrics

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

    if recipe == "ratings":  # rows have the same places on every mesh
        resumed_on_fewer_devices(file, tmp_path, run_main, want)

    done = run_main("verify", *words, "--steps", "3", "--param-dtype", "float64")
    assert done.returncode == 0 and "verified" in done.stdout, done.stdout + done.stderr


def resumed_on_fewer_devices(file: str, tmp_path: Path, run_main, want) -> None:
    """The last checkpoint but one, continued on two devices instead of eight: equal tables."""
    folder = tmp_path / "parts"
    steps = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    shutil.rmtree(folder / f"checkpoints/{steps[-1]}")
    (folder / "summary.json").unlink()
    words = ["--simulate", "2", "--train.accumulate", "2", "--log.no-tensorboard"]
    done = run_main("--experiment", file, *words, "--run.dir", "parts", "--checkpoint.every", "7")
    assert done.returncode == 0 and f"resuming at step {steps[-2]} of" in done.stdout, done.stderr
    got = arrays("parts", file)
    for name in (name for name in want if name.startswith("tables/")):
        scale = np.abs(want[name]).max()
        assert np.abs(got[name] - want[name]).max() <= 1e-5 * scale > 0, name


# The strategies of each recipe; that of `doubling` is its own. One device under auto is the reference.
EQUAL = [
    (recipe, strategy, num, accumulate)
    for recipe in REACHED
    for strategy in (("doubling",) if recipe == "doubling" else ("auto", "allreduce"))
    for num in (1, 2, 4, 8)
    for accumulate in (1, 2)
    if (strategy, num) != ("auto", 1)
]
IN_THE_GATE = [("segmentation", "allreduce", 4, 2), ("retrieval", "auto", 4, 2)]


@pytest.fixture(scope="module")
def trained(devices, tmp_path_factory):
    """(recipe, strategy, devices, microbatches) -> losses, gradients of the first step and parameters after
    three, in float64, once each.
    """
    directory = tmp_path_factory.mktemp("recipes")
    results = {}

    def run(recipe: str, strategy: str, num: int, accumulate: int):
        case = (recipe, strategy, num, accumulate)
        if case not in results:
            results[case] = steps_of(directory / f"{recipe}.py", *case[1:])
        return results[case]

    for name, text in RECIPES.items():
        (directory / f"{name}.py").write_text(text)
    return run


def steps_of(file: Path, strategy: str, num: int, accumulate: int):
    """Three steps of an experiment on batches of uneven weights, most of them on the first devices."""
    words = ["--simulate", str(num), "--train.accumulate", str(accumulate)]
    words += [] if strategy == "doubling" else ["--strategy", strategy]
    losses, grads = [], {}
    with jax.enable_x64(True):
        program = spmd.load(str(file), [*words, "--param-dtype", "float64"]).build()
        state = program.init()
        for step, batch in enumerate(program.host_batches(0, 3)):
            rng = np.random.default_rng(step)
            weight = rng.choice([0.25, 1.0], len(batch["weight"])).astype(batch["weight"].dtype)
            weight[len(weight) // 2 :: 3] = 0
            batch = jax.device_put(batch | {"weight": weight}, program.strategy.batch_shardings)
            with scope.bind(watched=True):
                state, metrics = program.strategy.step(state, batch)
            losses.append(float(metrics["loss"]))
            start = base.WATCHED_GRADIENTS
            grads = grads or {n: np.array(x) for n, x in metrics.items() if n.startswith(start)}
        params = {n: np.array(x) for n, x in tree.named_leaves(state.params).items()}
    assert {x.dtype for x in params.values()} == {np.dtype("float64")}
    return np.array(losses), grads, params


@pytest.mark.parametrize("recipe,strategy,num,accumulate", slow_but([], EQUAL, gate=IN_THE_GATE))
def test_a_recipe_computes_what_it_computes_on_one_device(
    recipe, strategy, num, accumulate, trained
):
    want_losses, want_grads, want = trained(recipe, "auto", 1, accumulate)
    losses, grads, params = trained(recipe, strategy, num, accumulate)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-10)
    assert grads and any(np.abs(x).max() > 1e-3 for x in grads.values())
    assert_same_values(grads, want_grads)
    assert_same_values(params, want)
