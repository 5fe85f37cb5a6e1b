"""The wheel: built without the network, installed into a directory, run there by its console script."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import spmd
from tests.command import REPOSITORY, start

pytestmark = pytest.mark.gate

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "spmd", "experiments")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
OFFLINE = ("--quiet", "--no-deps", "--no-index")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: setuptools writes into the tree that it builds from."""
    tree, built = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (REPOSITORY / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / name, tree / name, ignore=unwanted)
        else:
            shutil.copy(REPOSITORY / name, tree)
    words = ("wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", built, tree)
    subprocess.run((*PIP, *words), check=True)
    (file,) = built.iterdir()
    return file


@pytest.fixture
def run_installed(wheel, tmp_path):
    """`run_installed("--list")`: the console script of the installed wheel, in an empty directory."""
    target, empty = tmp_path / "installed", tmp_path / "empty"
    subprocess.run((*PIP, "install", *OFFLINE, "--target", target, wheel), check=True)
    empty.mkdir()

    def run(*words: str) -> str:
        script, env = target / "bin" / "spmd", {"PYTHONPATH": str(target)}
        process = start(*words, cwd=empty, env=env, script=script)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out

    return run


def test_holds_what_the_package_needs(wheel):
    assert wheel.name == f"spmd-{spmd.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "spmd").rglob("*.py")}
    wanted |= {f"spmd/experiments/{p.name}" for p in (REPOSITORY / "experiments").glob("*.py")}
    wanted |= {"spmd/py.typed", "spmd/data/builders/digits.npz"}
    assert wanted <= names
    assert {name.split("/")[0] for name in names} == {"spmd", f"spmd-{spmd.__version__}.dist-info"}


def test_the_console_script_lists_trains_and_launches(run_installed, tmp_path):
    listed = [line.split()[0] for line in run_installed("--list").splitlines()]
    assert listed == sorted(p.stem for p in (REPOSITORY / "experiments").glob("*.py"))
    words = ("--train.steps", "2", "--optimizer.warmup-steps", "0")
    assert "done: 2 steps" in run_installed("--experiment", "digits", *words)
    assert (tmp_path / "empty/runs/digits/summary.json").is_file()
    shown = run_installed(
        "launch", "local", "--processes", "2", "--experiment", "digits", "--dry-run"
    )
    assert " -m spmd.cli train --experiment digits" in shown and "run.py" not in shown
