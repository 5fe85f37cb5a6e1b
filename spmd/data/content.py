"""Fingerprints of data: what its content is known by, wherever it is stored and whatever glob names it.

A file is known by its name relative to the data's own directory, its size, and a digest of its first and
last MiB; an object in a bucket by its generation. Arrays are known by their bytes. A source that says nothing
of its content is known by its length, its features and a sample of its examples.
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
from spmd.core.storage import cache_root, is_remote, json_text, ready, write_whole

EDGE = 2**20  # bytes read from either end of a file
ARRAY = 64 * EDGE  # arrays up to this size are hashed completely
SAMPLE = 64  # examples hashed of a source that says nothing of its content
_REMEMBER = 256 * EDGE  # from so many bytes read on, digests are kept on disk
_THREADS = 16


class Entry(NamedTuple):
    """A part of a data set: a file, or a feature of arrays. name: relative to the set's root. size: bytes."""

    name: str
    size: int
    digest: str


Content = list[Entry]  # in the order of reading
Parts = dict[str, Content]  # "train", "eval" and, for a text, "tokenizer"


def of(data: Any, opened: Mapping[str, Callable[[], Any]]) -> Parts:
    """The content of each split that `opened` names, and of the tokenizer where `data` has one.

    opened: split -> () -> its source, called only where the content is not known without it.
    """
    # A class that overrides `open` alone reads something else than its base describes.
    order = type(data).__mro__
    defined = {name: next(i for i, c in enumerate(order) if name in vars(c)) for name in _PAIR}
    describe = type(data).content
    if defined["content"] > defined["open"]:
        describe = lambda data, split, source: of_source(source())
    parts = {split: describe(data, split, source) for split, source in opened.items()}
    tokenizer = data.tokenizer_content()
    return parts | ({"tokenizer": tokenizer} if tokenizer else {})


_PAIR = ("content", "open")


def digest(content: Content) -> str:
    """Digest of a content, as hex."""
    return hashlib.sha256(json_text(content).encode("utf-8", "surrogatepass")).hexdigest()[:32]


# ---- files


def of_files(paths: Sequence[str], cache_dir: str = "") -> Content:
    """The content of files, in this order; names are relative to the directory that they have in common.

    paths: of one disk, or of one bucket (gs://). cache_dir: where digests of large sets are remembered.
    """
    if any(map(is_remote, paths)):
        return _of_objects(paths)
    paths = [os.path.abspath(p) for p in paths]
    found = _digests(paths, cache_dir)
    root = os.path.commonpath([os.path.dirname(p) for p in paths]) if paths else ""
    names = [os.path.relpath(p, root).replace(os.sep, "/") for p in paths]
    return [Entry(n, *known) for n, known in zip(names, found, strict=True)]


_known: dict[str, tuple[list[int], str]] = {}  # path -> (stamp, digest) of this process


def _digests(paths: Sequence[str], cache_dir: str) -> list[tuple[int, str]]:
    """(size, digest) of each file; read again only where a file was touched since."""
    stamps = _each(_stamp, paths)
    new = [i for i, p in enumerate(paths) if _known.get(p, ([],))[0] != stamps[i]]
    num_bytes = sum(min(stamps[i][0], 2 * EDGE) for i in new)
    file = _memory(paths, cache_dir) if num_bytes >= _REMEMBER else None
    if file is not None:
        _known.update(_remembered(file))
        new = [i for i in new if _known.get(paths[i], ([],))[0] != stamps[i]]
    read = _each(lambda i: _ends(str(paths[i]), stamps[i][0]), new)
    _known.update({paths[i]: (stamps[i], d) for i, d in zip(new, read, strict=True)})
    if file is not None and new:
        _remember(file, {p: _known[p] for p in paths})
    return [(s[0], _known[p][1]) for p, s in zip(paths, stamps, strict=True)]


