"""The README: first lines, experiment file and Python block; its commands are in tests/test_printed.py."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_readme_begins_with_commands():
    head = "\n".join(README.splitlines()[:20])
    assert "make run" in head and "make test" in head and "python -m pytest" in head


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
