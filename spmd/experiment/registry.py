"""Load experiments by name: run their files, apply the command line."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.abc
import importlib.util
import os
import re
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from spmd.core import explain, values
from spmd.core.fields import check, closest
from spmd.experiment import overrides
from spmd.experiment.base import Experiment
from spmd.experiment.choices import argument, choices_of, split
from spmd.experiment.files import find

LOADED: dict[
    str, list[Path]
] = {}  # name -> the files of that name that were read, the last one last
# name -> the arguments of its config() when it was read last, and the values that they may have
CHOSEN: dict[str, dict[str, str]] = {}
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {}


def load(
    name: str, words: Sequence[str], options: type | None = None, prog: str = "run.py"
) -> tuple[Experiment, Any]:
    """(the experiment `name` or of a .py file, a command's own options), with command-line words applied.

    options: a dataclass; None: there are none. ValueError for a word that is not understood.
    """
    experiment, others = from_words(path := find(name), words)
    return overrides.override(experiment, others, options, prog, CHOICES[path.stem])


def file_of(name: str) -> Path:
    """The file that the experiment `name` was read from; ValueError without one, or when two differ."""
    files = LOADED.get(name, [])
    check(
        bool(files),
        f"experiment {name!r} comes from no file: it is compiled in a process of its own, which reads"
        " it from one; load it with spmd.load(NAME or PATH)",
    )
    present = [file for file in files if file.is_file()]
    check(
        len({file.read_bytes() for file in present}) <= 1,
        f"two experiment files are called {name}: {' and '.join(map(str, present))}; rename one",
    )
    return files[-1]


def from_file(path: Path, chosen: Mapping[str, str] | None = None) -> Experiment:
    """Run config() of an experiment file; chosen: its arguments, where they are not the defaults."""
    words = [f"--{name}={value}" for name, value in (chosen or {}).items()]
    return from_words(path, words)[0]


def from_words(path: Path, words: Sequence[str]) -> tuple[Experiment, list[str]]:
    """(what config() of an experiment file returns for the choices among `words`, the other words)."""
    check(
        re.fullmatch(r"[\w.\-]+", path.stem) is not None,
        f"{path.name!r}: use letters, digits, _ and -",
    )
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[
        :8
    ]  # names may repeat in other folders
    spec = importlib.util.spec_from_file_location(f"spmd_experiment_{path.stem}_{key}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    config = _config(path, module, spec.loader)
    with explain.translate_errors(path):
        choices = choices_of(config)
    chosen, others = split(choices, words)
    with explain.translate_errors(path):
        experiment = config(**{argument(name): value for name, value in chosen.items()})
    check(
        isinstance(experiment, Experiment),
        f"config() of {path} returned {values.shorten(experiment)}, not an spmd.Experiment",
    )
    loaded = LOADED.setdefault(path.stem, [])
    loaded[:] = [file for file in loaded if file != path.resolve()] + [path.resolve()]
    CHOSEN[path.stem], CHOICES[path.stem] = chosen, choices
    return dataclasses.replace(experiment, name=path.stem), others


def _config(path: Path, module: types.ModuleType, loader: importlib.abc.Loader) -> Any:
    """The function config() of a file; ValueError about any mistake in the file's code."""
    with explain.translate_errors(path):
        loader.exec_module(module)
    config = getattr(module, "config", None)
    names = [k for k, v in vars(module).items() if callable(v) and v.__module__ == module.__name__]
    check(
        callable(config),
        f"experiment file {path} has no config() function, which returns the spmd.Experiment."
        f"{closest('config', names)}",
    )
    return cast(Any, config)
