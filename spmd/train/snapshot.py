"""The state of a program at one step, to inspect, evaluate and predict with outside the loop."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath

from spmd.core import tree
from spmd.core.batches import Expected
from spmd.core.fields import check
from spmd.data import Features
from spmd.data.sources import ArraySource
from spmd.parallel import mesh as meshes
from spmd.strategies import base
from spmd.train import CheckpointConfig
from spmd.train.checkpoint.store import Checkpoints
from spmd.train.evaluate import evaluator, predictor
from spmd.train.program import Program

if TYPE_CHECKING:
    from spmd.train.retrieval import Recommendations, Retriever


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Snapshot:
    """A program and a state of it, on the program's mesh."""

    program: Program
    state: base.TrainState

    @property
    def step(self) -> int:
        """Number of optimizer steps taken."""
        return int(self.state.step)

    @property
    def variables(self) -> tuple[Any, Any]:
        """(params, model_state) as they are evaluated."""
        return self.program.strategy.eval_variables(self.state)

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """Every array of the state by its path name, `params/head/kernel`, sharded over the mesh."""
        return tree.named_leaves(self.state)

    def evaluate(self) -> dict[str, float]:
        """`{"eval/accuracy": ...}` over the evaluation split."""
        metrics = self._evaluator(*self.variables, self.state.tables)
        unweighted = [name for name, value in metrics.items() if value is None]
        check(
            not unweighted,
            f"no example of the evaluation split has a weight in {', '.join(unweighted)}: nothing is"
            " measured",
        )
        return metrics

    def predict(self, examples: Mapping[str, Any]) -> Any:
        """Predictions of the task for N examples, as numpy: for classes the logits float [N, classes].

        examples: `{feature: [N, ...]}`, at least the task's inputs, as a data source's `take` gives them.
        ValueError when a feature is missing or not as the experiment declares it.
        """
        declared = self.program.data.features
        features = {name: declared[name] for name in declared if name in examples}
        parts = [*self._predictions(ArraySource(examples, features), features)]
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def predictions(self, source: Any) -> Iterator[Any]:
        """Predictions for the examples of a source in its order, a batch at a time: numpy [n, ...] each."""
        return self._predictions(source, self.program.data.features)

    def _predictions(self, source: Any, features: Features) -> Iterator[Any]:
        """As `predictions`, of a source that has these features; none that only the loss reads is checked."""
        ranges = {k: ids for k, ids in self.program.ranges.items() if not ids.target}
        expected = Expected("given", features, ranges)
        transform = self.program.data.pipeline("eval", source, self.program.seed, features=features)
        variables = (*self.variables, self.state.tables)
        return self._predictor(*variables, source, expected, transform)

    def recommend(self, users: Sequence[Any], k: int = 10) -> Recommendations:
        """The k items of highest score for each user, exact, over the item table of all devices.

        users: raw ids, of a log of users and items. ValueError for a user that is unknown or has no history.
        """
        from spmd.train.retrieval import recommend

        return recommend(self.retriever, users, k)

    @functools.cached_property
    def retriever(self) -> Retriever:
        """Ranks all items for users; ValueError where the data or the model knows no items."""
        from spmd.train.retrieval import Retriever

        return Retriever(self)

    @functools.cached_property
    def _evaluator(self) -> Any:
        program = self.program
        return evaluator(program, program.open_evaluation(), program.data.skips("evaluation"))

    @functools.cached_property
    def _predictor(self) -> Any:
        program = self.program
        return predictor(program.task, program.mesh, program.data.eval_batch_size)

    def __repr__(self) -> str:
        return f"{self.program.name} at step {self.step} on {meshes.describe(self.program.mesh)}"


def restore(
    program: Program,
    directory: epath.Path,
    config: CheckpointConfig,
    step: int | None = None,
    accept: Callable[[dict[str, Any]], None] = lambda about: None,
) -> Snapshot:
    """A checkpoint of a run directory (default: the newest), placed on the program's mesh.

    accept: as Checkpoints.restore takes it.
    """
    checkpoints = Checkpoints(directory / "checkpoints", config, writing=False)
    try:
        abstract, shardings = program.abstract_state(), program.strategy.state_shardings
        return Snapshot(program, checkpoints.restore(abstract, shardings, step, accept))
    finally:
        checkpoints.close()
