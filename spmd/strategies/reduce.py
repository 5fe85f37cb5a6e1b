"""What the explicit strategies share: each device's gradient by shard_map, then a Reducer that sums them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd import scope, tree
from spmd.fields import check
from spmd.mesh import BATCH_AXES
from spmd.strategies import base

PyTree = Any
Leaves = dict[str, jax.Array]  # by path name
Sum = Callable[[Leaves], Leaves]
MiB = 2**20


class Reducer(NamedTuple):
    """The second part of a step, run inside shard_map over the axes of the batch.

    init: params -> state: {} or {"own": leaves of which each device has its own, their first dim, "common":
    leaves that are the same on all}. reduce: (gradients of this device, state) -> (their sum over the
    devices, as the strategy wants it, state); its "own" without the first dim.
    """

    init: Callable[[PyTree], PyTree]
    reduce: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


def plain(total: Callable[[PyTree], PyTree]) -> Reducer:
    """A sum that carries nothing."""
    return Reducer(init=lambda params: {}, reduce=lambda grads, state: (total(grads), state))


def axes_of(parts: base.Parts, strategy: str, holds: str) -> tuple[str, ...]:
    """The mesh axes over which gradients are summed; ValueError for meshes and models that a strategy of
    replica and data axes cannot take.
    """
    for axis, size in parts.mesh.shape.items():
        check(
            size == 1 or axis in ("replica", "data"),
            f"strategy {strategy} {holds}: mesh.{axis}={size} must be 1;"
            " cut by mesh.data or mesh.replica, or use --strategy auto",
        )
    check(
        not parts.task.whole_batch,
        f"strategy {strategy} shows each device a part of the batch, and"
        f" {', '.join(parts.task.whole_batch)} would take its statistics from that part; use"
        " spmd.models.layers.BatchNorm, or --strategy auto",
    )
    return tuple(axis for axis in BATCH_AXES if parts.mesh.shape[axis] > 1)


def gradients(parts: base.Parts, axes: tuple[str, ...]) -> Callable[..., Any]:
    """(params, model_state, batch, step_key) -> (each device's gradient, its first dim; metric sums over all
    devices; model_state). Parameters come whole.
    """
    grads_of = base.grads_of(parts)

    def local(params, model_state, batch, step_key):
        with bound(parts, axes):
            scale = parts.task.scale(jax.tree.map(scope.batch_sum, parts.task.weigh(batch)))
            grads, sums, model_state = grads_of(params, model_state, batch, step_key, scale)
            return first_dim(grads), jax.tree.map(scope.batch_sum, sums), model_state

    return jax.shard_map(
        local,
        mesh=parts.mesh,
        in_specs=(P(), P(), P(axes), P()),
        out_specs=(P(axes), P(), P()),
    )


def reduced(
    parts: base.Parts,
    axes: tuple[str, ...],
    reducer: Reducer,
    out_specs: PyTree,
    *,
    check_vma: bool = False,
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
    """(gradients as of `gradients`, state) -> (summed, as out_specs says, state).

    check_vma: off by default, since gathers and rings are typed as differing by device, though they do not;
    that they do not is tested.
    """

    def local(grads, state):
        with bound(parts, axes):
            grads, state = (without_first_dim(grads), unpacked(state, without_first_dim))
            grads, state = reducer.reduce(grads, state)
            return grads, unpacked(state, first_dim)

    def apply(grads, state):
        held = {part: P(axes) if part == "own" else P() for part in state}
        return jax.shard_map(
            local,
            mesh=parts.mesh,
            in_specs=(P(axes), held),
            out_specs=(out_specs, held),
            check_vma=check_vma,
        )(grads, state)

    return apply


def state_shardings(parts: base.Parts, axes: tuple[str, ...], reducer: Reducer) -> PyTree:
    """Of the reducer's state."""
    params, _ = base.abstract_params(parts)
    state = jax.eval_shape(reducer.init, params)
    return {
        part: jax.tree.map(
            lambda _, part=part: NamedSharding(parts.mesh, P(axes) if part == "own" else P()), held
        )
        for part, held in state.items()
    }


def bound(parts: base.Parts, axes: tuple[str, ...]) -> Any:
    """The scope of what runs on a part of the batch."""
    return scope.bind(axes=axes, platform=parts.mesh.devices.flat[0].platform)


def first_dim(part: PyTree) -> PyTree:
    """[...] -> [1, ...]: this device's."""
    return jax.tree.map(lambda x: x[None], part)


def without_first_dim(part: PyTree) -> PyTree:
    """[1, ...] -> [...]."""
    return jax.tree.map(lambda x: x[0], part)


def unpacked(state: Mapping[str, PyTree], change: Callable[[PyTree], PyTree]) -> dict[str, PyTree]:
    """A reducer's state with `change` on what each device has of its own."""
    return {part: change(held) if part == "own" else held for part, held in state.items()}


def by_name(sum_: Callable[[Leaves, PyTree], tuple[Leaves, PyTree]]) -> Callable[..., Any]:
    """A reduce function of named leaves as one of a pytree."""

    def reduce(grads: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        leaves, state = sum_(tree.named_leaves(grads), state)
        return tree.map_named(lambda name, _: leaves[name], grads), state

    return reduce
