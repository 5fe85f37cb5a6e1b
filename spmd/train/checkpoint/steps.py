"""The saved steps on disk: which there are, what their files must be, where bad ones go. Imports no jax."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from typing import Any

from etils import epath

from spmd.core.storage import is_remote, json_text, stamp, write_whole

MANIFEST = "manifest.json"
_ABOUT = "_CHECKPOINT_METADATA"  # Orbax's file with our custom metadata in it
_COMMITTED = "commit_success.txt"  # Orbax's last word in a bucket
_SMALL = 2**20  # files up to here are hashed; larger ones are array data, which the digests cover
_UNFINISHED = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|deleted)")
_STEP = re.compile(r"0|[1-9][0-9]*")  # as it is written: 0300 is a copy of somebody's
_NAME = re.compile(r"[\w.\-]+")


def safe(name: str) -> bool:
    """Whether a leaf's path name is plain: none that leads out of a directory, none that hides."""
    return all(_NAME.fullmatch(part) and part.strip(".") for part in name.split("/"))


def listed(directory: epath.Path) -> list[int]:
    """The complete steps of a directory of checkpoints, ascending."""
    if not directory.exists():
        return []
    found = [p for p in directory.iterdir() if _STEP.fullmatch(p.name)]
    if is_remote(directory):  # a bucket cannot rename: there a file says that all is written
        found = [p for p in found if (p / _COMMITTED).exists()]
    return sorted(int(p.name) for p in found)


def clean(directory: epath.Path) -> None:
    """Removes what killed or failed processes left unfinished."""
    if directory.exists():
        for path in directory.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                _remove(path)


def delete(directory: epath.Path, step: int) -> None:
    """Removes a step; killed amid it, no half of a step is left under its name."""
    path = directory / str(step)
    if is_remote(path):
        (path / _COMMITTED).unlink()
        _remove(path)
        return
    gone = directory / f"{step}.deleted"
    path.rename(gone)
    _remove(gone)


def _remove(path: epath.Path) -> None:
    """Tried again for a second, since a failed save's threads may still be writing, and at the next start."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            path.rmtree()
            return
        time.sleep(0.1)


def _files(path: epath.Path) -> dict[str, epath.Path]:
    """Every file below `path` but the manifest, by relative name."""
    found: dict[str, epath.Path] = {}
    for child in sorted(path.iterdir()):
        if child.is_dir():
            found |= {f"{child.name}/{name}": file for name, file in _files(child).items()}
        elif child.name not in (MANIFEST, f"{MANIFEST}.part"):
            found[child.name] = child
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _facts(file: epath.Path) -> dict[str, Any]:
    size, _ = stamp(file)
    return {"size": size} | ({"sha256": _sha256(file.read_bytes())} if size <= _SMALL else {})


def _seal(files: dict[str, Any]) -> str:
    return _sha256(json_text(files, sort_keys=True).encode())


def write_manifest(path: epath.Path) -> None:
    """Lists the files of a complete step, in the step."""
    files = {name: _facts(file) for name, file in _files(path).items()}
    text = json_text({"files": files, "sha256": _seal(files)}, indent=1) + "\n"
    write_whole(path / MANIFEST, text)


def sealed(path: epath.Path) -> bool:
    """Whether a step has a manifest; not when the process was killed right after saving."""
    return (path / MANIFEST).exists()


def check_manifest(path: epath.Path) -> str:
    """Differences from the manifest of a step; "" when there are none, or no manifest."""
    if not sealed(path):
        return ""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        expected, seal = {**manifest["files"]}, manifest["sha256"]
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is no manifest"
    if _seal(expected) != seal:
        return f"{MANIFEST} has been changed"
    found = _files(path)
    for name, facts in expected.items():
        if name not in found:
            return f"file {name} is missing"
        now = _facts(found[name])
        if now["size"] != facts["size"]:
            return f"file {name} has {now['size']} bytes instead of {facts['size']}"
        if now != facts:
            return f"file {name} has another sha256"
    extra = [name for name in found if name not in expected]
    return f"file {extra[0]} does not belong there" if extra else ""


def about(path: epath.Path) -> dict[str, Any]:
    """Metadata saved with the arrays of a step: its metrics, data position, configuration."""
    try:
        return {**json.loads((path / _ABOUT).read_bytes())["custom_metadata"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def size(path: epath.Path) -> int:
    """Bytes of a step."""
    return sum(stamp(file)[0] for file in _files(path).values())


def quarantine(directory: epath.Path, step: int, reason: str) -> str:
    """Moves a bad step to quarantine/ beside `directory`, with the reason; returns what became of it."""
    place = directory.parent / "quarantine"
    try:
        place.mkdir(exist_ok=True)
        names = [str(step), *(f"{step}.{n}" for n in range(1, 10_000))]
        to = next(place / name for name in names if not (place / name).exists())
        (directory / str(step)).rename(to)
        (to / "reason.txt").write_text(reason + "\n")
    except OSError as error:
        return f"left in place ({error.strerror or error})"
    return f"moved to {to}"


def quarantined(directory: epath.Path) -> dict[str, str]:
    """`{name: reason}` of what is in quarantine."""
    place = directory.parent / "quarantine"
    found: dict[str, str] = {}
    for path in sorted(place.iterdir()) if place.exists() else []:
        try:
            found[path.name] = (path / "reason.txt").read_text().strip()
        except OSError:
            found[path.name] = "(no reason.txt)"
    return found
