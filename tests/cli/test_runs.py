"""run.py runs: what is said of finished, stopped, empty and damaged runs; nothing is changed."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys

import pytest

import spmd
from spmd.cli import main
from spmd.train.checkpoint import steps
from tests.command import REPOSITORY


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


def _link(place):
    (place / "one/dangling").symlink_to("nowhere")
    (place / "dangling").symlink_to("nowhere")
    (place / "loop").symlink_to("loop")
    (place / "self").symlink_to(".")
    (place / "a file").write_text("mine")
    (place / "new\nline").mkdir()
    os.mkdir(os.fsencode(place) + b"/\xff")
    for name in ("new\nline/config.json", os.fsdecode(b"\xff/config.json")):
        shutil.copy(place / "one/config.json", place / name)
    return "finished"


def _torn(place, name, content, state):
    (place / "one" / name).write_bytes(content)
    return state


def _other_kind(place, name, state):
    """A file where a directory should be, or the other way round."""
    path = place / "one" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.write_text("mine") if name == "checkpoints" else path.mkdir()
    return state


ODD = {
    "links and names": _link,
    "empty summary": lambda p: _torn(p, "summary.json", b"", "summary.json is corrupt"),
    "nested": lambda p: _torn(p, "summary.json", b"[" * 100_000, "summary.json is corrupt"),
    "binary config": lambda p: _torn(p, "config.json", b"\xff\x00", "config.json is corrupt"),
    "wrong types": lambda p: _torn(
        p,
        "summary.json",
        b'{"steps": "many", "metrics": 3, "seconds": {"step": null, "compile": 1}}',
        "finished",
    ),
    "wrong config": lambda p: _torn(
        p, "config.json", b'{"experiment": ["x"], "identity": 3}', "finished"
    ),
    "null metrics": lambda p: _torn(
        p, "metrics.jsonl", b'{"step": null, "eval/loss": null}\n[3]\n3\n', "finished"
    ),
    "binary metrics": lambda p: _torn(
        p, "metrics.jsonl", b"\xff\xfe", "metrics.jsonl cannot be read"
    ),
    "metrics directory": lambda p: _other_kind(p, "metrics.jsonl", "metrics.jsonl cannot be read"),
    "summary directory": lambda p: _other_kind(p, "summary.json", "summary.json is corrupt"),
    "checkpoints file": lambda p: _other_kind(p, "checkpoints", "checkpoints cannot be read"),
    "quarantine file": lambda p: _torn(p, "quarantine", b"mine", "quarantine cannot be read"),
    "step file": lambda p: _torn(p, "checkpoints/30", b"mine", "finished"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_entries_are_passed_over_or_named(place, capsys, case):
    """In each the other run is shown as ever, and nothing is changed."""
    shutil.copytree(place / "one", place / "zwei")
    state = ODD[case](place)
    before = contents(place)
    rows = [x for x in said(capsys, "list").splitlines() if x.startswith(("one ", "zwei "))]
    assert [" " + want in row for row, want in zip(rows, (state, "finished"), strict=True)] == [
        True,
        True,
    ]
    assert " digits, finished" in said(capsys, "status").replace(":", "")
    bad = case in ("checkpoints file", "step file")
    checked = said(capsys, "check", code=int(bad))
    assert ("BAD" in checked) == bad and f"{place}/zwei step 20: 15 arrays" in checked
    assert contents(place) == before


UNREADABLE = """
import grp, os, pwd, sys
from spmd.cli import main, runs
if not os.geteuid():  # root may read everything
    for folder in (sys.argv[1], *sys.argv[2:]):
        os.chmod(folder, os.stat(folder).st_mode | 0o055)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
os.chdir("/")
print(main(["runs", "list", sys.argv[1]]), main(["runs", "list", sys.argv[1] + "/secret"]))
"""


def test_files_of_a_user_without_a_name(place, capsys, monkeypatch):
    """As in a container that is run with any number for its user."""

    def unknown(number):
        raise KeyError(f"uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert "finished" in said(capsys, "list") and " MiB" in said(capsys, "status")
    assert "verified by digests and manifest" in said(capsys, "check")
    steps.write_manifest(place / "one/checkpoints/20")


def test_an_unreadable_directory_is_named(place):
    (place / "secret").mkdir(mode=0o700 if not os.geteuid() else 0)
    done = subprocess.run(
        [sys.executable, "-c", UNREADABLE, place, *place.parents[:-1]],
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
    )
    *rows, codes = done.stdout.splitlines()
    assert codes == "0 2" and rows[1].startswith("one "), done.stderr
    assert done.stderr.splitlines() == [
        f"{place}/secret is skipped: Permission denied",
        f"error: cannot read {place}/secret: Permission denied",
    ]


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
        "import sys; from spmd.cli import main; main(['runs', 'list']); main(['runs', 'status']);"
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
