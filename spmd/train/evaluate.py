"""Evaluation and prediction: every example exactly once, whatever the batch or the device count."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core.batches import Expected
from spmd.data import loader
from spmd.data.skips import Skips
from spmd.parallel import mesh as meshes
from spmd.parallel import scope, sharding

PREFIX = "eval/"
Measured = dict[str, float | None]  # {"eval/loss": 0.3}; None where no example had a weight


class Evaluator(Protocol):
    """Measures a split."""

    def __call__(
        self, params: Any, model_state: Any, interrupted: Callable[[], bool] = lambda: False
    ) -> Measured | None:
        """The metrics; None when `interrupted`, asked every few batches, said so."""
        ...


def _batches(
    mesh: Mesh,
    source: Any,
    batch_size: int,
    skips: Skips | None = None,
    expected: Expected | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """`source` in order on `mesh`; batch_size is rounded up to what the mesh divides, padding weighs 0."""
    ways = meshes.batch_shards(mesh)
    batch_size = -(-min(batch_size, len(source)) // ways) * ways
    placed = NamedSharding(mesh, sharding.batch_spec())
    rows = loader.process_rows(placed, batch_size)
    for host in loader.eval_batches(
        source, batch_size=batch_size, rows=rows, skips=skips, expected=expected
    ):
        yield loader.put(host, placed, batch_size)


def evaluator(
    task: Any,
    mesh: Mesh,
    source: Any,
    batch_size: int,
    skips: Skips | None = None,
    expected: Expected | None = None,
) -> Evaluator:
    """Measures `source` on `mesh`; sums stay on the devices until the end.

    skips, expected: as in loader.train_batches.
    """
    placement = sharding.placement(mesh)

    @jax.jit
    def measure(params, model_state, batch):
        with scope.bind(**placement):
            return task.evaluate(params, model_state, batch)

    add = jax.jit(lambda a, b: jax.tree.map(operator.add, a, b))

    def evaluate(
        params: Any, model_state: Any, interrupted: Callable[[], bool] = lambda: False
    ) -> Measured | None:
        total: Any = None
        for i, batch in enumerate(_batches(mesh, source, batch_size, skips, expected)):
            sums = measure(params, model_state, batch)
            total = sums if total is None else add(total, sums)
            if i % 4 == 3:  # bounds the steps in flight (deadlock on simulated devices)
                jax.block_until_ready(total)
                if interrupted():
                    return None
        return {
            f"{PREFIX}{name}": float(s) / float(w) if float(w) > 0 else None
            for name, (s, w) in total.items()
        }

    return evaluate


def metric_names(task: Any, batch: Any) -> list[str]:
    """The names that an evaluation gives, from the shapes of a batch."""
    variables = jax.eval_shape(task.init, jax.random.key(0))
    return [f"{PREFIX}{name}" for name in jax.eval_shape(task.evaluate, *variables, batch)]


def predictor(task: Any, mesh: Mesh, batch_size: int) -> Callable[[Any, Any, Any, Any], Any]:
    """(params, model_state, source, expected) -> the task's outputs for each example, numpy [N, ...]."""
    placement = sharding.placement(mesh)

    # Replicated, so that each process can read all rows.
    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def outputs(params, model_state, batch):
        with scope.bind(**placement):
            return task.predict(params, model_state, batch)

    def predict(params: Any, model_state: Any, source: Any, expected: Expected) -> Any:
        parts = [
            jax.device_get(outputs(params, model_state, batch))
            for batch in _batches(mesh, source, batch_size, None, expected)
        ]
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(source)], *parts)

    return predict
