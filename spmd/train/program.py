"""A built experiment: the mesh, task, strategy and data that training, planning and verifying share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from spmd.core.batches import Expected, Ranges
from spmd.data import DataConfig, Split, loader
from spmd.data.skips import Skips
from spmd.data.transform import BatchTransform
from spmd.strategies import base
from spmd.strategies.privacy import Mechanism


class Program(NamedTuple):
    """A built experiment: mesh, task, strategy and data."""

    name: str
    seed: int
    mesh: jax.sharding.Mesh
    task: Any
    strategy: base.Strategy
    num_steps: int
    data: DataConfig
    source: Any  # training source
    start: Callable[[Any, base.TrainState], base.TrainState] | None = None  # (self, state) -> state
    order: Callable[[Any], Any] = lambda source: None  # source -> its order; None is its own
    privacy: Mechanism | None = None
    evaluation: Any = None  # evaluation source, where it is open already
    skips: Skips | None = None  # bad training records that may pass
    ranges: Ranges = MappingProxyType({})  # of the features that are indices

    def open_evaluation(self) -> Any:
        """The source of the evaluation split."""
        return self.data.open_checked("eval") if self.evaluation is None else self.evaluation

    def evaluation_transform(
        self, source: Any, skips: Skips | None = None
    ) -> BatchTransform | None:
        """The transforms of examples of `source` that are evaluated or predicted; None without any."""
        return self.data.pipeline("eval", source, self.seed, skips)

    def expected(self, split: str) -> Expected:
        """Checks of each batch of a split (`training`, `evaluation`)."""
        return Expected(split, self.data.features, self.ranges)

    def init(self) -> base.TrainState:
        """The state before the first step, every array created on the mesh with its sharding."""
        state = self.strategy.init(jax.random.key(self.seed))
        return self.start(self, state) if self.start else state

    @property
    def examples(self) -> int:
        """Examples of a step; under privacy their expected number, since rows may be empty."""
        return self.privacy.examples if self.privacy else self.data.batch_size

    def abstract_state(self) -> base.TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self.strategy.init, jax.random.key(0))

    def abstract_batch(self, split: Split = "train") -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the global batch after its transforms."""
        shapes = self.data.abstract_batch(self.data.batch_size, split)
        return {name: jax.ShapeDtypeStruct(*leaf) for name, leaf in shapes.items()}

    def host_batches(
        self, start: int, stop: int, steps_per_dispatch: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of the training batches of steps [start, stop); see loader.train_batches."""
        batch_sharding = jax.tree.leaves(self.strategy.batch_shardings)[0]
        return loader.train_batches(
            self.source,
            batch_size=self.data.batch_size,
            seed=self.seed,
            start=start,
            stop=stop,
            steps_per_dispatch=steps_per_dispatch,
            rows=loader.process_rows(batch_sharding, self.data.batch_size),
            threads=self.data.threads,
            buffer=self.data.buffer,
            transform=self.data.pipeline("train", self.source, self.seed, self.skips),
            order=self.order(self.source),
            skips=self.skips,
            expected=self.expected("training"),
        )
