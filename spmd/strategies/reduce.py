"""Base of the explicit strategies: each device's gradient by shard_map, then a Reducer that sums them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import tree
from spmd.core.fields import check
from spmd.parallel import scope, sharding
from spmd.strategies import base

PyTree = Any
Leaves = dict[str, jax.Array]  # by path name
Sum = Callable[[Leaves], Leaves]
MiB = 2**20
# Cut the model and its batch within each replica, by rules; collectives over them are the compiler's.
WITHIN = ("fsdp", "stage", "context", "expert", "tensor")


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


def axes_of(parts: base.Parts, strategy: str) -> tuple[str, ...]:
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


def within(parts: base.Parts) -> bool:
    """Whether the devices of a replica share a model."""
    return any(parts.mesh.shape[axis] > 1 for axis in WITHIN)


def param_shardings(parts: base.Parts) -> PyTree:
    """Shardings of the parameters in each replica."""
    params, _ = base.abstract_params(parts)
    return sharding.param_shardings(params, parts.task.dims, parts.mesh, fsdp=True)


def check_measured(parts: base.Parts, kind: str) -> None:
    """ValueError where the noise scale would be told from gradients that compression has changed."""
    check(
        not parts.noise_scale or kind == "none",
        f"train.noise_scale compares gradients, which strategy.compress.kind={kind} changes; use kind none",
    )


def gradients(parts: base.Parts, axes: tuple[str, ...]) -> Callable[..., Any]:
    """(params, model_state, batch, step_key) -> (each replica's gradient, its first dim; metric sums over all
    devices; model_state). Parameters are those of a replica.
    """
    grads_of = base.grads_of(parts)

    def local(params, model_state, batch, step_key):
        with bound(parts, axes):
            scale = parts.task.scale(jax.tree.map(scope.batch_sum, parts.task.weigh(batch)))
            grads, sums, model_state = grads_of(params, model_state, batch, step_key, scale)
            return first_dim(grads), jax.tree.map(scope.batch_sum, sums), model_state

    # Kernels, and shard_maps within a replica, say nothing of how their results vary.
    return _mapped(
        parts,
        local,
        in_specs=(P(), P(), P(axes), P()),
        out_specs=(P(axes), P(), P()),
        check_vma=False,
        over=axes if within(parts) else parts.mesh.axis_names,
    )


def _mapped(parts: base.Parts, fn: Any, *, over: Sequence[str], **how: Any) -> Any:
    """A shard_map over some axes; over none there is nothing to map."""
    return jax.shard_map(fn, **how, **sharding.manual(parts.mesh, over)) if over else fn


def reduced(
    parts: base.Parts,
    axes: tuple[str, ...],
    reducer: Reducer,
    out_specs: PyTree,
    *,
    check_vma: bool = False,
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
    """(gradients as of `gradients`, state) -> (summed, as out_specs says, state).

    Each device sums its part of its replica's gradients. A reducer with a state looks at whole arrays, and
    the compiler cuts its work.

    check_vma: off by default, since gathers and rings are typed as differing by device, though they do not;
    that they do not is tested.
    """

    def local(grads, state):
        with bound(parts, axes):
            grads, state = (without_first_dim(grads), unpacked(state, without_first_dim))
            grads, state = reducer.reduce(grads, state)
            return grads, unpacked(state, first_dim)

    parted = jax.tree.map(lambda s: P(axes, *s.spec), param_shardings(parts))
    summed = jax.tree.map(lambda spec: only(spec, axes), out_specs)

    def apply(grads, state):
        held = {part: P(axes) if part == "own" else P() for part in state}
        whole = within(parts) and bool(state)
        return _mapped(
            parts,
            local,
            in_specs=(P(axes) if whole else parted, held),
            out_specs=(summed if whole else out_specs, held),
            check_vma=check_vma,
            over=axes if whole else parts.mesh.axis_names,
        )(grads, state)

    return apply


def state_shardings(parts: base.Parts, axes: tuple[str, ...], reducer: Reducer) -> PyTree:
    """Shardings of the reducer's state: errors as a replica's parameters, chunks replicated within it,
    common state replicated everywhere.
    """
    params, _ = base.abstract_params(parts)
    state = jax.eval_shape(reducer.init, params)
    cut = tree.named_leaves(param_shardings(parts))
    place = lambda *spec: NamedSharding(parts.mesh, P(*spec))
    if not state:
        return {}
    own = {
        "errors": {name: place(axes, *cut[name].spec) for name in state["own"]["errors"]},
        "chunks": [place(axes) for _ in state["own"]["chunks"]],
    }
    return {"own": own, "common": jax.tree.map(lambda _: place(), state["common"])}


def only(spec: P, axes: tuple[str, ...]) -> P:
    """The spec without what other axes cut."""
    return P(*(cut if cut in (axes, *axes) else None for cut in spec))


def bound(parts: base.Parts, axes: tuple[str, ...]) -> Any:
    """The scope of what runs on a part of the batch."""
    placed = sharding.placement(parts.mesh) | {"partial": True} if within(parts) else {}
    return scope.bind(axes=axes, **{"platform": parts.mesh.devices.flat[0].platform} | placed)


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
