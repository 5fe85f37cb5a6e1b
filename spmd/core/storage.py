"""Locations and files: caches, data sets, private directories, object stores. Standard library only."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import stat
from pathlib import Path
from typing import Any


def cache_root(directory: str = "") -> str:
    """The cache directory: `directory`, $SPMD_CACHE_DIR, $XDG_CACHE_HOME/spmd or ~/.cache/spmd."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.expanduser(
        directory or os.environ.get("SPMD_CACHE_DIR") or os.path.join(base, "spmd")
    )


def data_root(directory: str = "") -> str:
    """The TFDS data directory: `directory`, $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    return os.path.expanduser(
        directory or os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    )


def make_private(path: Path) -> str:
    """Create a directory (mode 0700) for programs that will be executed.

    Returns why it must not be trusted, or "": it must belong to this user and be writable by nobody else,
    since its contents could be another user's code.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        folders = [folder.stat() for folder in path.resolve().parents]
    except OSError as error:
        return f"cannot be used ({error.strerror or error})"
    if not hasattr(os, "geteuid"):
        return ""  # Windows: the profile directory has its own rules
    if status.st_uid != os.geteuid():
        return f"belongs to another user (uid {status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"is writable by others (mode {stat.S_IMODE(status.st_mode):04o}; chmod 700 it)"
    if any(f.st_mode & stat.S_IWOTH and not f.st_mode & stat.S_ISVTX for f in folders):
        return "is in a directory in which anyone may replace it"
    return ""


def is_remote(path: Any) -> bool:
    """Whether a path is in an object store: nothing there can be appended to or renamed."""
    return "://" in str(path)


def size_and_time(path: Any) -> tuple[int, float]:
    """(bytes, seconds since 1970 of the last change) of a file.

    epath's stat also looks up the owner's name, and raises where the user has none, as in many containers.
    """
    if is_remote(path):
        status = path.stat()
        return status.length, status.mtime
    status = os.stat(path)
    return status.st_size, status.st_mtime


def json_text(value: Any, **options: Any) -> str:
    """Strict JSON (RFC 8259), which has no NaN and no infinity: such a float becomes null.

    Everything that this package writes as JSON goes through here. options: as json.dumps takes them.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(without_nonfinite(value), allow_nan=False, **options)


def without_nonfinite(value: Any) -> Any:
    """JSON types, with None for each float that is not finite."""
    if isinstance(value, dict):
        return {key: without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def list_directory(path: Any) -> list[Any]:
    """Entries of a directory, sorted by name, those that end in `~` included (etils leaves them out)."""
    if is_remote(path):
        return sorted(path.iterdir())
    return [path / name for name in sorted(os.listdir(path))]


def write_atomically(path: Any, text: str) -> None:
    """Write a file under another name and rename it: a killed process leaves the old or the new one.

    Writes to an object store are atomic by themselves.
    """
    if is_remote(path):
        path.write_text(text)
        return
    part = path.parent / (path.name + ".part")
    part.write_text(text)
    part.replace(path)


def check_usable(path: Any, field: str) -> None:
    """ValueError when `path` is in an object store that cannot be used; field: its name in the message."""
    if not is_remote(path):
        return
    if not str(path).startswith("gs://"):
        raise ValueError(f"{field}={str(path)!r}: give a local directory or gs://bucket/dir")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(
            f"{field}={str(path)!r} needs a package that is not installed: pip install gcsfs"
        )
    # Every failure is raised too; the client would print it first, with its traceback.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
