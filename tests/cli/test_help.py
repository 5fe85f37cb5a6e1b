"""run.py --help is read from the sources: it must say what the classes say."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys
from typing import Any

import pytest

from spmd import optim, strategies
from spmd.cli import help
from spmd.core import sources
from tests.command import REPOSITORY

SHARED = [place for places in help.SHARED.values() for place in places]
CLASSES = [c for place in SHARED for c in (sources.classes_of(place).values() or [place])]


def resolved(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"spmd.{module}"), name)


@pytest.mark.parametrize("place", CLASSES)
def test_fields_read_are_those_of_the_class(place: str):
    read = {f.name: f for f in sources.fields_of(place)}
    fields = dataclasses.fields(resolved(place))
    assert list(read) == [f.name for f in fields]
    for field in fields:
        assert "".join(read[field.name].kind.split()).replace("'", '"') == (
            "".join(str(field.type).split()).replace("'", '"')
        ), field.name
        if field.default_factory is not dataclasses.MISSING:
            continue
        if field.default is dataclasses.MISSING:
            assert read[field.name].default == "", field.name
        else:
            scope = vars(inspect.getmodule(resolved(place))) | vars(strategies) | vars(optim)
            assert eval(read[field.name].default, dict(scope)) == field.default, field.name
        hidden = "Suppress" in str(field.type)
        assert hidden or read[field.name].help, f"{place}.{field.name} has no help"


@pytest.mark.parametrize("place", [p for p in SHARED if p.split(":")[1].isupper()])
def test_tables_read_are_those_of_the_package(place: str):
    found = sources.classes_of(place)
    if not found:  # one class, in capitals
        return
    assert {name: resolved(where) for name, where in found.items()} == resolved(place)


@pytest.mark.parametrize("words", [["--help"], ["--list"]])
def test_help_imports_no_jax(words: list[str]):
    script = f"import sys; from spmd.cli import main; main({words}); sys.exit('jax' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL
    )
