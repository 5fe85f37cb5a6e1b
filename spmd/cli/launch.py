"""run.py launch WHERE [stop|logs] --experiment NAME [--option value ...] [--field value ...] [-- ...]."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from spmd.core.fields import check, closest
from spmd.experiment import registry
from spmd.launch import base

WHERE = {  # module and class in spmd/launch
    "local": ("local", "LocalLaunch", "several processes on this machine"),
    "slurm": ("slurm", "Slurm", "a Slurm cluster"),
    "tpu-vm": ("tpu_vm", "TpuVm", "Cloud TPU VMs"),
    "gke": ("gke", "Gke", "Kubernetes on Google Cloud, as a JobSet"),
}
ACTIONS = ("start", "stop", "logs")

USAGE = """usage: run.py launch WHERE [stop|logs] --experiment NAME [--option value ...] [--field value ...]
                     [-- words for sbatch, gcloud or kubectl]

  --dry-run prints exactly what would run. Words that are not options of the launcher are fields for run.py;
  they are checked before the launch.

"""


def usage() -> str:
    """The usage text, with a line per place."""
    lines = [f"  {place:8}{text}" for place, (*_, text) in WHERE.items()]
    return USAGE + "\n".join(lines) + "\n\noptions of a place: run.py launch WHERE --help\n"


def run(name: str | None, words: Sequence[str]) -> int:
    """Checks options and fields, then starts or stops the job, or shows its logs."""
    words = list(words)
    if name is None and (not words or words[0] in ("--help", "-h")):
        print(usage())
        return 0
    place, action = words.pop(0) if words else "(nothing)", "start"
    check(
        place in WHERE,
        f"run.py launch {place}: unknown place.{closest(place, WHERE)} Known: {', '.join(WHERE)}",
    )
    if words and not words[0].startswith("-"):
        action = words.pop(0)
    check(
        action in ACTIONS,
        f"run.py launch {place} {action}: unknown action.{closest(action, ACTIONS)}"
        f" Known: {', '.join(ACTIONS)}",
    )
    module, cls, _ = WHERE[place]
    options = getattr(importlib.import_module(f"spmd.launch.{module}"), cls)
    launcher, job = _parse(place, options, name, words)
    return getattr(launcher, action)(job)


def _parse(place: str, options: Any, name: str | None, words: list[str]) -> tuple[Any, base.Job]:
    """(launcher with its options, job); ValueError for mistakes in options or fields."""
    import tyro

    prog = f"run.py launch {place}"
    end = words.index("--") if "--" in words else len(words)
    words, extra = words[:end], words[end + 1 :]
    check(
        "--dry-run" not in extra, "--dry-run after -- would not reach the launcher: put it before"
    )
    if name is None:
        if {"--help", "-h"} & set(words):
            tyro.cli(options, args=["--help"], prog=prog)  # exits
        raise ValueError(
            "no experiment given; type --experiment NAME (run.py --list shows the names)"
        )
    exp, launcher = registry.load(name, words, options, prog)
    _, fields = tyro.cli(options, args=words, return_unknown_args=True)
    job = base.Job(
        name=launcher.job_name(exp.name),
        experiment=name,
        fields=tuple(fields),
        extra=tuple(extra),
        run_dir=exp.run.dir,
    )
    return launcher, job
