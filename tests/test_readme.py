"""Every command of the README, and its experiment file, run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
LINES = re.findall(r"^python run\.py (.+?)(?:  .*)?$", README, re.M)
# Preparing a stock set needs TensorFlow: here the command must say so.
NEEDS_TENSORFLOW = "data prepare --experiment mnist"


def follows(line):
    """Whether it needs the run of an earlier line."""
    return line.startswith(("eval", "runs")) or "--init.from" in line


def words(line):
    found = shlex.split(line)
    trains = found[0] == "--experiment" and "--list" not in found
    return [*found, "--train.steps", "5"] if trains else found


def test_the_readme_shows_the_commands():
    assert len(LINES) >= 8 and NEEDS_TENSORFLOW in LINES
    head = "\n".join(README.splitlines()[:20])
    assert "make run" in head and "make test" in head and "python -m pytest" in head


@pytest.mark.parametrize(
    "line",
    [x for x in LINES if not follows(x) and not x.startswith("sample") and "wide.py" not in x],
)
def test_command(line, run_cli):
    done = run_cli(*words(line))
    if line == NEEDS_TENSORFLOW:
        assert done.returncode == 2 and "pip install tensorflow" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


def test_eval_and_runs_follow_a_run(run_cli):
    assert run_cli("--experiment", "digits", "--train.steps", "5").returncode == 0
    for line in LINES:
        if follows(line):
            assert run_cli(*words(line)).returncode == 0, line


def test_sampling_follows_a_run(run_cli):
    assert run_cli("--experiment", "lm_stdlib", "--train.steps", "5").returncode == 0
    (line,) = (line for line in LINES if line.startswith("sample"))
    done = run_cli(*words(line), "--tokens", "10")
    assert done.returncode == 0 and done.stdout.startswith("def main("), done.stderr


def test_the_experiment_file(run_cli, tmp_path):
    file = next(b for b in re.findall(r"```python\n(.+?)```", README, re.S) if "def config" in b)
    (tmp_path / "wide.py").write_text(file)
    done = run_cli("--experiment", "wide.py", "--train.steps", "5")
    assert done.returncode == 0, done.stderr


def test_the_python_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = next(b for b in re.findall(r"```python\n(.+?)```", README, re.S) if "spmd.load" in b)
    scope: dict = {}
    exec(compile(block, "README.md", "exec"), scope)  # our own file, not a user's
    assert scope["run"].metrics["eval/accuracy"] > 0.8
