"""A run's data: its content, the same in every process and start, and the bad records that it skips."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from spmd.core.fields import check
from spmd.core.storage import json_text, write_atomically
from spmd.data import DataConfig, content
from spmd.data.content import Parts
from spmd.data.skips import Skips, bad_records
from spmd.runtime import agree
from spmd.train import rundir

FILE = "data.json"  # the entries behind the digests in config.json, by which files are named
_CALLED = {"train": "training data", "eval": "evaluation data", "tokenizer": "tokenizer"}


def describe_contents(data: DataConfig, sources: Mapping[str, Callable[[], Any]]) -> Parts:
    """The content of the data; ValueError in all processes when one of them reads other data.

    sources: split -> () -> its source.
    """
    parts = content.describe(data, sources)
    digests = {name: content.digest_content(part) for name, part in parts.items()}
    digests_by_process = agree.gather(digests, "comparing the data")
    if any(theirs != digests_by_process[0] for theirs in digests_by_process):
        all_parts = agree.gather(parts, "comparing the data")
        agree.from_first(
            lambda: check(False, _process_differences(all_parts)), "comparing the data"
        )
    return parts


def _process_differences(all_parts: Sequence[Parts]) -> str:
    lines = ["the processes of this run see different data:"]
    for i, parts in enumerate(all_parts[1:], 1):
        for name, part in parts.items():
            if part != all_parts[0].get(name):
                lines.append(f"process {i} beside process 0, {_CALLED[name]}:")
                lines += content.describe_difference(all_parts[0].get(name, []), part)
    return "\n".join(
        [*lines, "copy the same files to every machine, or read them from a common disk"]
    )


def identity(parts: Parts) -> dict[str, str]:
    """The digests, as fields of a run's identity."""
    return {f"{rundir.CONTENT}{name}": content.digest_content(part) for name, part in parts.items()}


def write_contents(path: epath.Path, parts: Parts) -> None:
    """Write the entries behind the digests in config.json."""
    write_atomically(path / FILE, json_text(parts) + "\n")


def check_unchanged(
    path: epath.Path, parts: Parts, names_to_compare: Sequence[str] = tuple(_CALLED)
) -> None:
    """ValueError that names the differences when the run in `path` has other data than `parts`.

    names_to_compare: the parts that count. A run from before contents were recorded accepts any.
    """
    recorded = rundir.read_identity(path)
    current = identity(parts)
    differing: dict[tuple[str, ...], list[str]] = {}  # lines of differences -> parts that have them
    for name in names_to_compare:
        key = f"{rundir.CONTENT}{name}"
        if key in recorded and key in current and recorded[key] != current[key]:
            lines = tuple(_difference(path, name, recorded[key], parts))
            differing.setdefault(lines, []).append(_CALLED[name])
    if not differing:
        return
    lines = [
        line
        for difference, names in differing.items()
        for line in (
            f"the {' and the '.join(names)} of the run in {rundir.short_path(path)} changed since it began:",
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
        is_recorded = content.digest_content([content.Entry(*e) for e in old]) == digest
        return content.describe_difference(old, parts[name]) if is_recorded else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


class Skipped:
    """Bad records that all processes of a run have skipped."""

    def __init__(self, sources: Mapping[str, Any], skips: Mapping[str, Skips]):
        self._skips, self._told = skips, 0
        # Both splits of a text may be parts of the same files.
        reasons = [reason for source in sources.values() for reason in _bad_records(source)]
        self._before = list(dict.fromkeys(reasons))
        self._on = any(s.limit for s in skips.values())

    def count(self) -> dict[str, float]:
        """`{"data/skipped_records": ...}`, {} where none may pass; prints a line when there are new ones.

        Every process calls it at the same step. ValueError beyond data.skip_bad.
        """
        if not self._on:
            return {}
        reports = agree.gather(
            {
                name: {str(i): reason for i, reason in s.reasons.items()}
                for name, s in self._skips.items()
            },
            "counting bad records",
        )
        total = len(self._before)
        for name, skips in self._skips.items():
            total += skips.merge([report[name] for report in reports])
        if total > self._told:
            reasons = [
                *self._before,
                *(reason for s in self._skips.values() for reason in s.reasons.values()),
            ]
            agree.say(
                f"passed over {total} bad records, each an empty row: {'; '.join(reasons[:3])}"
            )
            self._told = total
        return {"data/skipped_records": float(total)}


def _bad_records(source: Any) -> list[str]:
    return list(getattr(source, "skipped", ())) or list(bad_records(source).values())
