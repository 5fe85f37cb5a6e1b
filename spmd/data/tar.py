"""Tar files as WebDataset writes them: members of one name before the first dot are an example.

The headers are read once, into an index in the cache; from then on examples are read by random access.
"""

# N examples, F features

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from spmd.core.fields import check, free, located
from spmd.core.storage import cache_root, is_remote, json_text
from spmd.data import DataConfig, Source, Split, content, files, ragged
from spmd.data import cache as caches
from spmd.data.folders import in_evaluation, shorten

if TYPE_CHECKING:
    from spmd.data.content import Content

_NAME = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)")  # key, and the suffix from the first dot on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tar(DataConfig):
    """Examples in tar files, not compressed; `features` declares {name: (shape, dtype)}."""

    files: tuple[str, ...] = located(())
    """Files, globs in quotes, or folders of .tar files; gs:// too."""
    eval_files: tuple[str, ...] = located(())
    """Files to evaluate on; without any, eval_fraction."""
    eval_fraction: float = 0.1
    """Share of the examples to evaluate on, by a hash of their names, where no files are given for it."""
    members: tyro.conf.Suppress[Mapping[str, str]] = dataclasses.field(default_factory=dict)
    """Feature -> suffixes of its member, as "jpg,jpeg,png"; "json:FIELD" is a field of a JSON member."""
    cache_dir: str = free("")
    """Where the index goes; empty is $SPMD_CACHE_DIR, else ~/.cache/spmd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.features), "data.features is empty; declare {name: (shape, dtype)}")
        for name in self.features:
            check(
                bool(self.members.get(name)),
                f'data.members has no suffix for feature {name!r}; give {{"{name}": "jpg,png"}}, say',
            )

    def open(self, split: Split) -> TarSource:
        """The examples of a split, by random access; the index is built on first use."""
        paths = self._paths(split)
        entries = content.describe_files(paths, self.cache_dir)
        return TarSource(self, split, paths, _index(self, paths, entries))

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """The tar files; those of training where evaluation has none of its own."""
        del source
        return content.describe_files(self._paths(split), self.cache_dir)

    def _paths(self, split: str) -> list[str]:
        own = split == "eval" and bool(self.eval_files)
        option = "data.eval_files" if own else "data.files"
        paths = files.matching(self.eval_files if own else self.files, option, (".tar",))
        for path in paths:
            check(
                path.lower().endswith(".tar"),
                f"{path} ({option}) is no .tar file; a compressed one has no random access: unpack it",
            )
        return paths


class TarSource:
    """The examples of a split; `name_of` names an example."""

    def __init__(self, config: Tar, split: str, paths: Sequence[str], index: Path):
        load = lambda name: np.load(index / f"{name}.npy", allow_pickle=False)
        self._features = [
            (name, shape, dtype, config.members[name].partition(":")[2])
            for name, (shape, dtype) in config.features.items()
        ]
        self._paths: list[str] = list(paths)
        names = (index / "names.txt").read_text().split("\n")
        unpaired = json.loads((index / "unpaired.json").read_text())
        reasons = caches.BadRecords(config.skip_bad)
        for reason in unpaired:
            reasons.add(reason)
        self.skipped = tuple(unpaired)
        chosen = np.arange(len(names))
        if not config.eval_files:
            held_N = in_evaluation(names, config.eval_fraction)
            chosen = np.flatnonzero(held_N if split == "eval" else ~held_N)
        self._names = [names[i] for i in chosen]
        self._shard_N = load("shard")[chosen]
        self._offset_NF, self._size_NF = load("offset")[chosen], load("size")[chosen]
        self._suffix_NF = load("suffix")[chosen]

    def __len__(self) -> int:
        return len(self._names)

    def name_of(self, index: int) -> str:
        """The tar file of an example, and its name in it."""
        return f"{os.path.basename(self._paths[int(self._shard_N[index])])}, {self._names[index]}"

    def take(self, indices: np.ndarray) -> dict[str, Any]:
        """Examples at `indices` int64 [N]."""
        batch: dict[str, Any] = {}
        for f, (name, shape, dtype, field) in enumerate(self._features):
            values = files.read_parts(
                [
                    (
                        self._paths[int(self._shard_N[i])],
                        int(self._offset_NF[i, f]),
                        int(self._size_NF[i, f]),
                    )
                    for i in indices
                ]
            )
            if dtype == ragged.BYTES:
                batch[name] = values
                continue
            rows = [
                _value(data, str(self._suffix_NF[i, f]), field, shape, dtype, name)
                for i, data in zip(indices, values, strict=True)
            ]
            batch[name] = np.stack(rows) if rows else ragged.zeros(0, shape, dtype)
        return batch


def _value(
    data: bytes, suffix: str, field: str, shape: tuple[int, ...], dtype: str, name: str
) -> np.ndarray:
    """A member as an array of a declared feature."""
    kind = suffix.rpartition(".")[2]
    try:
        if kind == "npy":
            value = np.load(io.BytesIO(data), allow_pickle=False)
        elif kind == "json":
            value = json.loads(data)
            value = np.asarray(value[field] if field else value)
        else:
            text = data.decode().strip()
            value = np.asarray(float(text) if np.dtype(dtype).kind == "f" else int(text))
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"feature {name!r}: its .{suffix} member holds no such value ({error})"
        ) from None
    cast = value.astype(dtype) if value.dtype.kind in "biuf" else value
    check(
        value.shape == tuple(shape) and value.dtype.kind in "biuf" and _same(cast, value),
        f"feature {name!r} is {value.dtype}{list(value.shape)} in its .{suffix} member, the experiment"
        f" declares {dtype}{list(shape)}",
    )
    return cast


def _same(cast: np.ndarray, value: np.ndarray) -> bool:
    """Whether a cast lost no more than the precision of floats."""
    return cast.dtype.kind == "f" or bool((cast == value).all())


# ---- the index


def _index(config: Tar, paths: Sequence[str], entries: Content) -> Path:
    """The directory with the index of these files, built once."""
    members = {name: config.members[name].partition(":")[0].split(",") for name in config.features}
    times = [0 if is_remote(p) else os.stat(p).st_mtime_ns for p in paths]
    key = hashlib.sha256(repr((entries, times, sorted(members.items()))).encode()).hexdigest()[:16]
    cache = Path(cache_root(config.cache_dir)) / "tar" / f"{Path(paths[0]).stem}-{key}"
    if not caches.read_facts(cache):
        caches.build(cache, lambda part: _write(paths, members, part))
    return cache


def _write(
    paths: Sequence[str], members: Mapping[str, Sequence[str]], part: Path
) -> dict[str, Any]:
    names, shard, offset, size, suffixes = [], [], [], [], []
    unpaired: list[str] = []
    show = caches.progress_printer("reading the headers of tar files", len(paths), large=20)
    for number, path in enumerate(paths):
        show(number)
        for name, found in _examples(path).items():
            chosen = [next((s for s in wanted if s in found), None) for wanted in members.values()]
            if None in chosen:
                lacking = [f for f, s in zip(members, chosen, strict=True) if s is None]
                unpaired.append(
                    f"{path}: {name!r} has no member for {', '.join(lacking)} (it has:"
                    f" {shorten(sorted(found))})"
                )
                continue
            names.append(name)
            shard.append(number)
            offset.append([found[str(s)][0] for s in chosen])
            size.append([found[str(s)][1] for s in chosen])
            suffixes.append(chosen)
    wanted = "; ".join(f"{name}: {', '.join(each)}" for name, each in members.items())
    more = f". {unpaired[0]}" if unpaired else ""
    check(bool(names), f"{paths[0]}: no example has members for all features ({wanted}){more}")
    arrays = {
        "shard": np.array(shard, np.int32),
        "offset": np.array(offset, np.int64),
        "size": np.array(size, np.int64),
        "suffix": np.array(suffixes, str),
    }
    for name, array in arrays.items():
        np.save(part / f"{name}.npy", array)
    (part / "names.txt").write_text("\n".join(names))
    (part / "unpaired.json").write_text(json_text(unpaired))
    return {"examples": len(names)}


def _examples(path: str) -> dict[str, dict[str, tuple[int, int]]]:
    """{name: {suffix: (offset, size)}} of a tar file, in its order; only headers are read."""
    examples: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    try:
        with files.opened(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _files_of(tar):
                match = _NAME.fullmatch(member.name)
                if match:
                    place = (member.offset_data, member.size)
                    examples.setdefault(match[1], {})[match[2].lower()] = place
                end = max(end, member.offset_data + member.size)
            size = file.seek(0, os.SEEK_END)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is damaged, or no tar file ({error}); copy it anew") from None
    # A tar file ends in blocks of zeros: tarfile takes a file that is cut off for one that ends there.
    needed = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE
    check(
        needed <= size,
        f"{path} is cut off: it has {size} bytes, and its last member needs {needed}; copy it anew",
    )
    return examples


def _files_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    return (member for member in tar if member.isfile())
