"""Imports point down only: read from the source of spmd/ and experiments/, lazy ones included."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# From the bottom up. A room imports from the rows below its own, and from itself; rooms of one row do not
# import each other. A new module of spmd/ goes into one of these rooms.
ROOMS = (
    ("core",),
    ("hardware", "parallel", "metrics"),
    ("data", "optim", "runtime", "models"),
    ("tasks",),
    ("strategies",),
    ("train",),
    ("weights",),
    ("experiment",),
    ("analysis",),
    ("api", "cli"),
)
RANK = {name: rank for rank, row in enumerate(ROOMS) for name in row}
MAX_ENTRIES = 18  # of spmd/
MAX_ARROWS = 70  # between two rooms, lazy imports counted
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60

ASIDE = {"launch": set()}  # beside the rows: imports nothing of spmd, and every room may import it
NEVER = {"strategies": {"models", "data"}}  # though they lie below
STANDARD_LIBRARY_ONLY = (
    "spmd/core/fields.py",
    "spmd/core/storage.py",
    "spmd/core/values.py",
    "spmd/core/explain.py",
    "spmd/core/sources.py",
    "spmd/hardware/chips.py",
    "spmd/launch/",
)
# models/ name logical dims: nothing that says where an array lies
NO_PLACEMENT = {
    "PartitionSpec",
    "NamedSharding",
    "jax.P",
    "spmd.parallel.mesh",
    "spmd.parallel.sharding",
}
FOR_EXPERIMENTS = {
    "models",
    "metrics",
    "data",
    "optim",
    "tasks",
    "strategies",
    "train",
    "parallel",
    "experiment",
    "weights",
}


def imported(path: str, source: str) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of each import, wherever it stands; name is "" for a whole module."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, module, alias.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            target = node.args[0] if node.args else None
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield node.lineno, target.value, ""


def unit(module: str, name: str) -> str:
    """The top-level name inside spmd that an import reaches; "" for spmd itself."""
    return [*module.split("."), name, ""][1]


def dotted(source: str) -> Iterator[tuple[int, str]]:
    """(line, `a.b.c`) of each attribute access."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def arrow(owner: str, target: str) -> str:
    """Why `owner` must not import `target`; "" where it may."""
    if owner == target:
        return ""
    if target not in RANK and target not in ASIDE:
        if not target or target[0].isupper():
            return "import the module that defines it, not the package's root"
        return f"spmd.{target} is not registered: put it into a room, see ROOMS of tests/test_layering.py"
    if owner in ASIDE:
        allowed = ASIDE[owner]
        return "" if target in allowed else f"{owner} may import only {sorted(allowed) or 'itself'}"
    if target in NEVER.get(owner, ()):
        return f"{owner} never imports {target}"
    if target not in ASIDE and RANK[target] >= RANK[owner]:
        return f"{target} is not below {owner}"
    return ""


def inside(path: str, source: str) -> Iterator[tuple[int, str]]:
    """What a file of spmd/ imports against the order."""
    owner = path.split("/")[1].removesuffix(".py")
    if owner not in RANK and owner not in ASIDE:
        yield (
            1,
            f"spmd.{owner} is not registered: put it into a room, see ROOMS of tests/test_layering.py",
        )
        return
    for line, module, name in imported(path, source):
        top = module.split(".")[0]
        if top == "spmd":
            if why := arrow(owner, unit(module, name)):
                yield line, why
        elif top in ("run", "experiments"):
            yield line, f"{top} is above spmd"
        elif path.startswith(STANDARD_LIBRARY_ONLY) and top not in sys.stdlib_module_names:
            yield line, f"{path} imports the standard library only, not {top}"
        if owner == "models" and {f"{module}.{name}", module, name} & NO_PLACEMENT:
            yield line, f"models name logical dims only, not {name or module}"
    if owner == "models":
        for line, text in dotted(source):
            if text in NO_PLACEMENT or text.split(".")[-1] in NO_PLACEMENT:
                yield line, f"models name logical dims only, not {text}"


def experiment(path: str, source: str, public: Set[str]) -> Iterator[tuple[int, str]]:
    """What an experiment imports beyond the public names."""
    for line, module, name in imported(path, source):
        if module.split(".")[0] != "spmd" or (module == "spmd" and name in public | {""}):
            continue
        parts = [*module.split(".")[1:], *([name] if name else [])]
        if parts[0] not in FOR_EXPERIMENTS or any(part.startswith("_") for part in parts):
            yield line, f"{'.'.join(parts)} is not public: see FOR_EXPERIMENTS in test_layering.py"


