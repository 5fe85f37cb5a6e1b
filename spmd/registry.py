"""Experiment files by name: found, read, overridden from the command line."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spmd import overrides
from spmd.experiment import Experiment
from spmd.fields import check, closest

LOADED: dict[str, Path] = {}  # name -> the file it was read from last
EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def load(
    name: str, words: Sequence[str], options: type | None = None, prog: str = "run.py"
) -> tuple[Experiment, Any]:
    """(the experiment `name` or of a .py file, a command's own options), with command-line words applied.

    options: a dataclass; None: there are none. A word that is not understood ends the process with 2.
    """
    return overrides.override(from_file(find(name)), words, options, prog=prog)


def available() -> dict[str, Path]:
    """The experiments of the folder by name."""
    return {p.stem: p for p in sorted(EXPERIMENTS.glob("*.py")) if not p.stem.startswith("_")}


def summary_line(path: Path) -> str:
    """The first line of an experiment file's docstring, without running it."""
    import ast

    doc = ast.get_docstring(ast.parse(path.read_text()))
    return doc.splitlines()[0] if doc else ""


def find(name: str) -> Path:
    """The file of an experiment: a name in experiments/, or a path to a .py file."""
    if name.endswith(".py"):
        path = Path(name)
        check(
            path.is_file(),
            f"no experiment file {name!r}; give a .py file with config(), or a name of:"
            f" {', '.join(available())}",
        )
        return path
    known = available()
    check(
        name in known,
        f"unknown experiment {name!r}.{closest(name, known)} Known: {', '.join(known)};"
        " or give the path of a .py file with config()",
    )
    return known[name]


def from_file(path: Path) -> Experiment:
    """Runs config() of an experiment file."""
    check(
        re.fullmatch(r"[\w.\-]+", path.stem) is not None,
        f"{path.name!r}: use letters, digits, _ and -",
    )
    spec = importlib.util.spec_from_file_location(f"spmd_experiment_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        line = next((f" (line {e.lineno})" for e in _frames(error, path)), "")
        raise ValueError(
            f"experiment file {path}{line} fails to import: {type(error).__name__}: {error}"
        ) from error
    check(
        callable(getattr(module, "config", None)),
        f"experiment file {path} has no config() function",
    )
    experiment = module.config()
    check(
        isinstance(experiment, Experiment),
        f"config() of {path} returned {type(experiment).__name__}, not an spmd.Experiment",
    )
    LOADED[path.stem] = path.resolve()
    return dataclasses.replace(experiment, name=path.stem)


def _frames(error: BaseException, path: Path) -> list[Any]:
    import traceback

    return [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if Path(f.filename).resolve() == path.resolve()
    ][-1:]
