"""Caches on disk: built beside and renamed, so that a half-written one is never read."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spmd.core.fields import check
from spmd.core.storage import json_text

FIELDS = "--data.cache-dir or SPMD_CACHE_DIR"  # what moves the cache elsewhere


def facts(cache: Path) -> dict[str, Any]:
    """The record of a complete cache whose files still have their sizes; else {}."""
    try:
        known = json.loads((cache / "complete.json").read_text())
        whole = all((cache / f).stat().st_size == size for f, size in known["files"].items())
        return known if whole else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def build(cache: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Has `write` fill a directory, which becomes `cache`; its facts are what `write` returns, and sizes."""
    part = scratch(cache.parent, FIELDS, f".{cache.name}.")
    try:
        known = write(part)
        files = {f.name: f.stat().st_size for f in part.iterdir()}
        (part / "complete.json").write_text(json_text(known | {"files": files}))
        if cache.exists() and not facts(cache):
            shutil.rmtree(cache, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was faster
            part.rename(cache)
        found = facts(cache)
        check(bool(found), f"the cache {cache} could not be written")
        return found
    finally:
        shutil.rmtree(part, ignore_errors=True)


class Bad:
    """Bad records of a data set: so many may pass, one more is a ValueError that names it."""

    def __init__(self, limit: int):
        self.limit = limit
        self.reasons: list[str] = []

    def add(self, why: str) -> None:
        """Counts a record. why: which one, and what is wrong with it."""
        self.reasons.append(why)
        check(len(self.reasons) <= self.limit, beyond(why, self.limit))


def beyond(why: str, limit: int) -> str:
    """The message for one bad record more than may pass."""
    why = why.removesuffix(".")
    if limit:
        return (
            f"{why}. More than data.skip_bad={limit} records are bad: mend them, or let more pass"
        )
    return f"{why}. Mend it, leave it out, or let N such records pass with --data.skip-bad N"


def scratch(parent: Path, fields: str, prefix: str = ".spmd.") -> Path:
    """A fresh directory in `parent`; ValueError naming `fields` where that cannot be written."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise ValueError(
            f"cannot write the directory {parent}: {error.strerror}; choose another with {fields}"
        ) from None


def progress(label: str, num: int, large: int) -> Callable[[int], None]:
    """Says how far it is when `num` is at least `large`, on lines of standard error."""
    shown = {"tenth": -1}

    def show(done: int) -> None:
        tenth = min(done, num) * 10 // max(num, 1)
        if num >= large and tenth > shown["tenth"]:
            shown["tenth"] = tenth
            print(f"{label}: {tenth * 10} %", file=sys.stderr, flush=True)

    return show
