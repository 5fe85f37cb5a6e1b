"""README.md and CONTRIBUTING.md: first lines, experiment files, Python block; see also test_printed.py."""

from __future__ import annotations

import re

import pytest

from tests.command import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_the_readme_begins_with_commands():
    head = "\n".join(README.splitlines()[:20])
    assert "make run" in head and "make test" in head and "python -m pytest" in head


@pytest.mark.gate
@pytest.mark.parametrize(
    "page, name, words",
    [
        ("README.md", "wide.py", "--train.steps 5"),
        (
            "CONTRIBUTING.md",
            "skip.py",
            "--train.steps 5 --simulate 2 --mesh.tensor 2 --mesh.data 1",
        ),
    ],
)
def test_the_experiment_file(page, name, words, run_cli, tmp_path):
    blocks = re.findall(r"```python\n(.+?)```", (REPOSITORY / page).read_text(), re.S)
    (file,) = (block for block in blocks if "def config" in block)
    assert f"--experiment {name}" in file
    (tmp_path / name).write_text(file)
    done = run_cli("--experiment", name, *words.split())
    assert done.returncode == 0, done.stderr


@pytest.mark.gate
def test_the_python_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = next(b for b in re.findall(r"```python\n(.+?)```", README, re.S) if "spmd.load" in b)
    scope: dict = {}
    exec(compile(block, "README.md", "exec"), scope)  # our own file, not a user's
    assert scope["run"].metrics["eval/accuracy"] > 0.8
