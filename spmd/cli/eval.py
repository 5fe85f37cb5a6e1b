"""run.py eval: evaluate a checkpoint of a run, on any mesh."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spmd.core.fields import check
from spmd.core.storage import json_text
from spmd.experiment import registry

if TYPE_CHECKING:
    from spmd.experiment.base import Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of `run.py eval`."""

    step: int = -1
    """Step of the checkpoint; -1 is the newest."""
    tasks: str = ""
    """Instead of the experiment's evaluation: tasks of lm-evaluation-harness (pip install lm_eval), names or
    .yaml files, with commas."""
    limit: int = 0
    """Most documents of each task; 0 is all."""
    shots: int = -1
    """Examples before each document; -1 is what the task says."""
    task_code: bool = False
    """Allow task files to name Python (!function), which is then executed."""


def run(name: str, words: Sequence[str]) -> int:
    """Print the metrics as one line of JSON."""
    exp, options = registry.load(name, words, EvalOptions)
    if options.tasks:
        return _judge(exp, options)
    for name in ("limit", "shots", "task_code"):
        given = getattr(options, name) != getattr(EvalOptions(), name)
        check(not given, f"--{name.replace('_', '-')} is for --tasks, which is not given")
    metrics = exp.evaluate(None if options.step < 0 else options.step)
    print(json_text(metrics))
    if nonfinite := [name for name, value in metrics.items() if not math.isfinite(value)]:
        print(f"note: {', '.join(nonfinite)}: not finite, null in JSON", file=sys.stderr)
    return 0


def _judge(exp: Experiment, options: EvalOptions) -> int:
    """Print the results of harness tasks as one line of JSON, and record them in a finished run.

    Without a run, the weights of init.from are judged.
    """
    from spmd.cli import harness
    from spmd.runtime import agree
    from spmd.tasks import LanguageModel
    from spmd.train import rundir

    harness.check_installed()
    check(
        isinstance(exp.task, LanguageModel) and hasattr(exp.model, "length"),
        f"--tasks judges causal language models, and this experiment is {type(exp.model).__name__} with task"
        f" {type(exp.task).__name__}",
    )
    tokenizer = exp.data.open_tokenizer()
    path = rundir.locate(exp.run.dir, exp.name)
    is_run = (path / "config.json").exists()
    step = None if options.step < 0 else options.step
    snapshot = (
        exp.restore(step, same=("tokenizer",)) if is_run or not exp.init.from_ else exp.initial()
    )
    length, rows = exp.model.length, exp.data.eval_batch_size or exp.data.batch_size
    model = harness.build_model(snapshot, tokenizer, length, rows)
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    chosen = {"limit": options.limit, "shots": options.shots, "code": options.task_code}
    metrics = harness.metrics_of(harness.judge(model, names, **chosen))
    if agree.is_first():
        print(json_text(metrics))
        if is_run:
            harness.record(exp, path, snapshot.step, metrics)
    return 0
