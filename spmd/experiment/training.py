"""Train an experiment in its run directory: claim it, compare its data, run the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from spmd.core import fields
from spmd.core.fields import check, closest
from spmd.experiment.derive import derive
from spmd.experiment.run import Run
from spmd.runtime import agree, allocator
from spmd.runtime.stop import Stop
from spmd.train import dataset, loop, rundir, tracker, trainer
from spmd.train.claim import Claim
from spmd.train.evaluate import metric_names
from spmd.train.program import Program

if TYPE_CHECKING:
    from spmd.experiment.base import Experiment


def train(exp: Experiment, stop: Stop | None) -> Run:
    """Train, or resume the run in the directory; returns the finished run. stop: collects caught signals."""
    exp = derive(exp)
    path = rundir.locate(exp.run.dir, exp.name)
    comparison = {"defaults": fields.defaults(exp), "located": fields.located_names(exp)}
    with contextlib.ExitStack() as stack:
        claims: list[Claim] = []  # of process 0

        def open_() -> bool:
            tracker.check_installed(exp.log.wandb)
            options = {"fresh": exp.run.fresh, "amend": exp.run.amend, "known": comparison}
            claim = Claim(path, exp.name, exp.config(), exp.identity(), **options)
            claims.append(claim)
            stack.callback(claim.release)
            return claim.resumes

        resumes = agree.from_first(open_, "opening the run directory")
        return _train_in(exp, path, claims, comparison, stop, resumes=resumes)


def _train_in(
    exp: Experiment,
    path: epath.Path,
    claims: Sequence[Claim],
    comparison: dict[str, Any],
    stop: Stop | None,
    *,
    resumes: bool,
) -> Run:
    """Train in a run directory that process 0 holds. claims: its claim, none in other processes."""
    program = exp.build(share=True)
    if program.mesh.devices.flat[0].platform == "cpu":
        allocator.keep_freed_memory()
    if warning := exp.pipeline_warning(program.mesh.shape["stage"]):
        agree.say(warning, sys.stderr)
    program = program._replace(evaluation=exp.data.open_checked("eval"))
    contents = dataset.describe_contents(
        exp.data, {"train": lambda: program.source, "eval": lambda: program.evaluation}
    )
    identity = exp.identity() | dataset.identity(contents)
    finished: dict[str, Any] | None = None
    if resumes:
        agree.from_first(lambda: dataset.check_unchanged(path, contents), "comparing the data")
        finished = agree.from_first(lambda: rundir.summary(path), "reading the summary")
    if finished and finished["steps"] >= program.num_steps:
        agree.say(
            f"{rundir.short_path(path)} is finished: {finished['steps']} steps. Train on with a larger"
            " --train.steps, or anew with --run.fresh or another --run.dir"
        )
        return Run(exp, str(path), finished["steps"], finished["metrics"], finished["seconds"])

    check_best(exp, program)
    for evaluation in exp.evaluations:
        evaluation.check(program)

    def begin(step: int) -> None:
        if resumes:
            report_stretched_schedule(exp, rundir.read_config(path), program, step)
        claims[0].begin(identity, step)
        dataset.write_contents(path, contents)

    def accept(about: dict[str, Any]) -> None:
        for claim in claims:
            claim.check_saved(about, identity, comparison)

    def holds() -> None:
        for claim in claims:
            claim.check()

    run = trainer.Directory(
        path, exp.config(), identity, resumes, accept=accept, begin=begin, holds=holds
    )
    settings = trainer.Settings(
        exp.train, exp.eval, exp.checkpoint, exp.log, exp.runtime, exp.evaluations
    )
    summary = loop.fit(program, run, settings, stop)
    return Run(exp, str(path), summary["steps"], summary["metrics"], summary["seconds"])


def check_best(exp: Experiment, program: Program) -> None:
    """ValueError when no evaluation gives the metric by which the best checkpoint is kept."""
    best = exp.checkpoint.best
    if not best:
        return
    names = metric_names(program.task, program.abstract_batch("eval"))
    others = tuple(f"eval/{evaluation.name}/" for evaluation in exp.evaluations)
    check(
        best in names or best.startswith(others),
        f"checkpoint.best={best!r} is no metric of an evaluation.{closest(best, names)} There are:"
        f" {', '.join(names)}; '' keeps the newest checkpoints only",
    )


def report_stretched_schedule(
    exp: Experiment, recorded: dict[str, Any], program: Program, step: int
) -> None:
    """Print a line when the run's learning-rate schedule spans another number of steps than before."""
    try:
        previous = recorded["config"]["train"]
        train = dataclasses.replace(exp.train, steps=previous["steps"], epochs=previous["epochs"])
        num_steps_before = train.num_steps(program.examples, len(program.source))
    except (KeyError, TypeError, ValueError):
        return  # config.json of another version
    num_steps = program.num_steps
    if num_steps_before == num_steps or exp.optimizer.schedule == "constant":
        return
    rate = lambda n: float(np.asarray(exp.optimizer.rate(n, program.examples)(min(step, n))))
    rates = rate(num_steps_before), rate(num_steps)
    print(
        f"the learning-rate schedule now spans {num_steps} steps (was {num_steps_before}): at step {step} the"
        f" rate is {rates[1]:.3g} (was {rates[0]:.3g})"
    )
