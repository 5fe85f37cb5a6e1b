"""run.py runs: what is said of finished, stopped, empty and damaged runs; nothing is changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import spmd
from spmd.commands import main

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """runs/one: finished at step 20, with checkpoints of 10 and 20."""
    path = tmp_path_factory.mktemp("made")
    args = ["--train.steps", "20", "--checkpoint.every", "10", "--log.no-tensorboard"]
    spmd.load("digits", [*args, "--run.dir", str(path / "runs/one")]).train()
    return path


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def contents(place):
    return {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}


def said(capsys, *words, code=0):
    assert main(["runs", *words]) == code
    return capsys.readouterr().out


def test_list_shows_every_state(place, capsys):
    shutil.copytree(place / "one", place / "two")
    (place / "two/summary.json").unlink()
    (place / "new").mkdir()
    shutil.copy(place / "one/config.json", place / "new")
    (place / "not-a-run").mkdir()
    before = contents(place)
    rows = {line.split()[0]: line for line in said(capsys, "list").splitlines()}
    assert set(rows) == {"run", "one", "two", "new"}
    assert " finished " in rows["one"] and " accuracy 0." in rows["one"]
    assert "unfinished at step 20" in rows["two"]
    assert " empty " in rows["new"]
    assert contents(place) == before


def test_status_shows_checkpoints_and_quarantine(place, capsys):
    (place / "one/quarantine/5").mkdir(parents=True)
    (place / "one/quarantine/5/reason.txt").write_text("file x is missing\n")
    text = said(capsys, "status", "runs/one")
    for part in (
        "digits, finished",
        "checkpoint 10: 0.",
        "checkpoint 20: 0.",
        "accuracy 0.",
        "in quarantine 5: file x is missing",
        "optimizer.momentum: 0.9",
        "compile ",
    ):
        assert part in text


def test_check_verifies_without_the_experiment_and_changes_nothing(place, capsys):
    before = contents(place)
    lines = said(capsys, "check").splitlines()
    assert [" ".join(x.split()[1:]) for x in lines] == [
        f"step {step}: 15 arrays, 397.1 KiB, verified by digests and manifest" for step in (10, 20)
    ]
    assert contents(place) == before


def test_check_finds_changed_data_by_manifest_and_by_digests(place, capsys):
    for step in ("10", "20"):
        data = max((place / "one/checkpoints" / step).rglob("d/*"), key=lambda p: p.stat().st_size)
        content = bytearray(data.read_bytes())
        content[1000] ^= 1
        data.write_bytes(content)
    (place / "one/checkpoints/20/manifest.json").unlink()
    before = contents(place)
    ten, twenty = said(capsys, "check", "runs/one", code=1).splitlines()
    assert "step 10: BAD: file state/" in ten and "has another sha256" in ten
    assert "step 20: BAD: " in twenty and "sha256" not in twenty
    assert contents(place) == before


@pytest.mark.parametrize("name", ["config", "summary"])
def test_a_corrupt_file_is_told_of_and_the_rest_shown(place, capsys, name):
    (place / f"one/{name}.json").write_text("{")
    assert f"{name}.json is corrupt" in said(capsys, "list")
    assert "checkpoint 20" in said(capsys, "status")
    assert "step 20: 15 arrays" in said(capsys, "check")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("list gone", "no directory"),
        ("list runs/one/checkpoints", "no run in"),
        ("chek", "Did you mean 'check'?"),
        ("", "run.py runs list|status|check"),
        ("list a b", "not understood"),
        ("list --experiment digits", "not understood"),
    ],
)
def test_mistakes(place, capsys, words, message):
    before = contents(place)
    assert main(["runs", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and "Traceback" not in error
    assert contents(place) == before


def test_list_and_status_import_no_jax(place):
    code = (
        "import sys; from spmd.commands import main; main(['runs', 'list']); main(['runs', 'status']);"
        " assert not {'jax', 'flax', 'orbax'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place.parent,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "one/config.json").read_text())["experiment"] in done.stdout
