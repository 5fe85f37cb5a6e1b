"""Local SGD: replicas take H steps by themselves, then an outer optimizer takes their averaged difference.

H=1, plain SGD and averaging are synchronous SGD (Stich 2019, arXiv 1805.09767); AdamW inside and Nesterov
outside are DiLoCo (Douillard et al. 2023, arXiv 2311.08105); Adam outside is FedAdam (Reddi et al. 2021,
arXiv 2003.00295).

A vmap over the replicas, so that the arrays of one are sharded by the same rules as under `auto`, over any
axes. `state.params` is the consensus, in the layout of one device; the parameters of the replicas, [R, ...],
sharded over mesh.replica, are in the strategy state.

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
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import tree
from spmd.core.fields import check
from spmd.parallel import sharding
from spmd.strategies import base, merge, update
from spmd.strategies.merge import AXIS, INSIDE, weighted
from spmd.strategies.replica import (
    LocalStep,
    Shared,
    build_replica_step,
    drop_frozen,
    map_over_replicas,
    take_outer_step,
)
from spmd.strategies.rounds import Outer, RoundsConfig, check_fits
from spmd.tasks import is_frozen

PyTree = Any


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
    """The Strategy of replicas and an outer optimizer.

    Args:
        parts: as of every strategy.
        num_replicas: number of replicas.
        outer: how they are merged, and how often.

    Raises:
        ValueError: the replicas do not divide over the mesh, or the batch not over the replicas.
    """
    check_fits(parts, num_replicas)
    check(
        not parts.layers,
        "log.layers measures the update of one model, and replicas have one each; leave it off",
    )
    check(
        not parts.noise_scale,
        "train.noise_scale compares the gradients of parts of a batch with that of the whole, which replicas"
        " that go their own ways never take; use --strategy auto, allreduce or server",
    )
    replicas = Replicas(parts, num_replicas, outer)
    built = base.build_strategy(parts, replicas.shardings, replicas.step, extend=replicas.extend)
    copy = jax.jit(replicas.stack, out_shardings=replicas.shardings.strategy_state["params"])

    def with_params(state: base.TrainState, params: PyTree) -> base.TrainState:
        state = built.with_params(state, params)
        strategy_state = state.strategy_state | {"params": copy(state.params)}
        return dataclasses.replace(state, strategy_state=strategy_state)

    return built._replace(with_params=with_params)


@dataclasses.dataclass(frozen=True)
class Replicas:
    """Replicas of a run: their state, its shardings, and the step that all of them take.

    The strategy state: "params" and "model_state" [R, ...] of the replicas, "weight" [R] that each saw since
    the last outer step, "outer" and "merge", the states of the outer optimizer and of the merge.
    """

    parts: base.Parts
    num: int
    outer: Outer

    @functools.cached_property
    def param_shardings(self) -> PyTree:
        """Shardings of the parameters of a replica, and of the consensus."""
        params, _ = base.abstract_params(self.parts)
        return sharding.param_shardings(params, self.parts.task.dims, self.parts.mesh, fsdp=True)

    @functools.cached_property
    def shardings(self) -> base.TrainState:
        """Shardings of the state that `extend` returns."""
        mesh, placed, tx = self.parts.mesh, self.param_shardings, self.outer.tx
        plain = base.shardings_of(self.parts, params=placed, moments=placed, fsdp=True)
        over_replicas = lambda part: jax.tree.map(
            lambda s: NamedSharding(mesh, P(AXIS, *s.spec)), part
        )
        params, _ = base.abstract_params(self.parts)
        outer_shapes = jax.eval_shape(lambda p: tx.init(base.widen(p)), params)
        return dataclasses.replace(
            plain,
            opt_state=over_replicas(plain.opt_state),
            strategy_state={
                "params": over_replicas(placed),
                "model_state": over_replicas(drop_frozen(plain.model_state)),
                "weight": NamedSharding(mesh, P(AXIS)),
                "outer": sharding.opt_shardings(tx, outer_shapes, params, placed, mesh),
                "merge": dict(self.outer.merge.shardings),
            },
        )

    def stack(self, part: PyTree) -> PyTree:
        """[...] -> [R, ...], a copy for each replica."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (self.num, *x.shape)), part)

    def extend(self, state: base.TrainState) -> base.TrainState:
        """The state to begin with, from that of one device."""
        strategy_state = {
            "params": self.stack(state.params),
            "model_state": self.stack(drop_frozen(state.model_state)),
            "weight": jnp.zeros(self.num, jnp.float32),
            "outer": self.outer.tx.init(base.widen(state.params)),
            "merge": self.outer.merge.init(state.params),
        }
        opt_state = self.stack(state.opt_state)
        return dataclasses.replace(state, opt_state=opt_state, strategy_state=strategy_state)

    def split_rows(self, batch: base.Batch) -> PyTree:
        """[B, ...] -> [R, B/R, ...]."""
        rows = NamedSharding(self.parts.mesh, P(AXIS, INSIDE))

        def split(x: jax.Array) -> jax.Array:
            x = x.reshape(self.num, -1, *x.shape[1:])
            return jax.lax.with_sharding_constraint(x, rows)

        return jax.tree.map(split, batch)

    def step(
        self, state: base.TrainState, batch: base.Batch
    ) -> tuple[base.TrainState, base.Metrics]:
        """A local step of every replica; in every period-th step an outer step follows."""
        step_all = map_over_replicas(
            self.parts, build_replica_step(self.parts, self.param_shardings, self.outer), self.num
        )
        replica_state = state.strategy_state
        shared = Shared(
            base.step_key(state),
            {name: x for name, x in state.model_state.items() if is_frozen(name)},
            state.params if self.outer.proximal else {},
        )
        (params, model_state, opt_state), local = step_all(
            shared,
            (replica_state["params"], replica_state["model_state"], state.opt_state),
            self.split_rows(batch),
            jnp.arange(self.num),
        )
        replica_state = replica_state | {
            "params": params,
            "model_state": model_state,
            "weight": replica_state["weight"] + local.weight,
        }
        new = dataclasses.replace(state, opt_state=opt_state, strategy_state=replica_state)
        if self.outer.period == 1:
            new, metrics = self.merge(new)
        else:
            due = jax.lax.rem(state.step + 1, jnp.int32(self.outer.period)) == 0
            new, metrics = jax.lax.cond(due, self.merge, self.skip_merge, new)
        ema = update.update_average(self.parts, state, new.params)
        metrics = replica_metrics(self.parts, state, local, metrics)
        return dataclasses.replace(new, ema=ema, step=state.step + 1), metrics

    def merge(self, state: base.TrainState) -> tuple[base.TrainState, base.Metrics]:
        """The outer step, its result sharded as the state is."""
        state, metrics = take_outer_step(self.parts, state, self.outer, self.stack)
        return jax.lax.with_sharding_constraint(state, self.shardings), metrics

    def skip_merge(self, state: base.TrainState) -> tuple[base.TrainState, base.Metrics]:
        """The state unchanged, with zeros for the metrics of an outer step."""
        _, metrics = jax.eval_shape(self.merge, state)
        return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)


