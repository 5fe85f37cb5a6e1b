"""Fingerprints of data, independent of where it is stored and which glob names it.

The fingerprint of a file is its name relative to the data's directory, its size, and a digest of its first
and last MiB; that of an object in a bucket its generation; that of arrays their bytes. A source that does not
describe its content is identified by its length, its features and a sample of its examples.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spmd.core.fields import check
from spmd.core.storage import cache_root, check_usable, is_remote, json_text, write_atomically

EDGE = 2**20  # bytes read from either end of a file
ARRAY = 64 * EDGE  # arrays up to this size are hashed completely
SAMPLE = 64  # examples hashed of a source that does not describe its content
_REMEMBER = 256 * EDGE  # digests of at least so many bytes are kept on disk
_THREADS = 16


class Entry(NamedTuple):
    """A part of a data set: a file, or a feature of arrays. name: relative to the set's root. size: bytes."""

    name: str
    size: int
    digest: str


Content = list[Entry]  # in the order of reading
Parts = dict[str, Content]  # "train", "eval" and, for a text, "tokenizer"


def describe(data: Any, sources: Mapping[str, Callable[[], Any]]) -> Parts:
    """The content of each split that `opened` names, and of the tokenizer where `data` has one.

    sources: split -> () -> its source, called only where the content cannot be described without it.
    """
    # A class that overrides `open` but not `content` reads other data than its base describes.
    order = type(data).__mro__
    depths = {name: next(i for i, c in enumerate(order) if name in vars(c)) for name in _PAIR}
    read_content = type(data).content
    if depths["content"] > depths["open"]:
        read_content = lambda data, split, source: describe_source(source())
    parts = {split: read_content(data, split, source) for split, source in sources.items()}
    tokenizer = data.tokenizer_content()
    return parts | ({"tokenizer": tokenizer} if tokenizer else {})


_PAIR = ("content", "open")


def digest_content(content: Content) -> str:
    """Digest of a content, as hex."""
    return hashlib.sha256(json_text(content).encode("utf-8", "surrogatepass")).hexdigest()[:32]


# ---- files


def describe_files(paths: Sequence[str], cache_dir: str = "") -> Content:
    """The content of files, in this order; names are relative to their common directory.

    paths: of one disk, or of one bucket (gs://). cache_dir: where digests of large sets are kept.
    """
    if any(map(is_remote, paths)):
        return _describe_objects(paths)
    paths = [os.path.abspath(p) for p in paths]
    digests = _digests(paths, cache_dir)
    root = os.path.commonpath([os.path.dirname(p) for p in paths]) if paths else ""
    names = [os.path.relpath(p, root).replace(os.sep, "/") for p in paths]
    return [Entry(n, *digest) for n, digest in zip(names, digests, strict=True)]


_MEMORY: dict[str, tuple[list[int], str]] = {}  # path -> (stamp, digest) of this process


def _digests(paths: Sequence[str], cache_dir: str) -> list[tuple[int, str]]:
    """(size, digest) of each file; read only where a file has changed since the last call."""
    stamps = _map_in_threads(_file_stamp, paths)
    new = [i for i, p in enumerate(paths) if _MEMORY.get(p, ([],))[0] != stamps[i]]
    num_bytes = sum(min(stamps[i][0], 2 * EDGE) for i in new)
    file = _memory_file(paths, cache_dir) if num_bytes >= _REMEMBER else None
    if file is not None:
        _MEMORY.update(_load_digests(file))
        new = [i for i in new if _MEMORY.get(paths[i], ([],))[0] != stamps[i]]
    digests = _map_in_threads(lambda i: _digest_ends(str(paths[i]), stamps[i][0]), new)
    _MEMORY.update({paths[i]: (stamps[i], d) for i, d in zip(new, digests, strict=True)})
    if file is not None and new:
        _save_digests(file, {p: _MEMORY[p] for p in paths})
    return [(s[0], _MEMORY[p][1]) for p, s in zip(paths, stamps, strict=True)]


