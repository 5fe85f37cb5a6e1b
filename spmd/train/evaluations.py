"""Evaluations beside the task's metrics: other splits, and what needs more than sums."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from spmd.core import batches
from spmd.core.fields import check
from spmd.data import DataConfig, Source
from spmd.train.evaluate import PREFIX, Measured, evaluator, metric_names

if TYPE_CHECKING:
    from spmd.train.program import Program
    from spmd.train.snapshot import Snapshot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A measurement of the live state with a name and a cadence; a subclass says what it measures."""

    name: str
    """Its values are logged as eval/NAME/VALUE."""
    every: int = 0
    """Steps between two; 0 is that of the experiment's evaluation. Always at the end."""

    def __post_init__(self) -> None:
        check(
            bool(self.name) and all(c.isalnum() or c in "_-." for c in self.name),
            f"evaluation {self.name!r}: a name is made of letters, digits, '_', '-' and '.'",
        )
        check(self.every >= 0, f"evaluation {self.name!r}: every={self.every} must not be negative")

    def check(self, program: Program) -> None:
        """ValueError, before the first step of a program, for what could not be measured in it."""

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | None]:
        """The values by name, None where there is none; called by all processes at the same step.

        snapshot: the state as it is evaluated (the moving average where one is kept); nothing of it may be
        changed or kept.
        """
        raise NotImplementedError(f"evaluation {type(self).__name__} has no method measure")

    def logged(self, snapshot: Snapshot) -> Measured:
        """The values by the names that logs and `checkpoint.best` use."""
        values = self.measure(snapshot)
        check(
            isinstance(values, Mapping),
            f"evaluation {self.name!r} returned {type(values).__name__}, and {{name: value}} is needed",
        )
        return {f"{PREFIX}{self.name}/{k}": v if v is None else float(v) for k, v in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnData(Evaluation):
    """The task's metrics on the evaluation split of other data, as eval/NAME/loss."""

    data: DataConfig
    """Read as the experiment's own; its features must be those of the task."""

    def check(self, program: Program) -> None:
        """ValueError for features that the model or the task does not take, and for missing data."""
        batch = program._replace(data=self.data).abstract_batch("eval")
        variables = jax.eval_shape(program.task.init, jax.random.key(0))
        try:
            batches.index_ranges(program.task, variables, batch)
            metric_names(program.task, batch)
            _ = self._source
        except ValueError as error:
            raise ValueError(f"evaluation {self.name!r}: {error}") from error

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | None]:
        """The metrics of all its examples."""
        program = snapshot.program._replace(data=self.data)
        measure = evaluator(program, self._source, self.data.skips("evaluation"))
        values: Any = measure(*snapshot.variables, snapshot.state.tables)
        return {name.removeprefix(PREFIX): value for name, value in values.items()}

    @functools.cached_property
    def _source(self) -> Source:
        """The examples, opened once for all evaluations of a run."""
        return self.data.open_checked("eval")


def check_names(evaluations: tuple[Evaluation, ...]) -> None:
    """ValueError when two evaluations have one name."""
    names = [e.name for e in evaluations]
    twice = sorted({name for name in names if names.count(name) > 1})
    check(not twice, f"two evaluations are called {', '.join(twice)}: rename one")
