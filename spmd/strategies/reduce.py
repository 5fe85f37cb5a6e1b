"""Base of the explicit strategies: each device's gradient in a shard_map, then a Reducer that sums them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import tree
from spmd.core.fields import check
from spmd.parallel import scope, sharding
from spmd.parallel.communicator import Communicator, divide_among_copies
from spmd.strategies import base
from spmd.strategies.grads.direct import Trained

PyTree = Any
Leaves = dict[str, jax.Array]  # by path name
MiB = 2**20
# Cut the model and its batch within each replica, by rules; collectives over them are the compiler's.
WITHIN = ("fsdp", "stage", "context", "expert", "tensor")


# Keys of a reducer's state, in checkpoints too.
PER_DEVICE = "own"  # different on each device: stacked, [N, ...], outside of the shard_map
COMMON = "common"  # equal on all devices


class Reducer(NamedTuple):
    """Second part of a step, run by each device in a shard_map (or vmap) over the axes of the batch.

    init: parameters -> the state of a device, {} or {PER_DEVICE: ..., COMMON: ...}.
    reduce: (gradients of this device, state) -> (their sum over the devices, all or a shard of it, state).
    specs: (parameters, their specs within a replica) -> specs of the state of a device within a replica.
    """

    init: Callable[[PyTree], PyTree]
    reduce: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    specs: Callable[[PyTree, PyTree], PyTree]


def stateless(sum_: Callable[[PyTree], PyTree]) -> Reducer:
    """A Reducer that carries nothing from step to step."""
    return Reducer(
        init=lambda params: {},
        reduce=lambda grads, state: (sum_(grads), state),
        specs=lambda params, specs: {},
    )


def each_term(reducer: Reducer) -> Reducer:
    """A Reducer of gradients [K, ...] by one of gradients [...] that keeps no state."""

    def reduce(grads: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        num = jax.tree.leaves(grads)[0].shape[0]
        terms = [jax.tree.map(lambda g, k=k: g[k], grads) for k in range(num)]
        sums = [reducer.reduce(term, state)[0] for term in terms]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *sums), state

    return reducer._replace(reduce=reduce)


def init_state(reducer: Reducer, num_devices: int, params: PyTree) -> PyTree:
    """The reducer's state of all devices, to begin with.

    Args:
        reducer: whose state.
        num_devices: that reduce.
        params: of the model.
    """
    stack = lambda x: jnp.broadcast_to(x, (num_devices, *x.shape))
    return map_per_device(lambda part: jax.tree.map(stack, part), reducer.init(params))


def state_shardings(parts: base.Parts, axes: tuple[str, ...], reducer: Reducer) -> PyTree:
    """Shardings of `init_state`: what differs by device is sharded over the reduction's axes first.

    Args:
        parts: as of every strategy.
        axes: of the reduction.
        reducer: whose state.
    """
    params, _ = base.abstract_params(parts)
    param_specs = jax.tree.map(lambda s: s.spec, param_shardings(parts))
    specs = reducer.specs(params, param_specs)
    specs = map_per_device(lambda part: jax.tree.map(lambda spec: P(axes, *spec), part), specs)
    return jax.tree.map(lambda spec: NamedSharding(parts.mesh, spec), specs)


def communicator(parts: base.Parts, axes: tuple[str, ...]) -> Communicator:
    """The devices along `axes`, for use within a shard_map over them."""
    group = Communicator(axes, num_devices(parts, axes))
    if not shares_model(parts):
        return group
    return divide_among_copies(group, parts.mesh, axes)


def num_devices(parts: base.Parts, axes: tuple[str, ...]) -> int:
    """Devices along `axes`."""
    return math.prod(parts.mesh.shape[axis] for axis in axes)


def reduction_axes(parts: base.Parts, strategy: str) -> tuple[str, ...]:
    """The mesh axes over which gradients are summed; ValueError for models that cannot be shown a part of the
    batch.
    """
    check(
        not parts.task.whole_batch,
        f"strategy {strategy} shows each device a part of the batch, and"
        f" {', '.join(parts.task.whole_batch)} would take its statistics from that part; use"
        " spmd.models.layers.BatchNorm, or --strategy auto",
    )
    return tuple(axis for axis in ("replica", "data") if parts.mesh.shape[axis] > 1)


def shares_model(parts: base.Parts) -> bool:
    """Whether several devices share the model of a replica."""
    return any(parts.mesh.shape[axis] > 1 for axis in WITHIN)


def param_shardings(parts: base.Parts) -> PyTree:
    """Shardings of the parameters in each replica."""
    params, _ = base.abstract_params(parts)
    return sharding.param_shardings(params, parts.task.dims, parts.mesh, fsdp=True)


def check_noise_scale(parts: base.Parts, kind: str) -> None:
    """ValueError where the noise scale would be told from gradients that compression has changed."""
    check(
        not parts.noise_scale or kind == "none",
        f"train.noise_scale compares gradients, which strategy.compress.kind={kind} changes; use kind none",
    )


def build_gradients(parts: base.Parts, axes: tuple[str, ...]) -> Callable[..., Any]:
    """A function (Trained, model_state, batch, step_key) -> (gradients as Trained, metric sums over all
    devices, model_state), with the parameters sharded as within a replica.

    Gradients of parameters are [N, ...], those of each replica; those of rows are sharded as the batch is.
    """
    grads_of = base.grads_of(parts)

    def local(trained, model_state, batch, step_key):
        with bind_scope(parts, axes):
            scale = parts.task.scale(jax.tree.map(scope.batch_sum, parts.task.weigh(batch)))
            grads, sums, model_state = grads_of(trained, model_state, batch, step_key, scale)
            grads = Trained(add_device_dim(grads.params), grads.rows)
            return grads, jax.tree.map(scope.batch_sum, sums), model_state

    # Kernels, and shard_maps within a replica, say nothing of how their results vary.
    return _shard_map(
        parts,
        local,
        in_specs=(Trained(P(), P(axes)), P(), P(axes), P()),
        out_specs=(P(axes), P(), P()),
        check_vma=False,
        over=axes if shares_model(parts) else parts.mesh.axis_names,
    )


def _shard_map(parts: base.Parts, fn: Any, *, over: Sequence[str], **how: Any) -> Any:
    """A shard_map over some axes; over none there is nothing to map."""
    return jax.shard_map(fn, **how, **sharding.shard_map_options(parts.mesh, over)) if over else fn


def build_reduction(
    parts: base.Parts,
    axes: tuple[str, ...],
    reducer: Reducer,
    out_specs: PyTree,
    *,
    check_vma: bool = False,
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
    """A function (gradients of `build_gradients`, state) -> (their sums, state).

    Each device sums its shards of its replica's gradients.

    Args:
        parts: as of every strategy.
        axes: of the reduction.
        reducer: sums the gradients.
        out_specs: specs of the sums.
        check_vma: off by default, since gathers and rings are typed as differing by device, though they do
            not; that they do not is tested.
    """

    if by_term := parts.task.combine is not None:
        reducer = each_term(reducer)
    lead = (None,) if by_term else ()

    def local(grads, state):
        with bind_scope(parts, axes):
            grads, state = (drop_device_dim(grads), map_per_device(drop_device_dim, state))
            grads, state = reducer.reduce(grads, state)
            return grads, map_per_device(add_device_dim, state)

    grad_specs = jax.tree.map(lambda s: P(axes, *lead, *s.spec), param_shardings(parts))
    out_specs = jax.tree.map(lambda spec: P(*lead, *spec), out_specs)
    sum_specs = jax.tree.map(lambda spec: keep_axes(spec, axes), out_specs)

    def apply(grads, state):
        state_specs = {key: P(axes) if key == PER_DEVICE else P() for key in state}
        # A stateful reducer gets the whole arrays of its replica; the compiler partitions its work.
        over_axes = shares_model(parts) and bool(state)
        return _shard_map(
            parts,
            local,
            in_specs=(P(axes) if over_axes else grad_specs, state_specs),
            out_specs=(sum_specs if over_axes else out_specs, state_specs),
            check_vma=check_vma,
            over=axes if over_axes else parts.mesh.axis_names,
        )(grads, state)

    return apply


def keep_axes(spec: P, axes: tuple[str, ...]) -> P:
    """The spec with the entries of `axes` only."""
    return P(*(entry if entry in (axes, *axes) else None for entry in spec))


def bind_scope(parts: base.Parts, axes: tuple[str, ...]) -> Any:
    """The scope of what runs on a part of the batch."""
    placed = sharding.placement(parts.mesh) | {"partial": True} if shares_model(parts) else {}
    return scope.bind(axes=axes, **{"platform": parts.mesh.devices.flat[0].platform} | placed)


def add_device_dim(part: PyTree) -> PyTree:
    """[...] -> [1, ...]."""
    return jax.tree.map(lambda x: x[None], part)


def drop_device_dim(part: PyTree) -> PyTree:
    """[1, ...] -> [...]."""
    return jax.tree.map(lambda x: x[0], part)


def map_per_device(
    fn: Callable[[PyTree], PyTree], state: Mapping[str, PyTree]
) -> dict[str, PyTree]:
    """A reducer's state with `fn` of the part that differs by device."""
    return {key: fn(part) if key == PER_DEVICE else part for key, part in state.items()}


def on_named_leaves(
    reduce: Callable[[Leaves, PyTree], tuple[Leaves, PyTree]],
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
    """A reduce function of {path name: gradient} as one of the gradients' tree."""

    def reduce_tree(grads: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        sums, state = reduce(tree.named_leaves(grads), state)
        return tree.map_named(lambda name, _: sums[name], grads), state

    return reduce_tree
