"""Where things lie: caches, data sets, private directories, object stores. Standard library only."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import stat
from pathlib import Path
from typing import Any


def cache_root(given: str = "") -> str:
    """The cache directory: given, $SPMD_CACHE_DIR, $XDG_CACHE_HOME/spmd or ~/.cache/spmd."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.expanduser(
        given or os.environ.get("SPMD_CACHE_DIR") or os.path.join(base, "spmd")
    )


def data_root(given: str = "") -> str:
    """The TFDS data directory: given, $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    return os.path.expanduser(
        given or os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    )


def private(path: Path) -> str:
    """Creates a directory (mode 0700) for what will be run; says why it must not be trusted, or "".

    It must be this user's and writable by nobody else, or what lies in it may be another's code.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        folders = [folder.stat() for folder in path.resolve().parents]
    except OSError as error:
        return f"cannot be used ({error.strerror or error})"
    if not hasattr(os, "geteuid"):
        return ""  # Windows: the profile directory has its own rules
    if found.st_uid != os.geteuid():
        return f"belongs to another user (uid {found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"is writable by others (mode {stat.S_IMODE(found.st_mode):04o}; chmod 700 it)"
    if any(f.st_mode & stat.S_IWOTH and not f.st_mode & stat.S_ISVTX for f in folders):
        return "lies in a directory in which anyone may replace it"
    return ""


def is_remote(path: Any) -> bool:
    """Whether a path is in an object store: nothing there can be appended to or renamed."""
    return "://" in str(path)


def stamp(path: Any) -> tuple[int, float]:
    """(bytes, seconds since 1970 of the last change) of a file.

    epath's stat also looks up the owner's name, and raises where the user has none, as in many containers.
    """
    if is_remote(path):
        found = path.stat()
        return found.length, found.mtime
    found = os.stat(path)
    return found.st_size, found.st_mtime


def json_text(value: Any, **options: Any) -> str:
    """Strict JSON (RFC 8259), which has no NaN and no infinity: such a float becomes null.

    Everything that this package writes as JSON goes through here. options: as json.dumps takes them.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(without_nonfinite(value), allow_nan=False, **options)


def without_nonfinite(value: Any) -> Any:
    """JSON types in which None stands for each float that is not finite."""
    if isinstance(value, dict):
        return {key: without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def children(path: Any) -> list[Any]:
    """Entries of a directory, sorted by name; etils alone leaves out names that end in `~`."""
    if is_remote(path):
        return sorted(path.iterdir())
    return [path / name for name in sorted(os.listdir(path))]


def write_whole(path: Any, text: str) -> None:
    """Written beside and renamed, so that a killed process leaves the old file or the new one.

    An object is written whole or not at all.
    """
    if is_remote(path):
        path.write_text(text)
        return
    part = path.parent / (path.name + ".part")
    part.write_text(text)
    part.replace(path)


def ready(path: Any, field: str) -> None:
    """ValueError when `path` is in an object store that cannot be used here; field: who asks."""
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
