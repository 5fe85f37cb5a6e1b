"""run.py runs list | status | check [DIR]: list run directories, and check their checkpoints."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from etils import epath

from spmd.core.fields import check, closest
from spmd.core.storage import is_remote, json_text, list_directory, size_and_time
from spmd.runtime import EXIT_FAILED
from spmd.train import rundir
from spmd.train.checkpoint import steps

ACTIONS = ("list", "status", "check")


def run(words: Sequence[str]) -> int:
    """Exit code 1 if `check` finds a bad checkpoint. `list` and `status` need no jax; no action needs the
    experiment.
    """
    action, *places = words or [""]
    check(
        action in ACTIONS and len(places) <= 1 and not any(p.startswith("-") for p in places),
        f"run.py runs {' '.join(words) or '(nothing)'}: not understood.{closest(action, ACTIONS)}"
        " Type: run.py runs list|status|check [DIR] (default: runs)",
    )
    directory = rundir.locate(places[0] if places else "runs", "")
    paths = _runs(directory)
    if action == "list":
        _list(directory, paths)
        return 0
    bad = 0
    for path in paths:
        if action == "status":
            _status(path)
        else:
            bad += _check(path)
    return EXIT_FAILED if bad else 0


def _runs(directory: epath.Path) -> list[epath.Path]:
    """Run directories: `directory` itself, or those directly inside it; ValueError if there are none.

    Other entries (files, broken links) are skipped; those that cannot be read are reported.
    """
    check(
        directory.is_dir(),
        f"there is no directory {directory}; give that of a run, or of several runs",
    )
    try:
        entries = list_directory(directory)
        if _is_run(directory):
            return [directory]
    except OSError as error:
        raise ValueError(f"cannot read {directory}: {error.strerror or error}") from None
    paths = []
    for path in entries:
        try:
            if _is_run(path):
                paths.append(path)
        except OSError as error:
            print(f"{path} is skipped: {error.strerror or error}", file=sys.stderr)
    check(bool(paths), f"no run in {directory} or directly inside it (no config.json)")
    return paths


def _is_run(path: epath.Path) -> bool:
    """Whether a directory holds a run; OSError if it cannot be read, which exists() would hide."""
    if is_remote(path):
        return (path / "config.json").exists()
    try:
        os.stat(path / "config.json")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise
    return True


def _json(file: epath.Path) -> dict[str, Any] | None:
    """Content of a JSON file of a run; None if it does not exist, {} if it cannot be read."""
    if not file.exists():
        return None
    try:
        return {**json.loads(file.read_text())}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(value: Any) -> dict[str, float]:
    """The numbers of a dict; {} for other values, since files may be damaged."""
    return {k: v for k, v in _dict(value).items() if isinstance(v, int | float)}


def _metric_values(value: Any) -> dict[str, float | None]:
    """The numbers of what should be metrics, and those that are null: nothing was measured, or not finite."""
    return {k: v for k, v in _dict(value).items() if v is None or isinstance(v, int | float)}


T = TypeVar("T")


def _read(read: Callable[[], T], default: T, name: str, damaged: list[str]) -> T:
    """Calls `read`; if it fails, returns the default and adds a line to `damaged` that names the part."""
    try:
        return read()
    except (OSError, ValueError) as error:
        damaged.append(
            f"{name} cannot be read: {getattr(error, 'strerror', '') or 'it is not text'}"
        )
        return default


def _facts(path: epath.Path) -> dict[str, Any]:
    """Identity, state and metrics of a run; of a damaged run, what can be read."""
    config, summary = _json(path / "config.json"), _json(path / "summary.json")
    files = (("config", config), ("summary", summary))
    damaged = [f"{name}.json is corrupt" for name, value in files if value == {}]
    checkpoints, metrics = path / "checkpoints", path / "metrics.jsonl"
    saved = _read(lambda: steps.list_steps(checkpoints), [], "checkpoints", damaged)
    quarantined = _read(lambda: steps.list_quarantine(checkpoints), {}, "quarantine", damaged)
    logged: dict[str, Any] = {}
    for line in _read(lambda: rundir.read_lines(metrics), [], "metrics.jsonl", damaged):
        logged |= line
    done = [_numbers(summary).get("steps", 0), _numbers(logged).get("step", 0), *saved[-1:]]
    step = int(max(n for n in done if math.isfinite(n)))
    if damaged:
        state = damaged[0]
    elif summary:
        state = "finished"
    else:
        state = f"unfinished at step {step}" if step else "empty"
    times = _read(lambda: [*map(_change_time, path.iterdir())], [], path.name, damaged)
    return {
        "experiment": str((config or {}).get("experiment", "?")),
        "identity": _dict((config or {}).get("identity")),
        "state": state,
        "step": step,
        "metrics": {k: v for k, v in _metric_values(logged).items() if k.startswith("eval/")},
        "seconds": _numbers((summary or {}).get("seconds")),
        "saved": saved,
        "aside": quarantined,
        "age": time.time() - max(times, default=time.time()),
    }


def _change_time(path: epath.Path) -> float:
    """Time of the last change of a file; 0 if unknown, for example for a broken link."""
    try:
        return size_and_time(path)[1]
    except OSError:
        return 0.0


def _name(path: epath.Path, directory: epath.Path) -> str:
    """A run's name in the list, on a single line whatever its characters."""
    name = path.name if path == directory else str(path.relative_to(directory))
    return name if name.isprintable() else repr(name)


