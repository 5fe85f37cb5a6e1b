"""run.py runs list | status | check [DIR]: what run directories hold, and whether it is still good."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from etils import epath

from spmd.fields import check, closest
from spmd.runtime import EXIT_FAILED
from spmd.train import rundir, steps

ACTIONS = ("list", "status", "check")


def run(words: Sequence[str]) -> int:
    """Exit code 1 when `check` finds a bad step. `list` and `status` need no jax, none the experiment."""
    action, *places = words or [""]
    check(
        action in ACTIONS and len(places) <= 1 and not any(p.startswith("-") for p in places),
        f"run.py runs {' '.join(words) or '(nothing)'}: not understood.{closest(action, ACTIONS)}"
        " Type: run.py runs list|status|check [DIR] (default: runs)",
    )
    directory = rundir.locate(places[0] if places else "runs", "")
    found = _runs(directory)
    if action == "list":
        _list(directory, found)
        return 0
    bad = 0
    for path in found:
        if action == "status":
            _status(path)
        else:
            bad += _check(path)
    return EXIT_FAILED if bad else 0


def _runs(directory: epath.Path) -> list[epath.Path]:
    """The runs at or right below `directory`; ValueError when there are none."""
    check(directory.is_dir(), f"no directory {directory}; give the one of a run, or of several")
    if (directory / "config.json").exists():
        return [directory]
    found = [p for p in sorted(directory.iterdir()) if (p / "config.json").exists()]
    check(bool(found), f"no run in {directory} nor right below it (no config.json)")
    return found


def _json(file: epath.Path) -> dict[str, Any] | None:
    """What a file of a run holds; None without one, {} when it cannot be read."""
    if not file.exists():
        return None
    try:
        return {**json.loads(file.read_text())}
    except (OSError, ValueError, TypeError):
        return {}


def _facts(path: epath.Path) -> dict[str, Any]:
    """What one run is and where it stands."""
    config, summary = _json(path / "config.json"), _json(path / "summary.json")
    corrupt = [name for name, value in (("config", config), ("summary", summary)) if value == {}]
    saved = steps.listed(path / "checkpoints")
    logged: dict[str, Any] = {}
    for line in rundir.lines(path / "metrics.jsonl"):
        logged |= line
    step = max([(summary or {}).get("steps", 0), logged.get("step", 0), *saved[-1:]])
    if corrupt:
        state = f"{corrupt[0]}.json is corrupt"
    elif summary:
        state = "finished"
    else:
        state = f"unfinished at step {step}" if step else "empty"
    times = [p.stat().mtime for p in path.iterdir()]
    return {
        "experiment": (config or {}).get("experiment", "?"),
        "identity": (config or {}).get("identity", {}),
        "state": state,
        "step": step,
        "metrics": {k: v for k, v in logged.items() if k.startswith("eval/")},
        "seconds": (summary or {}).get("seconds", {}),
        "saved": saved,
        "age": time.time() - max(times),
    }


def _metrics(values: dict[str, float]) -> str:
    return "  ".join(f"{name.removeprefix('eval/')} {v:.4g}" for name, v in values.items()) or "-"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _list(directory: epath.Path, found: list[epath.Path]) -> None:
    rows = [("run", "experiment", "state", "step", "evaluation", "checkpoint", "age")]
    for path in found:
        facts = _facts(path)
        newest = str(facts["saved"][-1]) if facts["saved"] else "-"
        if aside := len(steps.quarantined(path / "checkpoints")):
            newest += f" ({aside} in quarantine)"
        name = path.name if path == directory else str(path.relative_to(directory))
        rows.append(
            (
                name,
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
        metrics = steps.about(place).get("metrics") or {}
        print(
            f"  checkpoint {step}: {steps.size(place) / 2**20:.1f} MiB"
            + (f", {_metrics(metrics)}" if metrics else "")
        )
    for name, reason in steps.quarantined(directory).items():
        print(f"  in quarantine {name}: {reason}")
    print("  identity:")
    for name, value in facts["identity"].items():
        print(f"    {name}: {json.dumps(value)}")


def _check(path: epath.Path) -> int:
    """Prints a line for each checkpoint; returns how many are bad. Changes nothing."""
    from spmd.train import reading

    directory, bad = path / "checkpoints", 0
    saved = steps.listed(directory)
    if not saved:
        print(f"{path}: no checkpoint")
    for step in saved:
        wrong, good = reading.examined(directory / str(step))
        bad += bool(wrong)
        print(f"{path} step {step}: {f'BAD: {wrong}' if wrong else good}", flush=True)
    if bad:
        print(
            "bad steps are put aside, and the newest good one is taken, when the run goes on or is"
            " evaluated",
            file=sys.stderr,
        )
    return bad
