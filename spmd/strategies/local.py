"""Local SGD: replicas take H steps by themselves, then an outer optimizer takes their averaged difference.

H=1, plain SGD and averaging are synchronous SGD (Stich 2019, arXiv 1805.09767); AdamW inside and Nesterov
outside are DiLoCo (Douillard et al. 2023, arXiv 2311.08105); Adam outside is FedAdam (Reddi et al. 2021,
arXiv 2003.00295).

A vmap over the replicas, so that the arrays of one are cut by the same rules as under `auto`, by any axes.
`state.params` is the consensus, in the layout of one device; the replicas stand beside it, [R, ...], cut by
mesh.replica.

Each replica divides by its own weight, and is averaged by the weight that it has seen since the last outer
step: sums over weights again, and no collective over `replica` in between but the scalars of the metrics.

Under privacy each replica takes private steps of its own (privacy.py says why all of them together give away
no more than one): it clips, adds its own noise, and weighs as much as any other, since the number of examples
in its sample must not show. What is compressed and sent is made of noisy steps only.
"""

# R replicas, B rows of the global batch

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import tree
from spmd.core.fields import check
from spmd.parallel import scope, sharding
from spmd.strategies import base, merge, update
from spmd.strategies.grads import direct
from spmd.strategies.merge import AXIS, INSIDE, REPLICAS, weighted
from spmd.strategies.rounds import Outer, RoundsConfig, check_fits
from spmd.tasks import FROZEN

