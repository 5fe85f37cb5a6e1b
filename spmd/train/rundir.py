"""The run directory: one identity, its configuration, its summary."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from etils import epath

from spmd.storage import is_remote, ready, write_whole


def _write(path: epath.Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")


def locate(directory: str, name: str) -> epath.Path:
    """The run directory; a local path is made absolute (Orbax wants it), a bucket's stays as it is."""
    given = directory or f"runs/{name}"
    ready(given, "run.dir")
    return epath.Path(given if is_remote(given) else os.path.abspath(os.path.expanduser(given)))


def shown(path: epath.Path) -> str:
    """The path as a user would type it: relative where it lies in the working directory."""
    try:
        return str(path.relative_to(os.getcwd()))
    except ValueError:
        return str(path)


CONTENT = (
    "data.content."  # fields of the identity that are digests of the data: see spmd.train.dataset
)


class Refused(ValueError):
    """The directory holds something that this run must not touch."""


def claim(
    directory: str,
    name: str,
    config: dict[str, Any],
    identity: dict[str, Any],
    *,
    fresh: bool,
    defaults: Mapping[str, Any] | None = None,
    located: Collection[str] = (),
) -> epath.Path:
    """Opens the run directory, or creates it with its config.json; ValueError when it is another run's.

    config: the resolved configuration as JSON types. identity, defaults, located: as in same_identity.
    """
    path = locate(directory, name)
    with _reaching(path):
        if path.exists() and not path.is_dir():
            raise Refused(f"run directory {path} is a file; choose another with --run.dir")
        names = sorted(p.name for p in path.iterdir()) if path.exists() else []
    entries = [n for n in names if not n.endswith(".part")]  # of a process killed while writing
    known = path / "config.json"
    if entries and not known.exists():
        raise Refused(
            f"{path} is not empty and holds no run (no config.json; it has"
            f" {', '.join(entries[:3])}); choose another with --run.dir"
        )
    if entries and fresh and is_remote(path):
        raise Refused(
            f"{path} holds a run, and an object store cannot move it aside; choose another --run.dir"
        )
    if entries and fresh:
        aside = path.parent / f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"
        if aside.exists():
            raise Refused(f"{aside} exists already; try again in a second")
        path.rename(aside)
        print(f"moved the old run to {shown(aside)}")
    elif entries:
        same_identity(path, identity, defaults, located)
    if not is_remote(path):  # there are no directories there
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
    if not known.exists():
        record(path, name, config, identity)
    return path


def record(path: epath.Path, name: str, config: dict[str, Any], identity: dict[str, Any]) -> None:
    """Writes config.json: the identity, and the resolved configuration as JSON types."""
    with _writing(path):
        _write(path / "config.json", {"experiment": name, "identity": identity, "config": config})


@contextlib.contextmanager
def _reaching(path: epath.Path) -> Iterator[None]:
    """The first contact with an object store, whose client has errors of its own: no key, no right."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        said = str(error).strip().split("\n")[0] or type(error).__name__
        raise Refused(f"cannot reach run directory {path}: {said}") from None


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        missing = is_remote(path) and isinstance(error, FileNotFoundError)
        why = "there is no such bucket" if missing else error.strerror or error
        raise Refused(
            f"cannot write run directory {path}: {why}; choose another with --run.dir"
        ) from None


def read_identity(path: epath.Path) -> dict[str, Any]:
    """The identity that config.json holds; ValueError where it is none."""
    known = path / "config.json"
    try:
        return {**json.loads(known.read_text())["identity"]}
    except (ValueError, KeyError, TypeError):
        raise Refused(
            f"{known} is not a run's configuration; choose another directory with"
            " --run.dir, or move this one aside with --run.fresh"
        ) from None


def same_identity(
    path: epath.Path,
    identity: dict[str, Any],
    defaults: Mapping[str, Any] | None = None,
    located: Collection[str] = (),
) -> None:
    """ValueError with the differing fields when the directory's run is another one.

    identity: flat identity fields. defaults: what a field had that is newer than the directory. located:
    fields that only say where the data lies; they do not count where the directory knows its content, which
    spmd.train.dataset compares.
    """
    before = read_identity(path)
    passed = {k for k in {*before, *identity} if k.startswith(CONTENT)}
    if passed & before.keys():
        passed |= {*located}
    before = {k: v for k, v in before.items() if k not in passed}
    identity = {k: v for k, v in identity.items() if k not in passed}
    missing = "(absent)"
    now = json.loads(json.dumps(identity))
    newer = now.keys() - before.keys()
    before |= {k: v for k, v in json.loads(json.dumps(defaults or {})).items() if k in newer}
    diff = [
        f"  {k}: {before.get(k, missing)} -> {now.get(k, missing)}"
        for k in sorted({*before, *now})
        if before.get(k, missing) != now.get(k, missing)
    ]
    if diff:
        raise Refused(
            "\n".join(
                [
                    f"{path} holds a run of another identity (there -> now):",
                    *diff,
                    "use --run.dir DIR for a second run, or --run.fresh to move that one aside",
                ]
            )
        )


def summary(path: epath.Path) -> dict[str, Any] | None:
    """The summary of a finished run; None without one, or where it is torn."""
    file = path / "summary.json"
    if not file.exists():
        return None
    try:
        found = {**json.loads(file.read_text())}
        return found | {name: found[name] for name in ("steps", "metrics", "seconds")}
    except (ValueError, KeyError, TypeError):
        print(f"{shown(file)} cannot be read; it is written anew from the newest checkpoint")
        return None


def write_summary(path: epath.Path, value: dict[str, Any]) -> None:
    """Writes summary.json."""
    _write(path / "summary.json", value)


def lines(file: epath.Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines, none if there is no such file."""
    found: list[dict[str, Any]] = []
    for text in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError, TypeError):  # the torn last line of a killed process
            found.append({**json.loads(text)})
    return found
