"""jit over the mesh: rules decide DP, FSDP, ZeRO and tensor parallelism; XLA inserts the collectives."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax

from spmd.core.fields import free
from spmd.parallel import scope, sharding
from spmd.strategies import base, tables, update
from spmd.strategies.config import StrategyConfig
from spmd.strategies.grads.direct import Trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(StrategyConfig):
    """jit over the mesh: rules place the arrays, the compiler inserts the collectives."""

    name: ClassVar[str] = "auto"
    zero: Literal[1, 3] = free(3)
    """Sharded over mesh.fsdp: 1 the optimizer state only (ZeRO-1), 3 the parameters too (FSDP)."""
    sequence_parallel: bool = free(False)
    """Cuts norms and residuals over mesh.tensor too, along time: less memory, the same traffic."""

    def build(self, parts: base.Parts) -> base.Strategy:
        return build(parts, zero=self.zero, sequence_parallel=self.sequence_parallel)

    def not_private(self) -> str:
        return ""

    def not_by_term(self) -> str:
        return ""

    def not_sparse(self) -> str:
        return ""


def build(parts: base.Parts, *, zero: int, sequence_parallel: bool) -> base.Strategy:
    """zero 3: mesh.fsdp cuts parameters and optimizer state. zero 1: the optimizer state only, the update
    runs on shards, and the new parameters are gathered (Rajbhandari et al. 2020, section 5).
    sequence_parallel: norms and residuals are cut over mesh.tensor, along time.
    """
    grads_of = base.grads_of(parts)
    params, _ = base.abstract_params(parts)
    place = lambda fsdp: sharding.param_shardings(params, parts.task.dims, parts.mesh, fsdp=fsdp)
    sharded = place(True)
    gradients = base.gradient_shardings(parts, sharded)
    shardings = base.shardings_of(
        parts, params=sharded if zero == 3 else place(False), moments=sharded, fsdp=zero == 3
    )
    rules = sharding.sequence_parallel() if sequence_parallel else sharding.RULES
    placement = sharding.placement(parts.mesh, rules)

    def step(state: base.TrainState, batch: base.Batch) -> tuple[base.TrainState, base.Metrics]:
        pulled = tables.pull(parts, state, batch)
        with scope.bind(**placement):
            scale = parts.task.scale(parts.task.weigh(batch))
            grads, sums, model_state = grads_of(
                Trained(state.params, pulled.rows),
                state.model_state,
                batch,
                base.step_key(state),
                scale,
            )
        # Says where the sum of the gradients is wanted: a shard, so reduce-scatter instead of all-reduce.
        total = jax.lax.with_sharding_constraint(grads.params, gradients)
        grads = Trained(total, grads.rows)
        return update.update_state(parts, state, grads, sums, model_state, pulled)

    return base.build_strategy(parts, shardings, step)
