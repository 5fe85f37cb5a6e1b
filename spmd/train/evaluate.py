"""Evaluation and prediction: every example exactly once, whatever the batch or the device count."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd import metrics
from spmd.core.batches import Expected
from spmd.data import loader
from spmd.data.skips import Skips
from spmd.data.transform import BatchTransform
from spmd.parallel import mesh as meshes
from spmd.parallel import scope, sharding
from spmd.parallel.sparse import ShardedTables
from spmd.parallel.tables import SparseTable
from spmd.train.program import Program

PREFIX = "eval/"  # of all values that an evaluation logs
IN_FLIGHT = 4  # evaluation steps that may run at once (more deadlock on simulated devices)
Measured = dict[str, float | None]  # {"eval/loss": 0.3}; None where no example had a weight


class Evaluator(Protocol):
    """Measures a split."""

    def __call__(
        self,
        params: Any,
        model_state: Any,
        tables: Any,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Measured | None:
        """The metrics; None when `interrupted`, asked every few batches, said so."""
        ...


def _batches(
    mesh: Mesh,
    source: Any,
    batch_size: int,
    skips: Skips | None = None,
    expected: Expected | None = None,
    transform: BatchTransform | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """`source` in order on `mesh`; batch_size is rounded up to what the mesh divides, padding weighs 0."""
    ways = meshes.batch_shards(mesh)
    batch_size = -(-min(batch_size, len(source)) // ways) * ways
    placed = NamedSharding(mesh, sharding.batch_spec())
    rows = loader.process_rows(placed, batch_size)
    for host in loader.eval_batches(
        source,
        batch_size=batch_size,
        rows=rows,
        skips=skips,
        expected=expected,
        transform=transform,
    ):
        yield loader.put(host, placed, batch_size)


def evaluator(program: Program, source: Any, skips: Skips) -> Evaluator:
    """Measures the task of a program on `source`, read as the program's evaluation data is.

    The sums of each batch are added on the host, some batches later. skips: as in loader.eval_batches.
    """
    task, mesh, batch_size = program.task, program.mesh, program.data.eval_batch_size
    expected = program.expected("evaluation")
    transform = program.evaluation_transform(source, skips)
    measure = _measuring(task.evaluate, mesh, tuple(task.tables.items()))

    def evaluate(
        params: Any,
        model_state: Any,
        tables: Any,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Measured | None:
        total: Any = None
        running: collections.deque[Any] = collections.deque()
        for i, batch in enumerate(_batches(mesh, source, batch_size, skips, expected, transform)):
            running.append(measure(params, model_state, tables, batch))
            if len(running) > IN_FLIGHT:
                total = _added(total, running.popleft())
            if i % IN_FLIGHT == IN_FLIGHT - 1 and interrupted():
                return None
        while running:
            total = _added(total, running.popleft())
        return named(task.measured(total or {}))

    return evaluate


@functools.lru_cache(maxsize=8)
def _measuring(
    evaluate: Callable[..., Any], mesh: Mesh, declared: tuple[tuple[str, SparseTable], ...]
) -> Callable[..., Any]:
    """The compiled sums of a batch; one for all evaluations by a function of a task.

    declared: the sparse tables of its model.
    """
    placement, sharded = sharding.placement(mesh), ShardedTables(dict(declared), mesh)

    @jax.jit
    def measure(params, model_state, tables, batch):
        batch = {**batch, **sharded.pull(tables, batch).rows}
        with scope.bind(**placement):
            return evaluate(params, model_state, batch)

    return measure


def _added(total: Any, sums: Any) -> Any:
    """The totals on the host after a batch's sums, which it waits for."""
    host = jax.device_get(sums)
    return metrics.add_sums(jax.tree.map(np.zeros_like, host) if total is None else total, host)


def named(values: Mapping[str, float | None]) -> Measured:
    """The values of an evaluation by the names that logs and `checkpoint.best` use."""
    return {f"{PREFIX}{name}": value for name, value in values.items()}


def metric_names(task: Any, batch: Any) -> list[str]:
    """The names that an evaluation gives, from the shapes of a batch."""
    variables = jax.eval_shape(task.init, jax.random.key(0))
    shapes = jax.eval_shape(task.evaluate, *variables, task.with_rows(batch))
    return list(named(task.measured(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))))


def predictor(task: Any, mesh: Mesh, batch_size: int) -> Callable[..., Iterator[Any]]:
    """(params, model_state, tables, source, expected, transform) -> outputs of each batch, numpy [n, ...]."""
    placement, sharded = sharding.placement(mesh), ShardedTables(task.tables, mesh)

    # Replicated, so that each process can read all rows.
    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def outputs(params, model_state, tables, batch):
        batch = {**batch, **sharded.pull(tables, batch).rows}
        with scope.bind(**placement):
            return task.predict(params, model_state, batch)

    def predict(
        params: Any,
        model_state: Any,
        tables: Any,
        source: Any,
        expected: Expected,
        transform: BatchTransform | None,
    ) -> Iterator[Any]:
        remaining = len(source)
        for batch in _batches(mesh, source, batch_size, None, expected, transform):
            rows = min(remaining, jax.tree.leaves(batch)[0].shape[0])
            yield jax.tree.map(
                lambda x, n=rows: x[:n],
                jax.device_get(outputs(params, model_state, tables, batch)),
            )
            remaining -= rows

    return predict
