"""Steps of the replicas of `local`: the local step of one, mapped over all, and the outer step."""

# R replicas

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from spmd.core import tree
from spmd.parallel import scope, sharding
from spmd.strategies import base, update
from spmd.strategies.grads import direct
from spmd.strategies.merge import AXIS, INSIDE, REPLICAS
from spmd.strategies.rounds import Outer
from spmd.tasks import is_frozen

PyTree = Any
# Activations of a replica are sharded over the axes inside of it.
RULES = {**sharding.RULES, "batch": INSIDE}


class Shared(NamedTuple):
    """Inputs that the replicas' steps share. params: the consensus, where it pulls."""

    key: jax.Array
    frozen: PyTree
    params: PyTree


class LocalStep(NamedTuple):
    """Results of a replica's step beside its state; of all replicas: [R, ...].

    sums: of metrics, (sum, weight). weight: of its examples. norm: of the gradient. finite: loss and gradient
    watched: the gradient, where verify watches; else {}.
    """

    sums: PyTree
    weight: jax.Array
    norm: jax.Array
    finite: jax.Array
    watched: PyTree


def map_over_replicas(
    parts: base.Parts, step: Callable[..., Any], num_replicas: int
) -> Callable[..., Any]:
    """The step of all replicas, (shared, [R, ...] ...) -> [R, ...], each on its own devices.

    A step that branches by device (a pipeline, the rounds of experts) needs a shard_map around the replicas
    of one device: a vmap over all of them would turn the branches into selections. Others are mapped without
    one, since XLA then sums a table's gradient over fsdp instead of gathering all rows on one device.

    Args:
        parts: as of every strategy.
        step: of one replica.
        num_replicas: R.
    """
    over = parts.mesh.shape[AXIS]
    if all(parts.mesh.shape[axis] == 1 for axis in ("stage", "context", "expert")):
        return jax.vmap(step, (None, 0, 0, 0), spmd_axis_name=AXIS)

    def step_device(shared: Shared, *stacked: PyTree) -> PyTree:
        single = num_replicas == over
        with scope.bind(mapped="" if single else REPLICAS, partial=over > 1):
            if single:
                results = step(shared, *jax.tree.map(lambda x: x[0], stacked))
                return jax.tree.map(lambda x: x[None], results)
            return jax.vmap(functools.partial(step, shared), axis_name=REPLICAS)(*stacked)

    if over == 1:
        return step_device
    specs = {"in_specs": (P(), P(AXIS), P(AXIS), P(AXIS)), "out_specs": P(AXIS)}
    # No collective crosses the axis in there.
    return jax.shard_map(
        step_device, **specs, check_vma=False, **sharding.shard_map_options(parts.mesh, (AXIS,))
    )


def build_replica_step(
    parts: base.Parts, grad_shardings: PyTree, outer: Outer
) -> Callable[..., Any]:
    """The step of one replica, to be mapped: (shared, (params, model_state, opt_state), its rows, its number)
    -> (the new three, LocalStep).

    Args:
        parts: as of every strategy.
        grad_shardings: of the gradients, within the replica.
        outer: the proximal term is in the local step.
    """
    grads_of = base.grads_of(parts)
    placement = sharding.placement(parts.mesh, RULES)

    def step(
        shared: Shared, old: PyTree, batch: base.Batch, number: jax.Array
    ) -> tuple[PyTree, LocalStep]:
        params, model_state, opt_state = old
        with scope.bind(**placement):
            weights = parts.task.weigh(batch)
            gradients, sums, new_state = grads_of(
                direct.Trained(params, {}),
                model_state | shared.frozen,
                batch,
                shared.key,
                parts.task.scale(weights),
            )
        grads = jax.tree.map(sharding.constrain, gradients.params, grad_shardings)
        if parts.privacy is not None:
            grads = direct.add_noise(grads, shared.key, parts.privacy.deviation, number)
        norm = tree.global_norm(grads)
        loss = parts.task.loss_of({name: total for name, (total, _) in sums.items()})
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        watched = grads if scope.current().watched else {}
        if outer.proximal:
            pull = lambda g, x, c: g + outer.proximal * (x.astype(g.dtype) - c.astype(g.dtype))
            grads = jax.tree.map(pull, grads, params, shared.params)
        new_params, new_opt = update.apply_gradients(
            parts.tx, grads, opt_state, params, lambda: shared.key, number
        )
        new = (new_params, drop_frozen(new_state), new_opt)
        # Of several loss terms the sum: exact where they have one weight.
        weight = jnp.stack([w.astype(jnp.float32) for w in weights.values()]).sum()
        if parts.privacy is not None:  # how many were sampled must not show: all weigh alike
            weight = jnp.ones_like(weight)
        # A replica without examples keeps its state; its schedule still advances.
        new = tree.select(
            jnp.asarray(weight > 0),
            new,
            (params, model_state, _with_schedule_counts_of(opt_state, new_opt)),
        )
        if parts.skip:
            new = tree.select(finite, new, old)
            weight = jnp.where(finite, weight, 0)
        return new, LocalStep(sums, weight, norm, finite, watched)

    return step


