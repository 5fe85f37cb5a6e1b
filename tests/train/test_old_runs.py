"""A run directory that version 0.1.0 wrote is resumed by this one, and goes on where it ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import spmd
from tests.command import REPOSITORY

RUN = REPOSITORY / "tests/fixtures/run_0_1_0"  # digits, --model.hidden 4, 6 steps of 1 device
WORDS = ["--model.hidden", "4", "--checkpoint.every", "3", "--eval.every", "0", "--log.every", "1"]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def test_a_run_of_0_1_0_is_evaluated_as_it_was(old: Path):
    handle = spmd.load("digits", [*WORDS, "--train.steps", "6", "--run.dir", str(old)])
    metrics = handle.evaluate()
    assert metrics["eval/accuracy"] == pytest.approx(0.2535, abs=1e-4)
    assert metrics["eval/loss"] == pytest.approx(2.2149, abs=1e-4)


def test_a_run_of_0_1_0_is_resumed(old: Path):
    run = spmd.load("digits", [*WORDS, "--train.steps", "12", "--run.dir", str(old)]).train()
    steps, losses = run.series("train/loss")
    assert steps == list(range(1, 13)) and np.isfinite(losses).all()
    assert losses[-1] < losses[0]
