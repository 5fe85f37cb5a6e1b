"""Experiments from Python and notebooks: loaded, trained, looked at, read back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spmd.core.storage import json_text
from spmd.experiment import files, overrides, registry
from spmd.experiment.base import Experiment
from spmd.experiment.run import Run

if TYPE_CHECKING:
    from spmd.analysis.compare.report import Comparison
    from spmd.analysis.plan import shardings
    from spmd.analysis.verify import VerifyReport
    from spmd.train.program import Program
    from spmd.train.snapshot import Snapshot


def load(name: str, args: Sequence[str] = ()) -> Handle:
    """The experiment `name` (or a path) with command-line words applied.

    `load("digits", ["--train.steps", "50"])`; its fields are those of `.experiment`. ValueError when a word
    is not understood.
    """
    base = registry.from_file(files.find(name))
    return Handle(overrides.override(base, args)[0])


class Handle:
    """An experiment with its commands as methods; each may be called repeatedly, as in notebooks."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment

    def build(self, devices: Sequence[Any] | None = None) -> Program:
        """The program: mesh, task, strategy and data, without training."""
        return self.experiment.build(devices)

    def init(self) -> Snapshot:
        """The initial state on the mesh; writes nothing."""
        from spmd.train.snapshot import Snapshot

        program = self.build()
        return Snapshot(program, program.init())

    def train(self) -> Run:
        """Train, resume, or return the finished run, depending on the run directory.

        Interrupted (Ctrl-C, a notebook's stop button), it saves and raises spmd.train.trainer.Stopped; the
        next call resumes.
        """
        return self.experiment.train_run()

    def verify(self, steps: int = 20, *, all_meshes: bool = False) -> VerifyReport:
        """Compare the step on the mesh (or on all meshes of the devices) with that of one device:
        `report.verified`, `print(report)`, `report.results[0].fault`.
        """
        from spmd.analysis.verify.experiment import verify

        return verify(self.experiment, steps, all_meshes=all_meshes)

    def compare(
        self, strategies: Sequence[str], *, network: str = "10gbe", compute: float = 0.0
    ) -> Comparison:
        """Train strategies (`["allreduce", "local:period=50"]`) with this experiment's budget, or reuse their
        finished runs; print the result, or let a notebook draw it.

        network, compute: as in `run.py compare`. Interrupted, it raises Stopped; the next call resumes.
        """
        from spmd.analysis import compare

        return compare.run(self.experiment, strategies, network=network, compute=compute)

    def plan(self, target: str = "") -> shardings.ShardingReport:
        """Shardings of the state on devices that need not be present (`h100:64`, `v5p:4x4x4`): print the
        report, or use its `.arrays` and `.totals`.
        """
        from spmd.analysis.plan import planner

        return planner.shardings(self.experiment, target)

    def restore(self, step: int | None = None) -> Snapshot:
        """A checkpoint of the run directory, the newest unless `step` names one."""
        return self.experiment.restore(step)

    def evaluate(self, step: int | None = None) -> dict[str, float]:
        """Metrics of a checkpoint on the evaluation split: `{"eval/accuracy": ...}`."""
        return self.experiment.evaluate(step)

    def __repr__(self) -> str:
        return json_text(self.experiment.config(), indent=1)
