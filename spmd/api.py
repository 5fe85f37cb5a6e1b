"""Experiments from Python and notebooks: loaded, trained, looked at, read back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spmd.core.storage import json_text
from spmd.experiment import registry
from spmd.experiment.base import Experiment
from spmd.experiment.run import Run

if TYPE_CHECKING:
    from spmd.analysis.compare.report import Comparison
    from spmd.analysis.plan import shardings
    from spmd.analysis.verify import VerifyReport
    from spmd.train.program import Program
    from spmd.train.snapshot import Snapshot


def load(name: str, args: Sequence[str] = ()) -> Handle:
    """The experiment of a name or path with command-line words applied.

    Args:
        name: of an experiment, or the path of its file.
        args: words as on the command line: `load("digits", ["--train.steps", "50"])`.

    Returns:
        A handle, whose methods are the commands; `.experiment` has the fields.

    Raises:
        ValueError: no such experiment, or a word is not understood.
    """
    return Handle(registry.load(name, args)[0])


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
        """Compare the step on the mesh with that of one device.

        Args:
            steps: number of steps.
            all_meshes: compare all meshes of the devices.

        Returns:
            A report: `report.verified`, `print(report)`, `report.results[0].fault`.
        """
        from spmd.analysis.verify.experiment import verify

        return verify(self.experiment, steps, all_meshes=all_meshes)

    def compare(
        self, strategies: Sequence[str], *, network: str = "10gbe", compute: float = 0.0
    ) -> Comparison:
        """Train strategies with this experiment's budget, or reuse their finished runs.

        Args:
            strategies: names with fields, `["allreduce", "local:period=50"]`.
            network: between the replicas, as in `run.py compare`.
            compute: seconds of a step's computation; 0 measures them.

        Returns:
            A comparison: print it, or let a notebook draw it.

        Raises:
            Stopped: interrupted; the next call resumes.
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
