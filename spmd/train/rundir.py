"""The run directory: one identity, its configuration, its summary."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from spmd.core import paths, values
from spmd.core.storage import check_usable, is_remote, json_text, list_directory, write_atomically
from spmd.train import lock, long_lists, renamed


def _write(path: epath.Path, value: Any) -> None:
    write_atomically(path, json_text(value, indent=1) + "\n")


def locate(directory: str, name: str) -> epath.Path:
    """The run directory; a local path is made absolute, as Orbax requires."""
    name_or_path = directory or f"runs/{name}"
    check_usable(name_or_path, "run.dir")
    path = (
        name_or_path
        if is_remote(name_or_path)
        else os.path.abspath(os.path.expanduser(name_or_path))
    )
    if reason := paths.why_unusable(path):
        raise Refused(f"run directory {path!a} {reason}; choose another with --run.dir")
    return epath.Path(path)


class Refused(ValueError):
    """The directory holds other content than this run, or cannot hold a run."""


def short_path(path: epath.Path) -> str:
    """The path as a user would type it: relative inside the working directory."""
    try:
        return str(path.relative_to(os.getcwd()))
    except ValueError:
        return str(path)


# Fields of the identity that are digests of the data: see spmd.train.dataset.
CONTENT = "data.content."
_LONG = 200  # characters of a difference that are shown as they are


def inspect(
    path: epath.Path,
    identity: dict[str, Any],
    *,
    fresh: bool,
    amend: bool = False,
    defaults: Mapping[str, Any] | None = None,
    located: Collection[str] = (),
) -> dict[str, list[Any]]:
    """Check that a run may begin or continue in `path`; reads only.

    Args:
      path: the run directory, which need not exist.
      identity, defaults, located: as in check_identity.
      fresh: an existing run will be moved aside.
      amend: its optimizer may have other settings; see AMENDABLE.

    Returns:
      `{field: [there, now]}`, the fields that are amended.

    Raises:
      Refused: the directory holds other content, or another run.
    """
    with _translate_errors(path):
        if path.exists() and not path.is_dir():
            raise Refused(f"run directory {path} is a file; choose another with --run.dir")
        names = [p.name for p in list_directory(path)] if path.exists() else []
    entries = [n for n in names if not _is_temporary(n)]
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
    return check_identity(path, identity, defaults, located, amend=amend)


def _is_temporary(name: str) -> bool:
    """Whether a file makes no run: the lock, lists beside config.json, what a killed process was writing."""
    return name in (*lock.FILES, long_lists.FILE) or name.endswith(".part")


def holds_run(path: epath.Path) -> bool:
    """Whether a directory holds a run."""
    return (path / "config.json").exists()


def move_aside(path: epath.Path) -> epath.Path:
    """Rename the run directory, with the time in its name; returns the new path."""
    base = f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    names = (base, *(f"{base}-{n}" for n in range(2, 1000)))
    target = next(path.parent / name for name in names if not (path.parent / name).exists())
    with translate_write_errors(path):
        path.rename(target)
    print(f"moved the old run to {short_path(target)}")
    return target


def create(path: epath.Path) -> None:
    """Create the run directory, except in an object store; Refused when that fails."""
    if not is_remote(path):
        with translate_write_errors(path):
            path.mkdir(parents=True, exist_ok=True)


def write_config(
    path: epath.Path,
    name: str,
    config: dict[str, Any],
    identity: dict[str, Any],
    amended: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write config.json, and its long lists beside it.

    Args:
      config: the resolved configuration as JSON types.
      identity: flat identity fields.
      amended: `{"step": ..., "changes": {field: [before, after]}}`, in their order.
    """
    lists: dict[str, Any] = {}
    short = [long_lists.separate(part, lists) for part in (identity, config)]
    text = {"experiment": name, "identity": short[0], "config": short[1]}
    with translate_write_errors(path):
        long_lists.write(path, lists)
        _write(path / "config.json", text | ({"amended": [*amended]} if amended else {}))


def read_config(path: epath.Path) -> dict[str, Any]:
    """Content of config.json, {} where it cannot be read."""
    try:
        return {**json.loads((path / "config.json").read_text())}
    except (OSError, ValueError, TypeError):
        return {}