def replica_metrics(
    parts: base.Parts, state: base.TrainState, local: LocalStep, outer_metrics: base.Metrics
) -> base.Metrics:
    """Metrics over all replicas, and those of the outer step. The norm of their common gradient would cost an
    all-reduce of it: replica_grad_norm is the root mean square of the replicas' own norms.

    Args:
        parts: as of every strategy.
        state: before the step.
        local: what the replicas' steps returned, each leaf [R, ...].
        outer_metrics: of the outer step.
    """
    sums, norm_R = local.sums, local.norm
    if parts.skip:  # what a replica skips is no part of the means either
        finite = lambda x_R: jnp.where(local.finite, x_R, jnp.zeros_like(x_R))
        sums, norm_R = jax.tree.map(finite, (sums, norm_R))
    sums = jax.tree.map(lambda x_R: x_R.sum(), sums)
    metrics = outer_metrics | {
        name: total / jnp.where(counted > 0, counted, jnp.ones_like(counted))
        for name, (total, counted) in sums.items()
    }
    metrics["loss"] = parts.task.loss_of(metrics)
    metrics["replica_grad_norm"] = jnp.sqrt(weighted(norm_R**2, local.weight))
    metrics["learning_rate"] = jnp.asarray(parts.rate(state.step))
    metrics["finite"] = local.finite.all().astype(jnp.float32)
    metrics |= {
        base.WATCHED_GRADIENTS + name: weighted(leaf, local.weight)
        for name, leaf in tree.named_leaves(local.watched).items()
    }
    counts = local.finite.any() if parts.skip else local.finite.all()
    return update.add_weights(metrics, sums, counts)
