"""Runs of one program shape in one process share the compiled step; what it computes is their own."""

from __future__ import annotations

import collections
import json

import pytest

import spmd
from spmd.experiment import shared

WORDS = ["--simulate", "2", "--train.steps", "12", "--log.every", "1", "--run.compile-cache", "off"]


def test_another_rate_compiles_nothing(devices, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "_built", collections.deque(maxlen=shared.KEPT))

    def train(name, *words):
        run = spmd.load("digits", [*WORDS, *words, "--run.dir", str(tmp_path / name)]).train()
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return run.seconds["compile"], [json.loads(x).get("train/loss") for x in lines]

    rate = ("--optimizer.learning-rate", "0.03")
    alone, want = train("alone", "--optimizer.schedule", "constant", *rate)
    first, other = train("first", "--optimizer.schedule", "constant")
    assert other != want and first <= 0.2 * alone
    _, got = train("again", "--optimizer.schedule", "constant", *rate)
    assert got == want
    # Another shape: the momentum is a constant of the step.
    _, changed = train(
        "momentum", "--optimizer.schedule", "constant", *rate, "--optimizer.momentum", "0.5"
    )
    assert changed != want


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((), {"peak"}),
        (("--optimizer", "adamw"), {"peak", "decay"}),
        (("--optimizer.schedule", "wsd", "--optimizer.final-fraction", "0.1"), set()),
    ],
)
def test_the_knobs_of_an_optimizer(words, names):
    optimizer = spmd.load("digits", words).experiment.optimizer
    assert optimizer.knobs(64).keys() == names