def _metrics(values: dict[str, float | None]) -> str:
    number = lambda v: "null" if v is None else f"{v:.4g}"
    return "  ".join(f"{k.removeprefix('eval/')} {number(v)}" for k, v in values.items()) or "-"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _list(directory: epath.Path, paths: list[epath.Path]) -> None:
    rows = [("run", "experiment", "state", "step", "evaluation", "checkpoint", "age")]
    for path in paths:
        facts = _facts(path)
        newest = str(facts["saved"][-1]) if facts["saved"] else "-"
        if facts["aside"]:
            newest += f" ({len(facts['aside'])} in quarantine)"
        rows.append(
            (
                _name(path, directory),
                facts["experiment"],
                facts["state"],
                str(facts["step"]),
                _metrics(facts["metrics"]),
                newest,
                _age(facts["age"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{text:{w}}" for text, w in zip(row, widths, strict=True)).rstrip())


def _status(path: epath.Path) -> None:
    facts, directory = _facts(path), path / "checkpoints"
    print(f"{path}: {facts['experiment']}, {facts['state']}, {_age(facts['age'])} ago")
    if facts["metrics"]:
        print(f"  evaluation: {_metrics(facts['metrics'])}")
    if facts["seconds"]:
        print("  seconds: " + "  ".join(f"{k} {v:.1f}" for k, v in facts["seconds"].items()))
    for step in facts["saved"]:
        place = directory / str(step)
        metrics = _metric_values(steps.read_metadata(place).get("metrics"))
        damaged: list[str] = []
        size = _read(lambda at=place: f"{steps.num_bytes(at) / 2**20:.1f} MiB", "", "it", damaged)
        print(
            f"  checkpoint {step}: {size or damaged[0]}"
            + (f", {_metrics(metrics)}" if metrics else "")
        )
    for name, reason in facts["aside"].items():
        print(f"  in quarantine {name}: {reason}")
    print("  identity:")
    for name, value in facts["identity"].items():
        print(f"    {name}: {json_text(value)}")


def _check(path: epath.Path) -> int:
    """Prints a line per checkpoint; returns the number of bad ones. Changes nothing."""
    from spmd.train.checkpoint import reading

    directory, bad = path / "checkpoints", 0
    damaged: list[str] = []
    saved = _read(lambda: steps.list_steps(directory), [], "checkpoints", damaged)
    if damaged:
        print(f"{path}: BAD: {damaged[0]}")
        return 1
    if not saved:
        print(f"{path}: no checkpoint")
    for step in saved:
        fault, verdict = reading.verify(directory / str(step))
        bad += bool(fault)
        print(f"{path} step {step}: {f'BAD: {fault}' if fault else verdict}", flush=True)
    if bad:
        print(
            "a resumed run moves bad checkpoints to quarantine and uses the newest good one; eval, sample"
            " and export skip them",
            file=sys.stderr,
        )
    return bad
