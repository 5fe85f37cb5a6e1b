"""Files of data sets, on disk or in a bucket (gs://): listed, matched, read."""

from __future__ import annotations

import functools
import glob
import importlib
import os
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from spmd.core.fields import check
from spmd.core.storage import check_usable, is_remote

_AT_ONCE = 32  # requests to a bucket at the same time: each waits for the network


class File(NamedTuple):
    """A file below a folder. name: relative to it, with /. path: as it is opened. size: bytes."""

    name: str
    path: str
    size: int


@functools.cache
def bucket() -> Any:
    """The client of Cloud Storage; check_usable has been called."""
    return importlib.import_module("gcsfs").GCSFileSystem()


@functools.cache
def _requests() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="bucket")


def locate(path: str, option: str) -> str:
    """The path, absolute where it is local; ValueError, naming the option, where nothing is there."""
    check(bool(path), f"{option} is empty; give a path, --{option.replace('_', '-')} PATH")
    check_usable(path, option)
    if is_remote(path):
        check(bucket().exists(path), f"{option}={path!r}: there is nothing in the bucket")
        return path.rstrip("/")
    absolute = os.path.abspath(os.path.expanduser(path))
    check(
        os.path.exists(absolute),
        f"{option}={path!r} does not exist (looked from {os.getcwd()}); give another path",
    )
    return absolute


def is_folder(path: str) -> bool:
    """Whether a path is a folder."""
    return bucket().isdir(path) if is_remote(path) else os.path.isdir(path)


def subfolders(path: str) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones are left out."""
    if is_remote(path):
        entries = bucket().ls(path, detail=True)
        names = [posixpath.basename(e["name"].rstrip("/")) for e in entries if e["type"] != "file"]
    else:
        names = [entry.name for entry in os.scandir(path) if entry.is_dir()]
    return sorted(name for name in names if name and not name.startswith((".", "__")))


def below(root: str, suffixes: Sequence[str]) -> list[File]:
    """The files of these suffixes below a folder, sorted by name; hidden files and folders are left out."""
    listed = _below_remote(root) if is_remote(root) else _below_local(root, "")
    kept = [f for f in listed if f.name.lower().endswith(tuple(suffixes))]
    return sorted(kept)


def _below_local(folder: str, prefix: str) -> list[File]:
    listed: list[File] = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            listed += _below_local(entry.path, f"{prefix}{entry.name}/")
        else:
            listed.append(File(prefix + entry.name, entry.path, entry.stat().st_size))
    return listed


def _below_remote(root: str) -> list[File]:
    base = root.partition("://")[2].rstrip("/") + "/"
    infos = bucket().find(root, detail=True)
    names = {path: path.removeprefix(base) for path in infos}
    return [
        File(name, f"gs://{path}", int(infos[path]["size"]))
        for path, name in names.items()
        if not any(part.startswith(".") for part in name.split("/"))
    ]


def matching(patterns: Sequence[str], option: str, suffixes: Sequence[str] = ()) -> list[str]:
    """The files that globs match, or those of these suffixes in folders: each once, in order.

    Raises:
      ValueError: a pattern matches none; names the option.
    """
    check(bool(patterns), f"{option} is empty; give files, globs in quotes, or a folder")
    matched: dict[str, None] = {}
    for pattern in patterns:
        check_usable(pattern, option)
        if is_remote(pattern):
            paths = [f"gs://{p}" for p in sorted(bucket().glob(pattern))]
            if len(paths) == 1 and is_folder(paths[0]):
                paths = [f.path for f in below(paths[0], suffixes)]
        else:
            path = os.path.abspath(os.path.expanduser(pattern))
            if os.path.isdir(path):
                paths = [f.path for f in below(path, suffixes)]
            else:
                names = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
                paths = [p for p in names if os.path.isfile(p)]
        kinds = f" of {', '.join(suffixes)}" if suffixes else ""
        check(
            bool(paths),
            f"no file{kinds} matches {option}={pattern!r} (looked from {os.getcwd()}); give files, globs in"
            " quotes, or a folder",
        )
        matched |= dict.fromkeys(paths)
    return list(matched)


def read(path: str) -> bytes:
    """The bytes of a file; ValueError where it cannot be read."""
    try:
        if is_remote(path):
            return bucket().cat_file(path)
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None


def read_part(path: str, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start` on; ValueError where it cannot be read."""
    try:
        if is_remote(path):
            data = bucket().cat_file(path, start=start, end=start + size)
        else:
            with open(path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, start)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    check(len(data) == size, f"{path} ends before byte {start + size}: it is cut off; copy it anew")
    return data


def read_parts(parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Several parts (path, start, size) of files: those of a bucket at the same time."""
    if parts and is_remote(parts[0][0]):
        return list(_requests().map(lambda part: read_part(*part), parts))
    return [read_part(*part) for part in parts]


def opened(path: str) -> Any:
    """A file to read and seek in; ValueError where it cannot be opened."""
    try:
        return bucket().open(path) if is_remote(path) else open(path, "rb")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None


def read_all(paths: Sequence[str]) -> list[bytes]:
    """The bytes of several files: those of a bucket at the same time."""
    if paths and is_remote(paths[0]):
        return list(_requests().map(read, paths))
    return [read(path) for path in paths]
