"""Compiled programs of the tests, kept for the next run of the suite.

JAX does not write its entries atomically. So each process of pytest has a cache directory of its own, which
starts with what is kept; at the end its new entries are added to that, those that are complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from spmd.core.storage import make_private

MAX_BYTES = 2 * 2**30  # of what is kept; beyond it the oldest entries go
MIN_SECONDS = 0.05  # what compiles faster is not worth a file


def start(kept: Path, directory: Path) -> None:
    """Fills a new cache directory with the entries of `kept`."""
    directory.mkdir(mode=0o700, parents=True)
    if make_private(kept):
        return  # compiled programs are code: nothing is run that others may write
    for entry in kept.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another session may prune
            try:
                os.link(entry, directory / entry.name)
            except OSError:  # another file system
                shutil.copy(entry, directory / entry.name)


def keep(directory: Path, kept: Path) -> None:
    """Adds the complete entries of a cache directory to `kept`."""
    from jax._src.compilation_cache import decompress_executable

    if make_private(kept):
        return
    for entry in directory.glob("*-cache"):
        if (kept / entry.name).exists():
            continue
        content = entry.read_bytes()
        try:
            decompress_executable(content)
        except Exception:  # whatever the codec raises: a process was killed while it wrote
            continue
        part = kept / f"{entry.name}.{os.getpid()}.part"
        part.write_bytes(content)
        part.replace(kept / entry.name)
    _prune(kept)


def _prune(kept: Path) -> None:
    entries = sorted(kept.glob("*-cache"), key=lambda entry: entry.stat().st_mtime)
    excess = sum(entry.stat().st_size for entry in entries) - MAX_BYTES
    for entry in entries:
        if excess <= 0:
            return
        excess -= entry.stat().st_size
        entry.unlink(missing_ok=True)
