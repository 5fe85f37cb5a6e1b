"""Runs of one program shape in one process share the compiled step; what it computes is their own."""

from __future__ import annotations

import collections
import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

import spmd
from spmd import optim
from spmd.experiment import building, shared

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


WSD = {"schedule": "wsd", "warmup_steps": 4, "base_batch_size": 48}


@pytest.mark.gate
@pytest.mark.parametrize(
    ("optimizer", "other"),
    [
        (
            optim.SGD(learning_rate=0.1, final_fraction=0.3, **WSD),
            {"learning_rate": 0.03},
        ),
        (
            optim.AdamW(
                learning_rate=0.02,
                groups=(
                    optim.Group(match="layers/0/kernel", rate=0.3, decay=0.2),
                    optim.Group(match="*/bias", optimizer=optim.SGD(learning_rate=0.01, **WSD)),
                ),
            ),
            {
                "weight_decay": 0.07,
                "groups": (
                    optim.Group(match="layers/0/kernel", rate=0.7, decay=0.1),
                    optim.Group(match="*/bias", optimizer=optim.SGD(learning_rate=0.03, **WSD)),
                ),
            },
        ),
    ],
    ids=["wsd", "groups"],
)
def test_a_shared_step_computes_what_a_step_with_constants_computes(
    optimizer, other, devices, monkeypatch
):
    """Ten steps under each configuration by one compiled step, and by one without knobs: the same bits, but
    with groups, where XLA multiplies the constants of a rate first.
    """
    monkeypatch.setattr(shared, "_built", collections.deque(maxlen=shared.KEPT))
    exp = spmd.load("digits", WORDS).experiment

    def params_of(config, share):
        program = dataclasses.replace(exp, optimizer=config).build(share=share)
        state = program.init()
        for batch in program.host_batches(0, 10):
            state, metrics = program.strategy.step(state, batch)
        return program, jax.device_get((state.params, metrics["learning_rate"]))

    changed = dataclasses.replace(optimizer, **other)
    first, _ = params_of(optimizer, True)
    second, got = params_of(changed, True)
    assert second.strategy.step.jitted is first.strategy.step.jitted
    monkeypatch.setattr(building, "has_knobs", lambda optimizer: False)
    constant, want = params_of(changed, False)
    assert not constant.strategy.step.knobs
    limit = 1e-5 if optimizer.groups else 0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, limit, limit * 0.1), got, want)


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        (optim.SGD(), {"peak"}),
        (optim.AdamW(), {"peak", "decay"}),
        (optim.SGD(schedule="wsd"), {"peak"}),
        (optim.SGD(schedule="wsd", final_fraction=0.1), {"peak", "final", "fall"}),
        (optim.SGD(warmup_steps=3, base_batch_size=32), {"peak", "rise"}),
        (
            optim.AdamW(groups=(optim.Group(match="a", rate=0.5, decay=0.0),)),
            {"peak", "decay", "0/rate"},
        ),
        (
            optim.SGD(
                groups=(
                    optim.Group(match="a", freeze=True),
                    optim.Group(match="b", optimizer=optim.Lion()),
                )
            ),
            {"peak", "0/peak", "0/decay"},
        ),
    ],
)
def test_the_knobs_of_an_optimizer(optimizer, names):
    assert optimizer.knobs(64).keys() == names


class Own(optim.SGD):
    """An optimizer of the user's, which may read its fields while it is built."""


@pytest.mark.parametrize(
    ("optimizer", "has"),
    [
        (optim.Muon(), True),
        (Own(), False),
        (optim.Optax(build=optax.adabelief), False),
        (optim.SGD(groups=(optim.Group(match="a", optimizer=Own()),)), False),
    ],
)
def test_optimizers_of_the_users_have_no_knobs(optimizer, has):
    assert building.has_knobs(optimizer) == has