def _each(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`function` of each item, in threads: files may be far away."""
    parts = [items[i : i + 32] for i in range(0, len(items), 32)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda part: [function(item) for item in part], parts)
        return [x for part in found for x in part]


def _stamp(path: str) -> list[int]:
    """Size, times and inode of a file: values that change when it does."""
    try:
        s = os.stat(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]


def _ends(path: str, size: int) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            if size <= 2 * EDGE:
                return hashlib.sha256(file.read()).hexdigest()[:32]
            found = hashlib.sha256(file.read(EDGE))
            file.seek(size - EDGE)
            found.update(file.read(EDGE))
            return found.hexdigest()[:32]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _memory(paths: Sequence[str], cache_dir: str) -> Path:
    key = hashlib.sha256("\n".join(paths).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return Path(cache_root(cache_dir)) / "content" / f"{key}.json"


def _remembered(file: Path) -> dict[str, tuple[list[int], str]]:
    try:
        return {p: (stamp, str(d)) for p, (stamp, d) in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(file: Path, known: Mapping[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json_text(known))
    except (OSError, ValueError):  # only slower the next time
        pass


def _of_objects(paths: Sequence[str]) -> Content:
    import importlib

    check(all(map(is_remote, paths)), "files on disk and in a bucket do not make one data set")
    ready(paths[0], "data.files")
    store: Any = importlib.import_module("gcsfs").GCSFileSystem()
    found = _each(store.info, paths)
    names = [p.partition("://")[2] for p in paths]
    root = posixpath.commonpath([posixpath.dirname(n) for n in names])
    return [
        Entry(posixpath.relpath(n, root), int(x["size"]), f"generation {x['generation']}")
        for n, x in zip(names, found, strict=True)
    ]


# ---- arrays and sources


def of_arrays(arrays: Mapping[str, Any]) -> Content:
    """The content of arrays with a common first dim: all bytes; of large ones both ends, and rows between."""
    content = []
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        found = hashlib.sha256(repr((array.dtype.str, array.shape)).encode())
        if array.nbytes <= ARRAY:
            _update(found, array)
        else:
            edge = max(EDGE * len(array) // array.nbytes, 1)
            between = np.linspace(0, len(array) - 1, 4096).astype(np.int64)
            for part in (array[:edge], array[-edge:], array[between]):
                _update(found, part)
        content.append(Entry(name, array.nbytes, found.hexdigest()[:32]))
    return content


def of_source(source: Any) -> Content:
    """The content of a source that says nothing of it: its length, and a sample of examples over all of it.

    Examples that differ when they are read twice count with their shapes and types alone.
    """
    num = len(source)
    if not num:
        return [Entry("examples", 0, "")]
    at = np.unique(np.linspace(0, num - 1, min(num, SAMPLE)).astype(np.int64))
    first, again = (_sampled(source, at) for _ in range(2))
    if first != again:
        first = {name: x[0] for name, x in first.items()}
    return [
        Entry(name, num, hashlib.sha256(repr(x).encode()).hexdigest()[:32])
        for name, x in sorted(first.items())
    ]


def _sampled(source: Any, at: np.ndarray) -> dict[str, Any]:
    try:
        taken = source.take(at)
    except Exception:  # a bad record: the loader names it, or lets it pass
        return _singly(source, at) if len(at) > 1 else {}
    found = {}
    for name, value in taken.items():
        if isinstance(value, list):  # of bytes
            found[name] = (len(value), hashlib.sha256(repr(value).encode()).hexdigest())
            continue
        bits = hashlib.sha256()
        _update(bits, np.asarray(value))
        found[name] = ((str(value.dtype), value.shape), bits.hexdigest())
    return found


def _singly(source: Any, at: np.ndarray) -> dict[str, Any]:
    return {"examples": [_sampled(source, at[i : i + 1]) for i in range(len(at))]}


def _update(found: Any, array: np.ndarray) -> None:
    if array.dtype.hasobject:
        found.update(repr(array.tolist()).encode("utf-8", "surrogatepass"))
    elif array.size:
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


# ---- differences


def difference(old: Iterable[Sequence[Any]], new: Iterable[Sequence[Any]]) -> list[str]:
    """Lines that name the files added, missing, changed, renamed and moved."""
    before, after = ([Entry(*e) for e in content] for content in (old, new))
    left = collections.Counter(e[1:] for e in before) - collections.Counter(e[1:] for e in after)
    came = collections.Counter(e[1:] for e in after) - collections.Counter(e[1:] for e in before)
    gone = {e.name: e for e in before if e[1:] in left and e not in after}
    added = {e.name: e for e in after if e[1:] in came and e not in before}
    changed = [n for n in gone if n in added]
    kinds = {
        "added": [_sized(e) for n, e in added.items() if n not in changed],
        "missing": [_sized(e) for n, e in gone.items() if n not in changed],
        "changed": [
            n
            + (
                f" ({gone[n].size} -> {added[n].size} bytes)"
                if gone[n].size != added[n].size
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
    return [f"  {kind}: {_few(names)}" for kind, names in kinds.items() if names]


def _sized(entry: Entry) -> str:
    return f"{entry.name} ({entry.size} bytes)" if entry.size else entry.name


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
