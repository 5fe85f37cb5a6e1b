"""The saved steps on disk: listing, manifests, quarantine of bad ones. Imports no jax."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from typing import Any

from etils import epath

from spmd.core.storage import is_remote, json_text, size_and_time, write_atomically

MANIFEST = "manifest.json"
_ABOUT = "_CHECKPOINT_METADATA"  # Orbax's file with our custom metadata in it
_COMMITTED = "commit_success.txt"  # the last file that Orbax writes in a bucket
_SMALL = 2**20  # bytes: files up to this size are hashed; larger ones are array data, with digests
_UNFINISHED = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|deleted)")
_STEP = re.compile(r"0|[1-9][0-9]*")  # as Orbax writes it: 0300 is a user's copy
_NAME = re.compile(r"[\w.\-]+")


def is_safe_name(name: str) -> bool:
    """Whether a leaf's path name can be a file name: no part leads out of the directory or is hidden."""
    return all(_NAME.fullmatch(part) and part.strip(".") for part in name.split("/"))


def list_steps(directory: epath.Path) -> list[int]:
    """The complete steps of a directory of checkpoints, ascending."""
    if not directory.exists():
        return []
    step_directories = [p for p in directory.iterdir() if _STEP.fullmatch(p.name)]
    if is_remote(directory):  # a bucket cannot rename: a file marks complete steps
        step_directories = [p for p in step_directories if (p / _COMMITTED).exists()]
    return sorted(int(p.name) for p in step_directories)


def remove_unfinished(directory: epath.Path) -> None:
    """Remove steps that killed or failed processes left unfinished."""
    if directory.exists():
        for path in directory.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                _remove(path)


def delete(directory: epath.Path, step: int) -> None:
    """Remove a step; a process killed meanwhile leaves no incomplete step under its name."""
    path = directory / str(step)
    if is_remote(path):
        (path / _COMMITTED).unlink()
        _remove(path)
        return
    doomed = directory / f"{step}.deleted"
    path.rename(doomed)
    _remove(doomed)


def _remove(path: epath.Path) -> None:
    """Remove a directory; tries for a second, since a failed save's threads may still be writing."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            path.rmtree()
            return
        time.sleep(0.1)


def _files(path: epath.Path) -> dict[str, epath.Path]:
    """Every file below `path` but the manifest, by relative name."""
    files: dict[str, epath.Path] = {}
    for child in sorted(path.iterdir()):
        if child.is_dir():
            files |= {f"{child.name}/{name}": file for name, file in _files(child).items()}
        elif child.name not in (MANIFEST, f"{MANIFEST}.part"):
            files[child.name] = child
    return files


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file_facts(file: epath.Path) -> dict[str, Any]:
    size, _ = size_and_time(file)
    return {"size": size} | ({"sha256": _sha256(file.read_bytes())} if size <= _SMALL else {})


def _seal(files: dict[str, Any]) -> str:
    return _sha256(json_text(files, sort_keys=True).encode())


def write_manifest(path: epath.Path) -> None:
    """Write a list of the files of a complete step into the step."""
    files = {name: _file_facts(file) for name, file in _files(path).items()}
    text = json_text({"files": files, "sha256": _seal(files)}, indent=1) + "\n"
    write_atomically(path / MANIFEST, text)


def has_manifest(path: epath.Path) -> bool:
    """Whether a step has a manifest; it has none if the process was killed right after saving."""
    return (path / MANIFEST).exists()


def check_manifest(path: epath.Path) -> str:
    """Differences from the manifest of a step; "" when there are none, or no manifest."""
    if not has_manifest(path):
        return ""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        expected, seal = {**manifest["files"]}, manifest["sha256"]
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is no manifest"
    if _seal(expected) != seal:
        return f"{MANIFEST} has been changed"
    files = _files(path)
    for name, facts in expected.items():
        if name not in files:
            return f"file {name} is missing"
        facts_now = _file_facts(files[name])
        if facts_now["size"] != facts["size"]:
            return f"file {name} has {facts_now['size']} bytes instead of {facts['size']}"
        if facts_now != facts:
            return f"file {name} has another sha256"
    extra = [name for name in files if name not in expected]
    return f"file {extra[0]} does not belong there" if extra else ""


def read_metadata(path: epath.Path) -> dict[str, Any]:
    """Metadata saved with the arrays of a step: its metrics, data position, configuration."""
    try:
        return {**json.loads((path / _ABOUT).read_bytes())["custom_metadata"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def num_bytes(path: epath.Path) -> int:
    """Bytes of a step."""
    return sum(size_and_time(file)[0] for file in _files(path).values())


def quarantine(directory: epath.Path, step: int, reason: str) -> str:
    """Move a bad step to quarantine/ beside `directory`, with the reason; returns a phrase that says so."""
    place = directory.parent / "quarantine"
    try:
        place.mkdir(exist_ok=True)
        names = [str(step), *(f"{step}.{n}" for n in range(1, 10_000))]
        target = next(place / name for name in names if not (place / name).exists())
        (directory / str(step)).rename(target)
        (target / "reason.txt").write_text(reason + "\n")
    except OSError as error:
        return f"left in place ({error.strerror or error})"
    return f"moved to {target}"


def list_quarantine(directory: epath.Path) -> dict[str, str]:
    """`{name: reason}` of the steps in quarantine."""
    place = directory.parent / "quarantine"
    reasons: dict[str, str] = {}
    for path in sorted(place.iterdir()) if place.exists() else []:
        try:
            reasons[path.name] = (path / "reason.txt").read_text().strip()
        except OSError:
            reasons[path.name] = "(no reason.txt)"
    return reasons
