"""Sparse tables in a step: their part of the state, the rows that a batch needs, the update of those rows."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from spmd.core import narrow, tree
from spmd.parallel.owners import ROWS
from spmd.parallel.sparse import Arrays, Pulled, RowRule, ShardedTables, StepOfRows
from spmd.parallel.tables import initial_rows

if TYPE_CHECKING:
    from spmd.strategies.base import Parts, TrainState


def sharded_tables(parts: Parts) -> ShardedTables:
    """The tables of the task's model on the mesh."""
    return ShardedTables(parts.task.tables, parts.mesh)


def init(parts: Parts, key: jax.Array) -> Arrays:
    """Random rows, and the state of their optimizer, 0.

    Args:
        parts: as of every strategy.
        key: [] of the draws.

    Returns:
        {stack: {"rows": ..., ...}}; {} without tables.
    """
    arrays: Arrays = {}
    for stacked in sharded_tables(parts).stacks:
        dtype, placement = parts.task.row_dtype, stacked.placement
        drawn = jax.random.fold_in(key, jnp.uint32(zlib.crc32(stacked.name.encode())))
        slots = parts.rows.slots(placement.shape, placement.rows)
        arrays[stacked.name] = {
            ROWS: initial_rows(stacked, parts.task.tables, drawn, dtype).astype(
                jnp.bfloat16 if parts.rows.narrow else dtype
            ),
            **{name: jnp.zeros(shape, dtype) for name, shape in slots.items()},
        }
    return arrays


def shardings(parts: Parts) -> Any:
    """Shardings of `init`."""
    shapes = jax.eval_shape(lambda: init(parts, jax.random.key(0)))
    return sharded_tables(parts).shardings(shapes)


def pull(parts: Parts, state: TrainState, batch: Any) -> Pulled:
    """The rows that a step's batch looks up: once a step, for all microbatches."""
    return sharded_tables(parts).pull(state.tables, batch, parts.task.row_dtype)


def push(parts: Parts, state: TrainState, pulled: Pulled, grads: Any, finite: jax.Array) -> Arrays:
    """The tables after a step, updated in place.

    Args:
        parts: as of every strategy.
        state: before the step.
        pulled: the lookups of the batch.
        grads: of pulled.rows, of each example.
        finite: bool []; a step that is not touches no row.

    Returns:
        The arrays.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    return sharded_tables(parts).push(
        state.tables,
        pulled,
        grads,
        RowRule(parts.rows.update, parts.row_rates),
        StepOfRows(
            jnp.asarray(parts.rate(state.step)),
            state.step,
            jax.random.key_data(jax.random.fold_in(key, jnp.int32(narrow.ROUNDING))),
            finite,
        ),
    )


def all_finite(grads: Any) -> jax.Array:
    """Whether all gradients of rows are finite, bool []."""
    finite = [jnp.isfinite(x).all() for x in tree.named_leaves(grads).values()]
    return jnp.stack(finite).all() if finite else jnp.asarray(True)
