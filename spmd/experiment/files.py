"""Experiment files by name, without running them."""

from __future__ import annotations

from pathlib import Path

from spmd.core.fields import check, closest

PACKAGE = Path(__file__).parents[1]
# A wheel brings the experiments inside the package; in a checkout they stand beside it.
INSTALLED = PACKAGE / "experiments"
EXPERIMENTS = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "experiments"


def available() -> dict[str, Path]:
    """The experiments of the folder by name."""
    return {p.stem: p for p in sorted(EXPERIMENTS.glob("*.py")) if not p.stem.startswith("_")}


def summary_line(path: Path) -> str:
    """The first line of an experiment file's docstring, without running it."""
    import ast

    try:
        doc = ast.get_docstring(ast.parse(path.read_bytes()))
    except (SyntaxError, ValueError, OSError) as error:
        return f"(cannot be read: {error})"
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
    experiments, local_file = available(), Path(f"{name}.py")
    suggestion = (
        f" Did you mean {str(local_file)!r}?"
        if local_file.is_file()
        else closest(name, experiments)
    )
    check(
        name in experiments,
        f"unknown experiment {name!r}.{suggestion} Known: {', '.join(experiments)}; or give the path of a"
        " .py file with config()",
    )
    check(
        not local_file.is_file() or local_file.samefile(experiments[name]),
        f"{name!r} is {experiments[name]} and a file {local_file} in this directory: give the path of the"
        " one that is meant, with .py",
    )
    return experiments[name]
