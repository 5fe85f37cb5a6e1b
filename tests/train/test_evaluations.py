"""Evaluations beside the task's metrics: other data, and whatever reads the live state."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import spmd
from spmd.train.evaluations import Evaluation, OnData


@dataclasses.dataclass(frozen=True, kw_only=True)
class LargestKernel(Evaluation):
    """The largest entry of a parameter: what no sum over examples says."""

    def measure(self, snapshot):
        kernel = snapshot.arrays["params/layers/1/kernel"]
        return {"largest": np.abs(np.asarray(kernel)).max(), "nothing": None}


def experiment(tmp_path: Path, *words: str, **changes):
    given = ["--simulate", "1", "--log.no-tensorboard", "--run.dir", str(tmp_path / "run"), *words]
    exp = spmd.load("digits", given).experiment
    flipped = dataclasses.replace(exp.data, batch_size=16, eval_batch_size=64)
    evaluations = (OnData(name="same", data=flipped), LargestKernel(name="kernel", every=4))
    return dataclasses.replace(exp, **({"evaluations": evaluations} | changes))


def lines(tmp_path: Path, name: str) -> dict[int, float]:
    read = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in read if name in line}


def test_evaluations_have_their_own_cadence_and_are_logged(tmp_path, devices):
    words = ["--train.steps", "10", "--eval.every", "5", "--checkpoint.best", "eval/same/accuracy"]
    run = experiment(tmp_path, *words).train_run()
    assert list(lines(tmp_path, "eval/same/accuracy")) == [5, 10]
    assert list(lines(tmp_path, "eval/kernel/largest")) == [4, 8, 10]
    assert set(lines(tmp_path, "eval/kernel/nothing").values()) == {None}
    # The same examples in batches of another size: the same metrics.
    for name in ("accuracy", "loss"):
        assert run.metrics[f"eval/same/{name}"] == pytest.approx(
            run.metrics[f"eval/{name}"], rel=1e-6
        )
    kernel = experiment(tmp_path, *words).restore().arrays["params/layers/1/kernel"]
    assert run.metrics["eval/kernel/largest"] == pytest.approx(float(np.abs(kernel).max()))
    # Free: the run goes on without them.
    later = experiment(tmp_path, "--train.steps", "12", evaluations=()).train_run()
    assert later.steps == 12


def test_mistakes_with_evaluations(tmp_path, devices):
    twice = (LargestKernel(name="kernel"), LargestKernel(name="kernel"))
    with pytest.raises(ValueError, match="two evaluations are called kernel"):
        experiment(tmp_path, evaluations=twice)
    with pytest.raises(ValueError, match="a name is made of letters"):
        LargestKernel(name="a/b")
    with pytest.raises(ValueError, match="every=-1 must not be negative"):
        LargestKernel(name="a", every=-1)
    odd = type("Odd", (Evaluation,), {"measure": lambda self, snapshot: 3.0})(name="odd")
    with pytest.raises(ValueError, match="evaluation 'odd' returned float"):
        experiment(tmp_path, "--train.steps", "10", evaluations=(odd,)).train_run()