@contextlib.contextmanager
def _translate_errors(path: epath.Path) -> Iterator[None]:
    """Raise Refused for the errors of an object store's client: no credentials, no permission."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise Refused(f"cannot reach run directory {path}: {reason}") from None


@contextlib.contextmanager
def translate_write_errors(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        missing = is_remote(path) and isinstance(error, FileNotFoundError)
        reason = "there is no such bucket" if missing else error.strerror or error
        raise Refused(
            f"cannot write run directory {path}: {reason}; choose another with --run.dir"
        ) from None


def read_identity(path: epath.Path) -> dict[str, Any]:
    """The identity in config.json; ValueError where there is none."""
    file = path / "config.json"
    try:
        return long_lists.restore(path, {**json.loads(file.read_text())["identity"]})
    except (ValueError, KeyError, TypeError):
        raise Refused(
            f"{file} is not a run's configuration; choose another directory with"
            " --run.dir, or move this one aside with --run.fresh"
        ) from None


# Fields that a run may change with --run.amend: none that determines shapes of the state.
AMENDABLE = "optimizer."
_FIXED = ("optimizer.class", "optimizer.ema", "optimizer.build", "optimizer.digest")
_GROUPS = "optimizer.groups"
_GROUP_AMENDABLE = ("rate", "decay", "learning_rate", "weight_decay")  # last part of a name


def check_identity(
    path: epath.Path,
    identity: dict[str, Any],
    defaults: Mapping[str, Any] | None = None,
    located: Collection[str] = (),
    *,
    amend: bool = False,
) -> dict[str, list[Any]]:
    """Compare the identity of the directory's run with `identity`.

    Args:
      identity: flat identity fields.
      defaults: values of fields that are newer than the directory.
      located: fields that name the location of data; they do not count where the directory has a digest of
        its content, which spmd.train.dataset compares.
      amend: allows other settings of the optimizer.

    Returns:
      `{field: [there, now]}`, the fields that are amended.

    Raises:
      Refused: with the differing fields, when it is another run.
    """
    diff = find_differences(read_identity(path), identity, defaults, located)
    amendable = {k for k in diff if _is_amendable(k)}
    if diff.keys() <= (amendable if amend else set()):
        return diff
    advice = ["use --run.dir DIR for a second run, or --run.fresh to move that one aside"]
    if amendable == diff.keys():
        advice.append(
            "or --run.amend to continue with these settings of the optimizer, from the newest checkpoint; the"
            " run records the change"
        )
    raise Refused(
        "\n".join(
            [
                f"{path} holds a run of another identity (recorded -> now):",
                *_difference_lines(diff),
                *advice,
            ]
        )
    )


def check_saved(
    path: epath.Path,
    about: Mapping[str, Any],
    identity: dict[str, Any],
    defaults: Mapping[str, Any] | None = None,
    located: Collection[str] = (),
    changes: Collection[str] = (),
) -> None:
    """Check that a checkpoint belongs to the run of its directory.

    Args:
      about: metadata saved with its arrays; older versions saved no identity.
      changes: fields that this start amends; earlier amendments are in config.json.

    Raises:
      Refused: with the differing fields, when another run saved it.
    """
    if not isinstance(saved := about.get("identity"), dict):
        return
    amended = {field for each in read_config(path).get("amended", ()) for field in each["changes"]}
    diff = find_differences(saved, identity, defaults, located)
    diff = {k: v for k, v in diff.items() if k not in amended | {*changes}}
    if diff:
        raise Refused(
            "\n".join(
                [
                    f"{path}: the checkpoint was saved by another run (recorded -> now):",
                    *_difference_lines(diff),
                    "another process has written into this directory; take the checkpoint away, or use"
                    " --run.fresh or another --run.dir",
                ]
            )
        )


def _is_amendable(name: str) -> bool:
    """Whether --run.amend may change an identity field."""
    if name.startswith(_GROUPS):
        return name.rpartition(".")[2] in _GROUP_AMENDABLE
    return name.startswith(AMENDABLE) and name not in _FIXED


def _difference_lines(diff: Mapping[str, Sequence[Any]]) -> list[str]:
    return [f"  {name}: {_change(before, now)}" for name, (before, now) in diff.items()]


def _change(before: Any, now: Any) -> str:
    """`before -> now`; of long lists, as of classes, the first elements that differ."""
    if len(whole := f"{before} -> {now}") <= _LONG:
        return whole
    if not (isinstance(before, list | tuple) and isinstance(now, list | tuple)):
        return f"{values.shorten(before)} -> {values.shorten(now)}"
    pairs = enumerate(itertools.zip_longest(before, now, fillvalue="none"), 1)
    number, first = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    old, new = map(values.shorten, first)
    return f"{len(before)} -> {len(now)} values; number {number}: {old} -> {new}"


def find_differences(
    before: Mapping[str, Any],
    identity: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    located: Collection[str] = (),
) -> dict[str, list[Any]]:
    """`{field: [before, now]}` of two identities; arguments as in check_identity."""
    before = renamed.update(before)
    ignored = {k for k in {*before, *identity} if k.startswith(CONTENT)}
    if ignored & before.keys():
        ignored |= {*located}
    earlier = {k: v for k, v in before.items() if k not in ignored}
    current = json.loads(json_text({k: v for k, v in identity.items() if k not in ignored}))
    newer = current.keys() - earlier.keys()
    earlier |= {k: v for k, v in json.loads(json_text(defaults or {})).items() if k in newer}
    missing = "(absent)"
    pairs = {
        k: [earlier.get(k, missing), current.get(k, missing)] for k in sorted({*earlier, *current})
    }
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}


def summary(path: epath.Path) -> dict[str, Any] | None:
    """The summary of a finished run; None without one, or where it is incomplete."""
    file = path / "summary.json"
    if not file.exists():
        return None
    try:
        content = {**json.loads(file.read_text())}
        return content | {name: content[name] for name in ("steps", "metrics", "seconds")}
    except (ValueError, KeyError, TypeError):
        print(f"{short_path(file)} cannot be read; it is written anew from the newest checkpoint")
        return None


def write_summary(path: epath.Path, value: dict[str, Any]) -> None:
    """Writes summary.json."""
    _write(path / "summary.json", value)


def read_lines(file: epath.Path) -> list[dict[str, Any]]:
    """The complete lines of a file of JSON lines; [] without the file."""
    lines: list[dict[str, Any]] = []
    for text in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError, TypeError):  # the torn last line of a killed process
            lines.append({**json.loads(text)})
    return lines
