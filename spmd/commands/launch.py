"""run.py launch WHERE [stop|logs] --experiment NAME [--option value ...] [--field value ...] [-- ...]."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from spmd import registry
from spmd.fields import check, closest
from spmd.launch import base

WHERE = {  # module and class in spmd/launch
    "local": ("local", "Local", "several processes on this machine"),
    "slurm": ("slurm", "Slurm", "a Slurm cluster"),
    "tpu-vm": ("tpu_vm", "TpuVm", "Cloud TPU VMs"),
    "gke": ("gke", "Gke", "Kubernetes on Google Cloud, as a JobSet"),
}
ACTIONS = ("start", "stop", "logs")

USAGE = """usage: run.py launch WHERE [stop|logs] --experiment NAME [--option value ...] [--field value ...]
                     [-- words for sbatch, gcloud or kubectl]

  --dry-run prints exactly what would run. Words that are no option of the launcher are fields for run.py;
  they are checked here first.

"""


def usage() -> str:
    """The places, a line each."""
    lines = [f"  {where:8}{text}" for where, (*_, text) in WHERE.items()]
    return USAGE + "\n".join(lines) + "\n\noptions of a place: run.py launch WHERE --help\n"


def run(name: str | None, words: Sequence[str]) -> int:
    """Checks everything that can be checked here, then starts, stops or shows the job."""
    words = list(words)
    if name is None and (not words or words[0] in ("--help", "-h")):
        print(usage())
        return 0
    where, action = words.pop(0) if words else "(nothing)", "start"
    check(
        where in WHERE,
        f"run.py launch {where}: unknown place.{closest(where, WHERE)} Known: {', '.join(WHERE)}",
    )
    if words and not words[0].startswith("-"):
        action = words.pop(0)
    check(
        action in ACTIONS,
        f"run.py launch {where} {action}: unknown action.{closest(action, ACTIONS)}"
        f" Known: {', '.join(ACTIONS)}",
    )
    module, cls, _ = WHERE[where]
    options = getattr(importlib.import_module(f"spmd.launch.{module}"), cls)
    launcher, job = _parse(where, options, name, words)
    return getattr(launcher, action)(job)


def _parse(where: str, options: Any, name: str | None, words: list[str]) -> tuple[Any, base.Job]:
    """The launcher with its options, and the job; a typo in either, or in a field, ends here."""
    import tyro

    prog = f"run.py launch {where}"
    cut = words.index("--") if "--" in words else len(words)
    words, extra = words[:cut], words[cut + 1 :]
    check(
        "--dry-run" not in extra, "--dry-run after -- would not reach the launcher: put it before"
    )
    if name is None:
        if {"--help", "-h"} & set(words):
            tyro.cli(options, args=["--help"], prog=prog)  # exits
        raise ValueError(
            "no experiment given; type --experiment NAME (run.py --list shows the names)"
        )
    known, launcher = registry.load(name, words, options, prog)
    _, fields = tyro.cli(options, args=words, return_unknown_args=True)
    job = base.Job(
        name=launcher.job_name(known.name),
        experiment=name,
        fields=tuple(fields),
        extra=tuple(extra),
        run_dir=known.run.dir,
    )
    return launcher, job
