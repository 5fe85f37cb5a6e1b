"""Caches on disk: built in a scratch directory and renamed, so that an incomplete one is never read."""

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

FIELDS = "--data.cache-dir or SPMD_CACHE_DIR"  # these set its directory


def read_facts(cache: Path) -> dict[str, Any]:
    """The record of a complete cache whose files still have their sizes; else {}."""
    try:
        facts = json.loads((cache / "complete.json").read_text())
        complete = all((cache / f).stat().st_size == size for f, size in facts["files"].items())
        return facts if complete else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def build(cache: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Build a cache: `write` fills a directory, which is renamed to `cache`.

    Returns the facts of the cache: what `write` returns, and the sizes of its files.
    """
    part = make_scratch(cache.parent, FIELDS, f".{cache.name}.")
    try:
        facts = write(part)
        files = {f.name: f.stat().st_size for f in part.iterdir()}
        (part / "complete.json").write_text(json_text(facts | {"files": files}))
        if cache.exists() and not read_facts(cache):
            shutil.rmtree(cache, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was faster
            part.rename(cache)
        record = read_facts(cache)
        check(bool(record), f"the cache {cache} could not be written")
        return record
    finally:
        shutil.rmtree(part, ignore_errors=True)


def open_records(
    cache: Path, write: Callable[[Path], dict[str, Any]], skip_bad: int
) -> dict[str, Any]:
    """The facts of a cache of records, which is built where it is missing.

    Args:
        cache: its directory.
        write: as of `build`; `bad` among its facts are the reasons of the bad records.
        skip_bad: how many of them may pass; the run that built it may have had another limit.

    Raises:
        ValueError: more are bad: it names the first beyond the limit.
    """
    facts = read_facts(cache) or build(cache, write)
    bad = BadRecords(skip_bad)
    for reason in facts["bad"]:
        bad.add(reason)
    return facts


class BadRecords:
    """Bad records of a data set: `limit` of them may pass, one more is a ValueError that names it."""

    def __init__(self, limit: int):
        self.limit = limit
        self.reasons: list[str] = []

    def add(self, reason: str) -> None:
        """Count a record; reason: names it and what is wrong with it."""
        self.reasons.append(reason)
        check(len(self.reasons) <= self.limit, limit_message(reason, self.limit))


def limit_message(reason: str, limit: int) -> str:
    """The message about the first bad record beyond the limit."""
    reason = reason.removesuffix(".")
    if limit:
        return f"{reason}. More than data.skip_bad={limit} records are bad: mend them, or let more pass"
    return f"{reason}. Mend it, leave it out, or let N such records pass with --data.skip-bad N"


def make_scratch(parent: Path, fields: str, prefix: str = ".spmd.") -> Path:
    """A fresh directory in `parent`; ValueError naming `fields` where that cannot be written."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise ValueError(
            f"cannot write the directory {parent}: {error.strerror}; choose another with {fields}"
        ) from None


def progress_printer(label: str, num: int, large: int) -> Callable[[int], None]:
    """A function that prints the progress from 0 to `num` to standard error, if `num` is at least `large`."""
    printed = {"tenth": -1}

    def show(done: int) -> None:
        tenth = min(done, num) * 10 // max(num, 1)
        if num >= large and tenth > printed["tenth"]:
            printed["tenth"] = tenth
            print(f"{label}: {tenth * 10} %", file=sys.stderr, flush=True)

    return show
