"""The run directory: one identity, its configuration, its summary."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from spmd.core import paths
from spmd.core.storage import children, is_remote, json_text, ready, write_whole
from spmd.train import lock


def _write(path: epath.Path, value: Any) -> None:
    write_whole(path, json_text(value, indent=1) + "\n")


def locate(directory: str, name: str) -> epath.Path:
    """The run directory; a local path is made absolute (Orbax wants it), a bucket's stays as it is."""
    given = directory or f"runs/{name}"
    ready(given, "run.dir")
    path = given if is_remote(given) else os.path.abspath(os.path.expanduser(given))
    if why := paths.refused(path):
        raise Refused(f"run directory {path!a} {why}; choose another with --run.dir")
    return epath.Path(path)


class Refused(ValueError):
    """The directory holds something that this run must not touch, or can hold none."""


def shown(path: epath.Path) -> str:
    """The path as a user would type it: relative where it lies in the working directory."""
    try:
        return str(path.relative_to(os.getcwd()))
    except ValueError:
        return str(path)


# Fields of the identity that are digests of the data: see spmd.train.dataset.
CONTENT = "data.content."


def inspect(
    path: epath.Path,
    identity: dict[str, Any],
    *,
    fresh: bool,
    amend: bool = False,
    defaults: Mapping[str, Any] | None = None,
    located: Collection[str] = (),
) -> dict[str, list[Any]]:
    """Checks that a run may begin or go on in `path`; reads only.

    Args:
      path: the run directory, which need not exist.
      identity, defaults, located: as in same_identity.
      fresh: a run that is there will be moved aside.
      amend: its optimizer may be set otherwise; see AMENDABLE.

    Returns:
      `{field: [there, now]}`, the fields that are amended.

    Raises:
      Refused: the directory holds something else, or another run.
    """
    with _reaching(path):
        if path.exists() and not path.is_dir():
            raise Refused(f"run directory {path} is a file; choose another with --run.dir")
        names = [p.name for p in children(path)] if path.exists() else []
    entries = [n for n in names if not _passing(n)]
    if entries and "config.json" not in names:
        raise Refused(
            f"{path} is not empty and holds no run (no config.json; it has"
            f" {', '.join(entries[:3])}); choose another with --run.dir"
        )
    if entries and fresh and is_remote(path):
        raise Refused(
            f"{path} holds a run, and an object store cannot move it aside; choose another --run.dir"
        )
    if not entries or fresh:
        return {}
    return same_identity(path, identity, defaults, located, amend=amend)


def _passing(name: str) -> bool:
    """Whether a file is no part of a run: the lock, and what a killed process was writing."""
    return name in lock.FILES or name.endswith(".part")


def holds_run(path: epath.Path) -> bool:
    """Whether a directory holds a run."""
    return (path / "config.json").exists()


def move_aside(path: epath.Path) -> epath.Path:
    """Renames the run directory, with the time in its name; returns the new path."""
    base = f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    names = (base, *(f"{base}-{n}" for n in range(2, 1000)))
    aside = next(path.parent / name for name in names if not (path.parent / name).exists())
    with writing(path):
        path.rename(aside)
    print(f"moved the old run to {shown(aside)}")
    return aside


def create(path: epath.Path) -> None:
    """Creates the run directory where there are directories; Refused when it cannot be."""
    if not is_remote(path):
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)


def record(
    path: epath.Path,
    name: str,
    config: dict[str, Any],
    identity: dict[str, Any],
    amended: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes config.json.

    Args:
      config: the resolved configuration as JSON types.
      identity: flat identity fields.
      amended: `{"step": ..., "changes": {field: [before, after]}}`, in their order.
    """
    text = {"experiment": name, "identity": identity, "config": config}
    with writing(path):
        _write(path / "config.json", text | ({"amended": [*amended]} if amended else {}))


def recorded(path: epath.Path) -> dict[str, Any]:
    """Content of config.json, {} where it cannot be read."""
    try:
        return {**json.loads((path / "config.json").read_text())}
    except (OSError, ValueError, TypeError):
        return {}


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
def writing(path: epath.Path) -> Iterator[None]:
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


# What a run may change on the way, with --run.amend: nothing that the shapes of the state depend on.
AMENDABLE = "optimizer."
_FIXED = ("optimizer.class", "optimizer.ema")


def same_identity(
    path: epath.Path,
    identity: dict[str, Any],
    defaults: Mapping[str, Any] | None = None,
    located: Collection[str] = (),
    *,
    amend: bool = False,
) -> dict[str, list[Any]]:
    """Compares the identity of the directory's run with this one's.

    Args:
      identity: flat identity fields.
      defaults: what a field had that is newer than the directory.
      located: fields that only say where the data lies; they do not count where the directory knows its
        content, which spmd.train.dataset compares.
      amend: allows another setting of the optimizer.

    Returns:
      `{field: [there, now]}`, the fields that are amended.

    Raises:
      Refused: with the differing fields, when it is another run.
    """
    diff = differences(read_identity(path), identity, defaults, located)
    amendable = {k for k in diff if k.startswith(AMENDABLE) and k not in _FIXED}
    if diff.keys() <= (amendable if amend else set()):
        return diff
    advice = ["use --run.dir DIR for a second run, or --run.fresh to move that one aside"]
    if amendable == diff.keys():
        advice.append(
            "or --run.amend to go on with the optimizer set so, from the newest checkpoint; the run records"
            " the change"
        )
    raise Refused(
        "\n".join(
            [f"{path} holds a run of another identity (there -> now):", *_shown(diff), *advice]
        )
    )


def same_saved(
    path: epath.Path,
    about: Mapping[str, Any],
    identity: dict[str, Any],
    defaults: Mapping[str, Any] | None = None,
    located: Collection[str] = (),
    changes: Collection[str] = (),
) -> None:
    """Checks that a checkpoint belongs to the run of its directory.

    Args:
      about: what was saved beside its arrays; older versions saved no identity.
      changes: fields that this start amends; those amended before are in config.json.

    Raises:
      Refused: with the differing fields, when another run saved it.
    """
    if not isinstance(saved := about.get("identity"), dict):
        return
    amended = {field for each in recorded(path).get("amended", ()) for field in each["changes"]}
    diff = differences(saved, identity, defaults, located)
    diff = {k: v for k, v in diff.items() if k not in amended | {*changes}}
    if diff:
        raise Refused(
            "\n".join(
                [
                    f"{path}: the checkpoint was saved by another run (there -> now):",
                    *_shown(diff),
                    "another process has written into this directory; take the checkpoint away, or use"
                    " --run.fresh or another --run.dir",
                ]
            )
        )


def _shown(diff: Mapping[str, Sequence[Any]]) -> list[str]:
    return [f"  {k}: {there} -> {now}" for k, (there, now) in diff.items()]


def differences(
    before: Mapping[str, Any],
    identity: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    located: Collection[str] = (),
) -> dict[str, list[Any]]:
    """`{field: [before, now]}` of two identities; arguments as in same_identity."""
    passed = {k for k in {*before, *identity} if k.startswith(CONTENT)}
    if passed & before.keys():
        passed |= {*located}
    then = {k: v for k, v in before.items() if k not in passed}
    now = json.loads(json_text({k: v for k, v in identity.items() if k not in passed}))
    newer = now.keys() - then.keys()
    then |= {k: v for k, v in json.loads(json_text(defaults or {})).items() if k in newer}
    missing = "(absent)"
    pairs = {k: [then.get(k, missing), now.get(k, missing)] for k in sorted({*then, *now})}
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}


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