PyTree = Any
# What a replica activates is cut over the axes inside of it.
RULES = {**sharding.RULES, "batch": INSIDE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local(RoundsConfig):
    """Replicas take `period` steps by themselves, then an outer one together (local SGD, DiLoCo)."""

    name: ClassVar[str] = "local"
    replicas: int = 8
    """Replicas, whatever the mesh; mesh.replica, over which they are spread, must divide them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.replicas >= 1, f"strategy.replicas={self.replicas} must be at least 1")

    def build(self, parts: base.Parts) -> base.Strategy:
        sent = merge.build(self.compress, parts, self.replicas)
        return build(parts, self.replicas, Outer(self.period, self._outer_tx(), sent))

    @property
    def copies(self) -> int:
        return self.replicas

    def not_private(self) -> str:
        return ""  # each replica's gradient has its noise before anything is made of it, or sent

    @property
    def private_parts(self) -> int:
        return self.replicas


def build(parts: base.Parts, num_replicas: int, outer: Outer) -> base.Strategy:
    """ValueError where the replicas do not divide over the mesh, or the batch not over the replicas."""
    check_fits(parts, num_replicas)
    check(
        not parts.noise_scale,
        "train.noise_scale compares the gradients of parts of a batch with that of the whole, which replicas"
        " that go their own ways never take; use --strategy auto, allreduce or server",
    )
    mesh, task = parts.mesh, parts.task
    abstract, _ = base.abstract_params(parts)
    cut = sharding.param_shardings(abstract, task.dims, mesh, fsdp=True)
    plain = base.shardings_of(parts, params=cut, moments=cut, fsdp=True)
    lead = lambda part: jax.tree.map(lambda s: NamedSharding(mesh, P(AXIS, *s.spec)), part)
    outer_shapes = jax.eval_shape(lambda p: outer.tx.init(base.widen(p)), abstract)
    shardings = dataclasses.replace(
        plain,
        opt_state=lead(plain.opt_state),
        strategy_state={
            "params": lead(cut),
            "model_state": lead(_varying(plain.model_state)),
            "weight": NamedSharding(mesh, P(AXIS)),
            "outer": sharding.opt_shardings(outer.tx, outer_shapes, abstract, cut, mesh),
            "merge": dict(outer.merge.shardings),
        },
    )
    copied = lambda part: jax.tree.map(
        lambda x: jnp.broadcast_to(x[None], (num_replicas, *x.shape)), part
    )

    def begin(state: base.TrainState) -> base.TrainState:
        own = {
            "params": copied(state.params),
            "model_state": copied(_varying(state.model_state)),
            "weight": jnp.zeros(num_replicas, jnp.float32),
            "outer": outer.tx.init(base.widen(state.params)),
            "merge": outer.merge.init(state.params),
        }
        return dataclasses.replace(state, opt_state=copied(state.opt_state), strategy_state=own)

    each = _each(parts, _replica(parts, cut, outer), num_replicas)
    rows_of = NamedSharding(mesh, P(AXIS, INSIDE))

    def rows(x: jax.Array) -> jax.Array:
        x = x.reshape(num_replicas, -1, *x.shape[1:])
        return jax.lax.with_sharding_constraint(x, rows_of)

    def step(state: base.TrainState, batch: base.Batch) -> tuple[base.TrainState, base.Metrics]:
        own = state.strategy_state
        ours = (own["params"], own["model_state"], state.opt_state)
        shared = Shared(
            base.step_key(state),
            {name: x for name, x in state.model_state.items() if name == FROZEN},
            state.params if outer.proximal else {},
        )
        (params, model_state, opt_state), (sums, weight_R, norm_R, finite_R, grads) = each(
            shared, ours, jax.tree.map(rows, batch), jnp.arange(num_replicas)
        )
        own = own | {
            "params": params,
            "model_state": model_state,
            "weight": own["weight"] + weight_R,
        }
        new = dataclasses.replace(state, opt_state=opt_state, strategy_state=own)

        def agree(new: base.TrainState) -> tuple[base.TrainState, base.Metrics]:
            new, found = _agree(parts, new, outer, copied)
            return jax.lax.with_sharding_constraint(new, shardings), found

        def apart(new: base.TrainState) -> tuple[base.TrainState, base.Metrics]:
            _, found = jax.eval_shape(agree, new)
            return new, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)

        if outer.period == 1:
            new, found = agree(new)
        else:
            due = jax.lax.rem(state.step + 1, jnp.int32(outer.period)) == 0
            new, found = jax.lax.cond(due, agree, apart, new)
        ema = update.update_average(parts, state, new.params)
        metrics = _metrics(parts, state, sums, weight_R, norm_R, finite_R, grads, found)
        return dataclasses.replace(new, ema=ema, step=state.step + 1), metrics

    built = base.build_strategy(parts, shardings, step, extend=begin)
    copy = jax.jit(copied, out_shardings=lead(cut))

    def with_params(state: base.TrainState, params: PyTree) -> base.TrainState:
        state = built.with_params(state, params)
        own = state.strategy_state | {"params": copy(state.params)}
        return dataclasses.replace(state, strategy_state=own)

    return built._replace(with_params=with_params)


def _varying(model_state: PyTree) -> PyTree:
    """The model state that a step changes: all but the frozen parameters, which replicas share."""
    return {name: part for name, part in model_state.items() if name != FROZEN}


class Shared(NamedTuple):
    """Inputs that the replicas' steps share. params: the consensus, where it pulls."""

    key: jax.Array
    frozen: PyTree
    params: PyTree


def _each(parts: base.Parts, one: Callable[..., Any], num_replicas: int) -> Callable[..., Any]:
    """`one` for all replicas, (shared, [R, ...] ...) -> [R, ...], each on devices of its own.

    What branches by device (a pipeline, the rounds of experts) needs a shard_map around the replicas of one
    device: a vmap over all of them would make selections of the branches. What does not goes without, since
    XLA then sums a table's gradient over fsdp, where it would bring all rows together to one device.
    """
    over = parts.mesh.shape[AXIS]
    if all(parts.mesh.shape[axis] == 1 for axis in ("stage", "context", "expert")):
        axes = (None, 0, 0, 0)
        return jax.vmap(one, axes, spmd_axis_name=AXIS)

    def here(shared: Shared, *theirs: PyTree) -> PyTree:
        alone = num_replicas == over
        with scope.bind(mapped="" if alone else REPLICAS, partial=over > 1):
            if alone:
                made = one(shared, *jax.tree.map(lambda x: x[0], theirs))
                return jax.tree.map(lambda x: x[None], made)
            return jax.vmap(functools.partial(one, shared), axis_name=REPLICAS)(*theirs)

    if over == 1:
        return here
    # Nothing crosses the axis in there.
    own = {"in_specs": (P(), P(AXIS), P(AXIS), P(AXIS)), "out_specs": P(AXIS), "check_vma": False}
    return jax.shard_map(here, **own, **sharding.manual(parts.mesh, (AXIS,)))


def _replica(parts: base.Parts, cut: PyTree, outer: Outer) -> Callable[..., Any]:
    """The step of one replica, to be mapped: (shared, (params, model_state, opt_state), its rows, its number)
    -> the new three, and (metric sums, weight, gradient norm, whether finite, gradient where watched).
    """
    grads_of = base.grads_of(parts)
    placement = sharding.placement(parts.mesh, RULES)

    def one(
        shared: Shared, ours: PyTree, batch: base.Batch, number: jax.Array
    ) -> tuple[PyTree, PyTree]:
        params, model_state, opt_state = ours
        with scope.bind(**placement):
            weights = parts.task.weigh(batch)
            grads, sums, new_state = grads_of(
                params, model_state | shared.frozen, batch, shared.key, parts.task.scale(weights)
            )
        grads = jax.tree.map(sharding.constrain, grads, cut)
        if parts.privacy is not None:
            grads = direct.add_noise(grads, shared.key, parts.privacy.deviation, number)
        norm = tree.global_norm(grads)
        finite = jnp.isfinite(sums["loss"][0]) & jnp.isfinite(norm)
        watched = grads if scope.current().watched else {}
        if outer.proximal:
            pull = lambda g, x, c: g + outer.proximal * (x.astype(g.dtype) - c.astype(g.dtype))
            grads = jax.tree.map(pull, grads, params, shared.params)
        new_params, new_opt = update.apply_gradients(
            parts.tx, grads, opt_state, params, lambda: shared.key, number
        )
        new = (new_params, _varying(new_state), new_opt)
        # Of several loss terms the sum: exact where they have one weight.
        weight = jnp.stack([w.astype(jnp.float32) for w in weights.values()]).sum()
        if parts.privacy is not None:  # how many were sampled must not show: all weigh alike
            weight = jnp.ones_like(weight)
        # One without examples stands still, but its learning rate goes on.
        new = tree.select(
            jnp.asarray(weight > 0),
            new,
            (params, model_state, _with_schedule_counts_of(opt_state, new_opt)),
        )
        if parts.skip:
            new = tree.select(finite, new, ours)
            weight = jnp.where(finite, weight, 0)
        return new, (sums, weight, norm, finite, watched)

    return one


def _with_schedule_counts_of(old: PyTree, new: PyTree) -> PyTree:
    """The old optimizer state with the counts of the new one's schedules."""
    schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
    return jax.tree.map(lambda o, n: n if schedule(o) else o, old, new, is_leaf=schedule)


def _metrics(
    parts: base.Parts,
    state: base.TrainState,
    sums: PyTree,
    weight_R: jax.Array,
    norm_R: jax.Array,
    finite_R: jax.Array,
    grads: PyTree,
    found: base.Metrics,
) -> base.Metrics:
    """Over all replicas, and what the outer step has `found`. The norm of their common gradient would cost an
    all-reduce of it: replica_grad_norm is the root mean square of their own.
    """
    if parts.skip:  # what a replica skips is no part of the means either
        finite = lambda x_R: jnp.where(finite_R, x_R, jnp.zeros_like(x_R))
        sums, norm_R = jax.tree.map(finite, (sums, norm_R))
    sums = jax.tree.map(lambda x_R: x_R.sum(), sums)
    metrics = found | {
        name: total / jnp.where(counted > 0, counted, jnp.ones_like(counted))
        for name, (total, counted) in sums.items()
    }
    metrics["replica_grad_norm"] = jnp.sqrt(weighted(norm_R**2, weight_R))
    metrics["learning_rate"] = jnp.asarray(parts.rate(state.step))
    metrics["finite"] = finite_R.all().astype(jnp.float32)
    metrics |= {
        base.WATCHED_GRADIENTS + name: weighted(leaf, weight_R)
        for name, leaf in tree.named_leaves(grads).items()
    }
    return update.add_weights(metrics, sums, finite_R.any() if parts.skip else finite_R.all())


def _agree(
    parts: base.Parts,
    state: base.TrainState,
    outer: Outer,
    copied: Callable[[PyTree], PyTree],
) -> tuple[base.TrainState, base.Metrics]:
    """The outer step: the only one in which parameters and batch statistics cross `replica`."""
    own = state.strategy_state
    consensus = {"params": state.params, "statistics": _varying(state.model_state)}
    replicas = {"params": own["params"], "statistics": own["model_state"]}
    real = lambda x: jnp.issubdtype(x.dtype, jnp.floating)

    def difference(old: jax.Array, x_R: jax.Array) -> jax.Array:
        dtype = tree.at_least_float32(x_R.dtype)
        return old[None].astype(dtype) - x_R.astype(dtype) if real(old) else jnp.zeros(len(x_R))

    def moved(old: jax.Array, delta: jax.Array, x_R: jax.Array) -> jax.Array:
        """A counter is the same in all that have not stood still."""
        return (old.astype(delta.dtype) - delta).astype(old.dtype) if real(old) else x_R.max(axis=0)

    differences = jax.tree.map(difference, consensus, replicas)
    delta, found, carried = outer.merge.mean(
        differences, own["weight"], base.step_key(state), own["merge"]
    )
    params, outer_state = update.apply_gradients(
        outer.tx,
        delta["params"],
        own["outer"],
        state.params,
        lambda: base.step_key(state),
        len(own["weight"]),  # a number that no replica has
    )
    statistics = jax.tree.map(
        moved, consensus["statistics"], delta["statistics"], replicas["statistics"]
    )
    opt_state = state.opt_state
    if outer.forget:
        opt_state = _with_schedule_counts_of(copied(parts.tx.init(params)), opt_state)
    own = own | {
        "params": copied(params),
        "model_state": copied(statistics),
        "weight": jnp.zeros_like(own["weight"]),
        "outer": outer_state,
        "merge": carried,
    }
    new = dataclasses.replace(
        state,
        params=params,
        model_state=state.model_state | statistics,
        opt_state=opt_state,
        strategy_state=own,
    )
    return new, found