def _with_schedule_counts_of(old: PyTree, new: PyTree) -> PyTree:
    """The old optimizer state with the counts of the new one's schedules."""
    schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
    return jax.tree.map(lambda o, n: n if schedule(o) else o, old, new, is_leaf=schedule)


def take_outer_step(
    parts: base.Parts,
    state: base.TrainState,
    outer: Outer,
    stack: Callable[[PyTree], PyTree],
) -> tuple[base.TrainState, base.Metrics]:
    """The outer step: the only one in which parameters and batch statistics cross `replica`.

    state: after the local steps. outer: how the replicas are merged. stack: [...] -> [R, ...].
    """
    replica_state = state.strategy_state
    consensus = {"params": state.params, "statistics": drop_frozen(state.model_state)}
    replicas = {"params": replica_state["params"], "statistics": replica_state["model_state"]}
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)

    def difference(old: jax.Array, x_R: jax.Array) -> jax.Array:
        dtype = tree.at_least_float32(x_R.dtype)
        return old[None].astype(dtype) - x_R.astype(dtype) if is_float(old) else jnp.zeros(len(x_R))

    def moved(old: jax.Array, delta: jax.Array, x_R: jax.Array) -> jax.Array:
        """The consensus moved by delta; a counter is equal in all replicas that had examples."""
        return (
            (old.astype(delta.dtype) - delta).astype(old.dtype)
            if is_float(old)
            else x_R.max(axis=0)
        )

    differences = jax.tree.map(difference, consensus, replicas)
    delta, metrics, merge_state = outer.merge.mean(
        differences, replica_state["weight"], base.step_key(state), replica_state["merge"]
    )
    params, outer_state = update.apply_gradients(
        outer.tx,
        delta["params"],
        replica_state["outer"],
        state.params,
        lambda: base.step_key(state),
        len(replica_state["weight"]),  # a number that no replica has
    )
    statistics = jax.tree.map(
        moved, consensus["statistics"], delta["statistics"], replicas["statistics"]
    )
    opt_state = state.opt_state
    if outer.forget:
        opt_state = _with_schedule_counts_of(stack(parts.tx.init(params)), opt_state)
    replica_state = replica_state | {
        "params": stack(params),
        "model_state": stack(statistics),
        "weight": jnp.zeros_like(replica_state["weight"]),
        "outer": outer_state,
        "merge": merge_state,
    }
    new = dataclasses.replace(
        state,
        params=params,
        model_state=state.model_state | statistics,
        opt_state=opt_state,
        strategy_state=replica_state,
    )
    return new, metrics


def drop_frozen(model_state: PyTree) -> PyTree:
    """The model state that a step changes: all but the frozen parameters, which replicas share."""
    return {name: part for name, part in model_state.items() if not is_frozen(name)}
