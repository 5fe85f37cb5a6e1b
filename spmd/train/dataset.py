"""A run's data: its content, the same in every process and start, and the bad records passed over."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from spmd.core.fields import check
from spmd.core.storage import json_text, write_whole
from spmd.data import DataConfig, content
from spmd.data.content import Parts
from spmd.data.skips import Skips, known_bad
from spmd.runtime import agree
from spmd.train import rundir

FILE = "data.json"  # the entries behind the digests in config.json, by which files are named
_CALLED = {"train": "training data", "eval": "evaluation data", "tokenizer": "tokenizer"}


def contents(data: DataConfig, opened: Mapping[str, Callable[[], Any]]) -> Parts:
    """The content of the data, the same in every process. ValueError, in all, when one sees other data.

    opened: split -> () -> its source.
    """
    parts = content.of(data, opened)
    digests = {name: content.digest(part) for name, part in parts.items()}
    seen = agree.gather(digests, "comparing the data")
    if any(other != seen[0] for other in seen):
        all_parts = agree.gather(parts, "comparing the data")
        agree.from_first(lambda: check(False, _differing(all_parts)), "comparing the data")
    return parts


def _differing(all_parts: Sequence[Parts]) -> str:
    lines = ["the processes of this run see different data:"]
    for i, parts in enumerate(all_parts[1:], 1):
        for name, part in parts.items():
            if part != all_parts[0].get(name):
                lines.append(f"process {i} beside process 0, {_CALLED[name]}:")
                lines += content.difference(all_parts[0].get(name, []), part)
    return "\n".join(
        [*lines, "copy the same files to every machine, or read them from a common disk"]
    )


def identity(parts: Parts) -> dict[str, str]:
    """The digests, as fields of a run's identity."""
    return {f"{rundir.CONTENT}{name}": content.digest(part) for name, part in parts.items()}


def record(path: epath.Path, parts: Parts) -> None:
    """Writes what the digests in config.json were made of."""
    write_whole(path / FILE, json_text(parts) + "\n")


def check_same(path: epath.Path, parts: Parts, only: Sequence[str] = tuple(_CALLED)) -> None:
    """ValueError that names what differs when the run in `path` has other data than `parts`.

    only: which parts count. A run from before contents were recorded has any.
    """
    before = rundir.read_identity(path)
    now = identity(parts)
    differing: dict[tuple[str, ...], list[str]] = {}  # what differs -> in which parts it does
    for name in only:
        key = f"{rundir.CONTENT}{name}"
        if key in before and key in now and before[key] != now[key]:
            lines = tuple(_difference(path, name, before[key], parts))
            differing.setdefault(lines, []).append(_CALLED[name])
    if not differing:
        return
    lines = [
        line
        for difference, names in differing.items()
        for line in (
            f"the {' and the '.join(names)} of the run in {rundir.shown(path)} changed since it began:",
            *difference,
        )
    ]
    advice = (
        "put the data back as it was; or use --run.dir DIR for a second run, or --run.fresh to move that"
        " one aside"
    )
    raise rundir.Refused("\n".join([*lines, advice]))


def _difference(path: epath.Path, name: str, digest: str, parts: Parts) -> list[str]:
    try:
        old = json.loads((path / FILE).read_text())[name]
        known = content.digest([content.Entry(*e) for e in old]) == digest
        return content.difference(old, parts[name]) if known else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


class Skipped:
    """Bad records that a run has passed over, in all processes."""

    def __init__(self, sources: Mapping[str, Any], skips: Mapping[str, Skips]):
        self._skips, self._told = skips, 0
        # Both splits of a text may be parts of the same files.
        known = [why for source in sources.values() for why in _known(source)]
        self._before = list(dict.fromkeys(known))
        self._on = any(s.limit for s in skips.values())

    def count(self) -> dict[str, float]:
        """`{"data/skipped_records": ...}`, or nothing where none may pass; says so when there are more.

        Every process calls it at the same step. ValueError beyond data.skip_bad.
        """
        if not self._on:
            return {}
        found = agree.gather(
            {
                name: {str(i): why for i, why in s.reasons.items()}
                for name, s in self._skips.items()
            },
            "counting bad records",
        )
        total = len(self._before)
        for name, skips in self._skips.items():
            total += skips.merge([each[name] for each in found])
        if total > self._told:
            reasons = [
                *self._before,
                *(why for s in self._skips.values() for why in s.reasons.values()),
            ]
            agree.say(
                f"passed over {total} bad records, each an empty row: {'; '.join(reasons[:3])}"
            )
            self._told = total
        return {"data/skipped_records": float(total)}


def _known(source: Any) -> list[str]:
    return list(getattr(source, "skipped", ())) or list(known_bad(source).values())
