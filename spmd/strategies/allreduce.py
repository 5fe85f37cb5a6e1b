"""Synchronous SGD by hand: each device takes the gradient of its rows, an explicit psum sums them."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P

from spmd import scope, sharding
from spmd.fields import check
from spmd.mesh import BATCH_AXES
from spmd.strategies import base


def build(parts: base.Parts) -> base.Strategy:
    """Whole parameters on every device; ValueError for meshes and models that it cannot take."""
    mesh, task = parts.mesh, parts.task
    for axis, size in mesh.shape.items():
        check(
            size == 1 or axis in ("replica", "data"),
            f"strategy allreduce keeps whole parameters on each device: mesh.{axis}={size} must be 1;"
            " cut by mesh.data or mesh.replica, or use --strategy auto",
        )
    check(
        not task.whole_batch,
        f"strategy allreduce shows each device a part of the batch, and {', '.join(task.whole_batch)}"
        " would take its statistics from that part; use spmd.models.layers.BatchNorm, or --strategy auto",
    )
    params, _ = base.abstract_params(parts)
    shardings = base.shardings_of(parts, *(sharding.replicated(mesh, params),) * 2)
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)
    grads_of = base.grads_of(parts)

    def local(params, model_state, batch, step_key):
        with scope.bind(axes=axes, platform=mesh.devices.flat[0].platform):
            scale = task.scale(jax.tree.map(scope.batch_sum, task.weigh(batch)))
            grads, sums, model_state = grads_of(params, model_state, batch, step_key, scale)
            return *jax.tree.map(scope.batch_sum, (grads, sums)), model_state

    reduced = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P(axes), P()), out_specs=P())

    def step(state: base.TrainState, batch: base.Batch) -> tuple[base.TrainState, base.Metrics]:
        grads, sums, model_state = reduced(
            state.params, state.model_state, batch, base.step_key(state)
        )
        return base.update(parts, state, grads, sums, model_state)

    return base.finish(parts, shardings, step)
