"""TFDS sets decoded once into memory-mapped arrays; TFDS itself is not imported when they exist."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from spmd.core.fields import check
from spmd.data import TFDS, Features, cache_root, tfds
from spmd.data import cache as caches
from spmd.data.sources import ArraySource

_CHUNK = 256  # examples that a thread decodes at once


def open_split(config: TFDS, split: str) -> ArraySource:
    """The decoded arrays of `split` (`train`, `train[:90%]`), mapped from the cache."""
    check(bool(config.features), "data.features is empty; declare {name: (shape, dtype)}")
    part = tfds.locate(config, split)
    cache = _cache(config, part.directory, part.name)
    if caches.read_facts(cache).get("examples") != part.total:
        _build(config, part.directory, part.name, part.total, cache)
    bad = {int(i): reason for i, reason in caches.read_facts(cache).get("bad", {}).items()}
    arrays = {
        f: np.load(cache / f"{f}.npy", mmap_mode="r", allow_pickle=False) for f in config.features
    }
    source = ArraySource(arrays, config.features, part.start, part.stop, bad)
    records = caches.BadRecords(config.skip_bad)
    for reason in source.bad.values():
        records.add(reason)
    return source


def _cache(config: TFDS, directory: Path, split: str) -> Path:
    """The cache directory of a split, keyed by its content and by the features kept."""
    features = sorted((k, tuple(s), d) for k, (s, d) in config.features.items())
    key = hashlib.sha256(repr((tfds.fingerprint(directory, split), split, features)).encode())
    base = Path(cache_root(config.cache_dir)) / "decoded"
    return base / f"{tfds.parse_name(config.name)[0]}-{split}-{key.hexdigest()[:16]}"


def _build(config: TFDS, directory: Path, split: str, num: int, cache: Path) -> None:
    """Decodes a split into .npy files."""
    examples = tfds.open_reader(config, directory, split, config.features)
    try:
        with tfds.quiet():
            first = examples[0]
    except Exception:  # a bad record, named below
        first = {}
    for feature, (shape, dtype) in config.features.items() if first else ():
        value = np.asarray(first[feature])
        fits = value.dtype == dtype or (value.dtype == np.int64 and dtype == "int32")
        check(
            value.shape == tuple(shape) and fits,
            f"feature {feature!r} of {config.name!r} is {value.dtype}{list(value.shape)}, the"
            f" experiment declares {dtype}{list(shape)}",
        )

    def write(part: Path) -> dict[str, Any]:
        with tfds.quiet():
            show = caches.progress_printer(f"decoding {config.name} {split}", num, large=10_000)
            name = f"{config.name}, {split} example"
            decoder = _Decoder(config.features, examples, num, part, name)
            bad = decoder.run(show, config.skip_bad)
        return {"examples": num, "bad": bad}

    caches.build(cache, write)


class _Decoder:
    """Writes the examples of a split into DIRECTORY/FEATURE.npy.

    features, reader: what to write, and where it is read. name: of an example, in messages.
    """

    def __init__(self, features: Features, reader: Any, num: int, directory: Path, name: str):
        self._reader, self._num, self._name = reader, num, name
        self._arrays = {
            feature: np.lib.format.open_memmap(
                directory / f"{feature}.npy", "w+", dtype=dtype, shape=(num, *shape)
            )
            for feature, (shape, dtype) in features.items()
        }

    def run(self, progress: Callable[[int], None], skip_bad: int = 0) -> dict[int, str]:
        """Decodes all; returns why examples that are left as zeros are bad, at most `skip_bad` of them."""
        records, reasons = caches.BadRecords(skip_bad), {}
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for done, bad in pool.map(self._chunk, range(0, self._num, _CHUNK)):
                for i, reason in bad.items():
                    reasons[i] = reason
                    records.add(reason)
                progress(done)
        for array in self._arrays.values():
            array.flush()
        return reasons

    def _chunk(self, start: int) -> tuple[int, dict[int, str]]:
        """(the end of the chunk at `start`, why examples of it are bad)."""
        rows, bad = range(start, min(start + _CHUNK, self._num)), {}
        try:
            self._store(rows)
        except Exception as error:  # of the reader or of a decoder, whatever its kind
            bad = self._store_singly(rows)
            if not bad:
                examples = f"{self._name}s {rows.start} to {rows.stop - 1}"
                raise ValueError(f"{examples}: {_message(error)}") from error
            for i in bad:
                for array in self._arrays.values():
                    array[i] = 0
        return rows.stop, bad

    def _store_singly(self, rows: range) -> dict[int, str]:
        """Stores the examples one by one; returns why some cannot be."""
        bad = {}
        for i in rows:
            try:
                self._store(range(i, i + 1))
            except Exception as error:
                bad[i] = f"{self._name} {i}: {_message(error)}"
        return bad

    def _store(self, rows: range) -> None:
        examples = self._reader.__getitems__(list(rows))
        for feature, array in self._arrays.items():
            parts = [np.asarray(e[feature]) for e in examples]
            same = all(x.shape == array.shape[1:] for x in parts)
            check(same, f"feature {feature!r} is not {list(array.shape[1:])} in every example")
            values = np.stack(parts)
            cast = values.astype(array.dtype)
            same = values.dtype == array.dtype or bool((cast == values).all())  # NaN != NaN
            check(same, f"feature {feature!r} does not fit {array.dtype}")
            array[rows.start : rows.stop] = cast


def _message(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
