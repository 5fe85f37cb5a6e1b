"""A finished run: its metrics and its history."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from spmd.core.fields import check, closest

if TYPE_CHECKING:
    from spmd.experiment.base import Experiment


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run. metrics: `{'eval/accuracy': ...}`; seconds: by phase."""

    experiment: Experiment = dataclasses.field(repr=False)
    dir: str
    steps: int
    metrics: dict[str, float]
    seconds: dict[str, float]

    @property
    def history(self) -> list[dict[str, float]]:
        """Every logged step and evaluation: `{"step": 50, "time": ..., "train/loss": ...}`."""
        from etils import epath

        from spmd.train import metrics

        return metrics.read_lines(epath.Path(self.dir))

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one metric, to be plotted; ValueError when it was never logged."""
        history = self.history
        names = {key for line in history for key in line} - {"step", "time"}
        check(
            name in names,
            f"no metric {name!r} in this run.{closest(name, names)} It has: {', '.join(sorted(names))}",
        )
        points = [(line["step"], line[name]) for line in history if line.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]