def _map_in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`function` of each item, in threads: files may be on a network."""
    parts = [items[i : i + 32] for i in range(0, len(items), 32)]
    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(lambda part: [function(item) for item in part], parts)
        return [x for part in results for x in part]


def _file_stamp(path: str) -> list[int]:
    """Size, times and inode of a file: values that change when it does."""
    try:
        s = os.stat(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]


def _digest_ends(path: str, size: int) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            if size <= 2 * EDGE:
                return hashlib.sha256(file.read()).hexdigest()[:32]
            digest = hashlib.sha256(file.read(EDGE))
            file.seek(size - EDGE)
            digest.update(file.read(EDGE))
            return digest.hexdigest()[:32]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _memory_file(paths: Sequence[str], cache_dir: str) -> Path:
    key = hashlib.sha256("\n".join(paths).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return Path(cache_root(cache_dir)) / "content" / f"{key}.json"


def _load_digests(file: Path) -> dict[str, tuple[list[int], str]]:
    try:
        return {p: (stamp, str(d)) for p, (stamp, d) in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _save_digests(file: Path, digests: Mapping[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json_text(digests))
    except (OSError, ValueError):  # only the next start is slower
        pass


def _describe_objects(paths: Sequence[str]) -> Content:
    import importlib

    check(all(map(is_remote, paths)), "files on disk and in a bucket do not make one data set")
    check_usable(paths[0], "data.files")
    store: Any = importlib.import_module("gcsfs").GCSFileSystem()
    infos = _map_in_threads(store.info, paths)
    names = [p.partition("://")[2] for p in paths]
    root = posixpath.commonpath([posixpath.dirname(n) for n in names])
    return [
        Entry(posixpath.relpath(n, root), int(x["size"]), f"generation {x['generation']}")
        for n, x in zip(names, infos, strict=True)
    ]


# ---- arrays and sources


def describe_arrays(arrays: Mapping[str, Any]) -> Content:
    """The content of arrays with a common first dim: all bytes; of large ones both ends and some rows."""
    content = []
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest = hashlib.sha256(repr((array.dtype.str, array.shape)).encode())
        if array.nbytes <= ARRAY:
            _hash_array(digest, array)
        else:
            edge = max(EDGE * len(array) // array.nbytes, 1)
            rows = np.linspace(0, len(array) - 1, 4096).astype(np.int64)
            for part in (array[:edge], array[-edge:], array[rows]):
                _hash_array(digest, part)
        content.append(Entry(name, array.nbytes, digest.hexdigest()[:32]))
    return content


def describe_source(source: Any) -> Content:
    """The content of a source that does not describe it: its length, and evenly spaced examples.

    Examples that differ when they are read twice count with their shapes and types only.
    """
    num = len(source)
    if not num:
        return [Entry("examples", 0, "")]
    indices = np.unique(np.linspace(0, num - 1, min(num, SAMPLE)).astype(np.int64))
    first, second = (_digest_sample(source, indices) for _ in range(2))
    if first != second:
        first = {name: x[0] for name, x in first.items()}
    return [
        Entry(name, num, hashlib.sha256(repr(x).encode()).hexdigest()[:32])
        for name, x in sorted(first.items())
    ]


def _digest_sample(source: Any, indices: np.ndarray) -> dict[str, Any]:
    try:
        batch = source.take(indices)
    except Exception:  # a bad record, which the loader reports or skips
        return _digest_singly(source, indices) if len(indices) > 1 else {}
    digests = {}
    for name, value in batch.items():
        if isinstance(value, list):  # of bytes
            digests[name] = (len(value), hashlib.sha256(repr(value).encode()).hexdigest())
            continue
        bits = hashlib.sha256()
        _hash_array(bits, np.asarray(value))
        digests[name] = ((str(value.dtype), value.shape), bits.hexdigest())
    return digests


def _digest_singly(source: Any, indices: np.ndarray) -> dict[str, Any]:
    return {"examples": [_digest_sample(source, indices[i : i + 1]) for i in range(len(indices))]}


def _hash_array(digest: Any, array: np.ndarray) -> None:
    if array.dtype.hasobject:
        digest.update(repr(array.tolist()).encode("utf-8", "surrogatepass"))
    elif array.size:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


# ---- differences


def describe_difference(old: Iterable[Sequence[Any]], new: Iterable[Sequence[Any]]) -> list[str]:
    """Lines that name the files added, missing, changed, renamed or reordered."""
    before, after = ([Entry(*e) for e in content] for content in (old, new))
    removed_counts = collections.Counter(e[1:] for e in before) - collections.Counter(
        e[1:] for e in after
    )
    added_counts = collections.Counter(e[1:] for e in after) - collections.Counter(
        e[1:] for e in before
    )
    removed = {e.name: e for e in before if e[1:] in removed_counts and e not in after}
    added = {e.name: e for e in after if e[1:] in added_counts and e not in before}
    changed = [n for n in removed if n in added]
    kinds = {
        "added": [_with_size(e) for n, e in added.items() if n not in changed],
        "missing": [_with_size(e) for n, e in removed.items() if n not in changed],
        "changed": [
            n
            + (
                f" ({removed[n].size} -> {added[n].size} bytes)"
                if removed[n].size != added[n].size
                else ""
            )
            for n in changed
        ],
    }
    if not any(kinds.values()):  # the same files under other names, or in another order
        pairs = list(zip(before, after, strict=False))
        names = {e.name for e in before}
        kinds = {
            "in another order": [b.name for a, b in pairs if a != b and b in before],
            "changed": [e.name for e in after if e.name in names and e not in before],
            "renamed": [f"{a.name} -> {b.name}" for a, b in pairs if b.name not in names],
        }
    return [f"  {kind}: {_shorten_list(names)}" for kind, names in kinds.items() if names]


def _with_size(entry: Entry) -> str:
    return f"{entry.name} ({entry.size} bytes)" if entry.size else entry.name


def _shorten_list(names: Sequence[str]) -> str:
    suffix = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + suffix
