"""Means are over what counts: skipped steps weigh nothing, nothing is null, and every file is strict JSON."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from spmd.cli import main
from spmd.core import storage
from spmd.train import log, progress
from tests.command import REPOSITORY
from tests.spoiled import write


def strict(text):
    """JSON that has no NaN."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON: {text[:200]}")

    return json.loads(text, parse_constant=refuse)


def lines(run):
    return [strict(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_files(run):
    """Every JSON file of a run, Orbax's own included."""
    files = [p for p in run.rglob("*") if p.suffix == ".json" or p.name == "_CHECKPOINT_METADATA"]
    assert {"config.json", "summary.json", "_CHECKPOINT_METADATA"} <= {p.name for p in files}
    for file in files:
        strict(file.read_text())


@pytest.fixture
def train(tmp_path, monkeypatch):
    """`train("out", "--log.every", "1")`: a run of own.py with four steps; returns its directory."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words, code=0):
        common = ["--experiment", "own.py", "--run.dir", name]
        assert main([*common, *words]) == code
        return tmp_path / name

    return run


def series(run, name):
    return [line[name] for line in lines(run) if name in line]


SPOIL = "if split == 'train':\n    data['image'][17] = np.inf"
LOCAL = ("--simulate", "2", "--strategy", "local", "--strategy.period", "2", "--mesh.replica", "2")


def test_a_skipped_step_weighs_nothing(tmp_path, train, capsys):
    write(tmp_path, SPOIL)
    each = train("each", "--train.nonfinite", "skip", "--log.every", "1")
    losses = series(each, "train/loss")
    assert len(losses) == 4 and losses.count(None) == 1
    assert series(each, "train/skipped_steps") == [float(x is None) for x in losses]
    assert (
        "loss null (no step since the last line counts: 1 skipped, not finite)"
        in capsys.readouterr().out
    )
    window = train("window", "--train.nonfinite", "skip", "--log.every", "4")
    kept = [x for x in losses if x is not None]
    assert series(window, "train/loss") == [pytest.approx(np.mean(kept), rel=1e-6)]
    assert series(window, "train/skipped_steps") == [1.0]
    assert "(1 steps skipped, not finite)" in capsys.readouterr().out
    check_files(each)
    check_files(window)


def test_a_replica_that_skips_leaves_the_mean_to_the_others(tmp_path, train):
    write(tmp_path, SPOIL)
    run = train("out", "--train.nonfinite", "skip", "--log.every", "1", *LOCAL)
    assert sum(series(run, "train/skipped_steps")) == 1
    assert all(np.isfinite(series(run, "train/loss"))) and all(
        np.isfinite(series(run, "train/replica_grad_norm"))
    )
    check_files(run)


def test_steps_weigh_as_many_tokens_as_they_have(tmp_path, train, capsys):
    """Targets that are -1 here and there: a mean of means is another number. In the evaluation all are."""
    rows = "np.arange(32)[:, None] + np.arange(8) < (20 if split == 'train' else 99)"
    write(tmp_path, f"data['targets'][{rows}] = -1", language=True)
    each = train("each", "--log.every", "1", "--log.examples")
    window = train("window", "--log.every", "4")
    read = (each / "examples-0.jsonl").read_text().splitlines()
    counted = lambda i: int((np.arange(8) + i >= 20).sum())
    weights = [sum(map(counted, strict(line)["examples"])) for line in read]
    assert sum(weights) == sum(map(counted, range(32))) and len(set(weights)) > 1
    for name in ("train/loss", "train/accuracy"):
        want = np.average(series(each, name), weights=weights)
        assert series(window, name) == [pytest.approx(want, rel=1e-6)]
    assert np.mean(series(each, "train/loss")) != pytest.approx(
        series(window, "train/loss")[0], rel=1e-6
    )
    assert series(window, "eval/loss") == [None]
    assert "null: no example of the evaluation split has a weight" in capsys.readouterr().out
    check_files(window)
    assert main(["eval", "--experiment", "own.py", "--run.dir", "window"]) == 2
    said = "no example of the evaluation split has a weight in eval/accuracy, eval/loss"
    assert said in capsys.readouterr().err


def test_nothing_that_counts_is_null_and_never_best(tmp_path, train, capsys):
    write(tmp_path, "data['image'][:] = np.inf")
    words = ("--train.nonfinite", "skip", "--eval.every", "2", "--checkpoint.every", "2")
    run = train("out", *words, "--checkpoint.best", "eval/loss", "--checkpoint.keep", "1")
    assert set(series(run, "train/loss")) == set(series(run, "eval/loss")) == {None}
    assert strict((run / "summary.json").read_text())["metrics"]["eval/loss"] is None
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["4"]  # nothing was best before
    check_files(run)
    capsys.readouterr()
    assert main(["runs", "list", "."]) == 0
    assert "loss null" in capsys.readouterr().out
    assert main(["eval", "--experiment", "own.py", "--run.dir", "out"]) == 0
    shown = capsys.readouterr()
    assert strict(shown.out.splitlines()[-1])["eval/loss"] is None and "not finite" in shown.err


EMPTY = "if split == {!r}:\n    data = {{k: x[:0] for k, x in data.items()}}"


@pytest.mark.parametrize(
    "spoil,words,message",
    [
        (EMPTY.format("eval"), (), "the evaluation split holds no examples"),
        (EMPTY.format("train"), (), "the training split holds no examples"),
        (
            "pass",
            ("--checkpoint.best", "eval/acuracy"),
            "Did you mean 'eval/accuracy'? There are: eval/accuracy, eval/loss",
        ),
    ],
)
def test_refused_before_the_first_step(tmp_path, train, capsys, spoil, words, message):
    write(tmp_path, spoil)
    assert not train("out", *words, code=2).exists()
    assert message in (shown := capsys.readouterr()).err and not shown.out


def test_means_by_weight():
    values = np.array([1, np.nan, 3, 5], np.float32)
    assert log.weighted_mean(values, np.array([1, 0, 1, 0])) == 2
    assert log.weighted_mean(values, np.array([3, 0, 1, 0])) == 1.5
    assert log.weighted_mean(values, np.zeros(4)) is None


def test_speed_is_of_the_steps_that_were_timed(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind="cpu", process_index=1)]))
    bar = progress.Bar(100, 0, 8, mesh, first=1)
    loss = {"train/loss": 1.0}
    assert (
        bar.report(1, loss) == {}
    )  # the first dispatch compiles, and ran before there was a clock
    assert "step 1/100  loss 1.0000\n" in capsys.readouterr().out
    now[0] = 4.0
    with bar.away():
        now[0] = 10.0
    now[0] = 12.0
    assert bar.report(4, loss)["train/step_seconds"] == 2.0  # 4 + 2 seconds, 3 steps
    with bar.away():  # reported within, as an evaluation does
        now[0] = 14.0
        bar.report(5, loss)
        now[0] = 20.0
    now[0] = 21.0
    assert bar.report(6, loss)["train/step_seconds"] == 1.0
    assert bar.report(7, loss) == {}  # no time has passed


def test_strict_json():
    value = {
        "a": [1.5, float("nan"), (float("inf"), -float("inf"))],
        "b": {"c": None},
        "nan": "NaN",
    }
    want = {"a": [1.5, None, [None, None]], "b": {"c": None}, "nan": "NaN"}
    assert strict(storage.json_text(value)) == want


def test_nothing_else_writes_json():
    """gke quotes one string for YAML; launch imports nothing of the package. Chat templates have a filter
    `tojson`; records are digested as JSON, and none of it is written.
    """
    chat = (f"spmd/data/text/chat/{name}.py" for name in ("sandbox", "template", "conversation"))
    names = ("spmd/core/storage.py", "spmd/launch/gke.py", "spmd/data/text/records.py", *chat)
    allowed = set(map(Path, names))
    found = {
        file.relative_to(REPOSITORY)
        for file in (REPOSITORY / "spmd").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute | ast.Name)
        and ast.unparse(node) in ("json.dump", "json.dumps")
    }
    assert found == allowed