def violations(sources: Mapping[str, str], public: Set[str] = frozenset()) -> list[str]:
    """`path:line: reason` for each import in {path: source} that breaks the order."""
    found = []
    for path, source in sources.items():
        if path == "spmd/__init__.py":  # lazy exports of everything
            continue
        outside = path.startswith("experiments/")
        wrong = experiment(path, source, public) if outside else inside(path, source)
        found += [f"{path}:{line}: {why}" for line, why in wrong]
    return found


def arrows(sources: Mapping[str, str]) -> set[tuple[str, str]]:
    """(room, room that it imports from) of {path: source} of spmd/, lazy imports counted."""
    found = set()
    for path, source in sources.items():
        owner = path.split("/")[1].removesuffix(".py")
        for _, module, name in imported(path, source):
            target = unit(module, name)
            if module.split(".")[0] == "spmd" and owner != "__init__" and target not in ("", owner):
                found.add((owner, target))
    return found


def public_classes(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Name of each public top-level class -> the files that define one."""
    found: dict[str, list[str]] = {}
    for path, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(path)
    return found


def too_long(sources: Mapping[str, str]) -> dict[str, int]:
    """`path` or `path:function` -> its lines, for files and functions above the limits."""
    lengths = {}
    for path, source in sources.items():
        if (length := len(source.splitlines())) > MAX_FILE_LINES:
            lengths[path] = length
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    lengths[f"{path}:{node.name}"] = length
    return lengths


def read(folder: str) -> dict[str, str]:
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    return {str(f.relative_to(REPOSITORY).as_posix()): f.read_text("utf-8") for f in files}


def test_the_tests_have_the_rooms_of_the_package():
    """Folders are rooms; a test module has a name of its own, and no other module imports it."""
    files = [path.split("/") for path in read("tests")]
    modules = [parts[-1] for parts in files if parts[-1].startswith("test_")]
    assert len(modules) == len(set(modules))
    folders = {parts[1] for parts in files if len(parts) > 2}
    assert folders - {*RANK, *ASIDE} == {"multiprocess"}
    for path, source in read("tests").items():
        for line, module, name in imported(path, source):
            parts = [*module.split("."), name]
            test = parts[0] == "tests" and any(part.startswith("test_") for part in parts)
            assert not test, (
                f"{path}:{line} imports a test module: shared cases are in tests/cases.py"
            )


def test_imports_of_the_package_point_down():
    sources = read("spmd")
    assert sources
    assert violations(sources) == []


def test_rooms_are_few_and_know_few_others():
    entries = {path.split("/")[1] for path in read("spmd")}
    assert len(entries) <= MAX_ENTRIES, sorted(entries)
    found = arrows(read("spmd"))
    assert len(found) <= MAX_ARROWS, sorted(found)


def test_no_public_class_name_is_defined_twice():
    twice = {name: files for name, files in public_classes(read("spmd")).items() if len(files) > 1}
    assert twice == {}


def test_files_and_functions_are_short():
    assert too_long(read("spmd")) == {}


@pytest.mark.parametrize(("name", "most"), [("classification", 60), ("language", 120)])
def test_a_task_is_short(name, most):
    assert len(read("spmd/tasks")[f"spmd/tasks/{name}.py"].splitlines()) <= most


def test_a_long_function_is_named():
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    source = f"def short():\n{body[10:]}\n\nclass A:\n    def long(self):\n{body.replace('    ', 8 * ' ')}"
    assert too_long({"spmd/a.py": source}) == {"spmd/a.py:long": MAX_FUNCTION_LINES + 1}
    assert too_long({"spmd/a.py": "x = 1\n" * 351}) == {"spmd/a.py": 351}


def test_docstrings_say_what_comes_out():
    """A first line begins with a verb or a noun, never with "Of", "What" or "One"."""
    bad = []
    for path, source in read("spmd").items():
        for node in ast.walk(ast.parse(source)):
            body = getattr(node, "body", None)
            for statement in body if isinstance(body, list) else ():
                value = statement.value if isinstance(statement, ast.Expr) else None
                text = value.value if isinstance(value, ast.Constant) else ""
                if isinstance(text, str) and text.split()[:1] in (["Of"], ["What"], ["One"]):
                    bad.append(f"{path}:{statement.lineno}: {text.splitlines()[0]}")
    assert not bad, "\n".join(bad)


def test_experiments_import_public_names_only():
    import spmd

    sources = read("experiments")
    assert sources
    assert violations(sources, set(spmd.__all__)) == []


CAUGHT = {
    "upward": ("spmd/core/tree.py", "from spmd.train import loop"),
    "upward, module by name": ("spmd/parallel/mesh.py", "import spmd.experiment"),
    "upward, relative": ("spmd/models/mlp.py", "from ..tasks import Task"),
    "sideways": ("spmd/data/loader.py", "from spmd.models import mlp"),
    "lazy": ("spmd/optim/base.py", "def build():\n    from spmd import train"),
    "lazy, by string": ("spmd/data/__init__.py", "importlib.import_module('spmd.models.mlp')"),
    "above the package": ("spmd/cli/train.py", "import run"),
    "through the root": ("spmd/weights/init.py", "from spmd import Experiment"),
    "root alone": ("spmd/weights/init.py", "import spmd"),
    "runtime above core": ("spmd/runtime/start.py", "from spmd.train import loop"),
    "launch beyond itself": ("spmd/launch/slurm.py", "from spmd.core import fields"),
    "launch beyond the library": ("spmd/launch/slurm.py", "import numpy as np"),
    "fields beyond the library": ("spmd/core/fields.py", "import jax"),
    "strategies and models": ("spmd/strategies/auto.py", "from spmd.models import mlp"),
    "strategies and data": ("spmd/strategies/base.py", "def f():\n    import spmd.data.loader"),
    "spec in a model": ("spmd/models/mlp.py", "from jax.sharding import PartitionSpec as P"),
    "spec by attribute": ("spmd/models/mlp.py", "x = jax.sharding.NamedSharding"),
    "jax.P": ("spmd/models/mlp.py", "import jax\nspec = jax.P('data')"),
    "mesh axes in a model": ("spmd/models/mlp.py", "from spmd.parallel.mesh import BATCH_AXES"),
    "unregistered file": ("spmd/gizmo.py", "import jax"),
    "unregistered target": ("spmd/cli/train.py", "from spmd import gizmo"),
    "inner name": ("experiments/digits.py", "from spmd.core.tree import digest"),
    "inner module": ("experiments/digits.py", "import spmd.analysis"),
    "private module": ("experiments/digits.py", "from spmd.models import _mlp"),
    "name not exported": ("experiments/digits.py", "from spmd import Hidden"),
}


@pytest.mark.parametrize("case", CAUGHT)
def test_the_checker_catches(case: str):
    path, source = CAUGHT[case]
    assert len(violations({path: source}, {"Experiment"})) == 1


ALLOWED = {
    "downward": (
        "spmd/train/loop.py",
        "from spmd.core import tree\nfrom spmd.parallel.mesh import make",
    ),
    "lazy downward": ("spmd/experiment/base.py", "def f():\n    from spmd.train import loop"),
    "own room": ("spmd/train/loop.py", "from spmd.train import metrics\nfrom . import evaluate"),
    "runtime on core": ("spmd/runtime/start.py", "from spmd.core import fields\nimport jax"),
    "launch on itself": ("spmd/launch/slurm.py", "import shlex\nfrom spmd.launch import base"),
    "specs in a strategy": (
        "spmd/strategies/auto.py",
        "from jax.sharding import PartitionSpec as P",
    ),
    "lazy root": ("spmd/__init__.py", "from spmd.cli import train"),
    "public names": ("experiments/digits.py", "import spmd\nfrom spmd import Experiment, models"),
    "config classes": ("experiments/digits.py", "from spmd.train import TrainConfig"),
    "public modules": ("experiments/digits.py", "import optax\nfrom spmd.models.mlp import MLP"),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_the_checker_allows(case: str):
    path, source = ALLOWED[case]
    assert violations({path: source}, {"Experiment"}) == []


def test_an_unregistered_module_is_told_where_to_go():
    (message,) = violations({"spmd/gizmo.py": ""})
    assert "ROOMS of tests/test_layering.py" in message
