"""Synchronous SGD by hand: each device takes the gradient of its rows, a reduction of ours sums them."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Literal

import jax

from spmd.core.fields import check, free
from spmd.parallel import collectives, scope
from spmd.strategies import base, exchange, reduce, tables, update
from spmd.strategies.compress import Compression
from spmd.strategies.config import StrategyConfig
from spmd.strategies.grads.direct import Trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllReduce(StrategyConfig):
    """shard_map: each device takes its gradient, an explicit reduction sums them (synchronous SGD)."""

    name: ClassVar[str] = "allreduce"
    by_device: ClassVar[bool] = True
    merges_over: ClassVar[tuple[str, ...]] = ("replica", "data")
    reduction: Literal["psum", "ring", "reduce_scatter", "hierarchical"] = free("psum")
    """psum: the compiler's all-reduce; ring: our own, of neighbours; reduce_scatter: with an all-gather;
    hierarchical: the same within mesh.data, and only the shards are summed across mesh.replica."""
    bidirectional: bool = free(False)
    """ring: half of each message goes round the other way."""
    bucket_mb: float = free(4.0)
    """MiB of gradients that travel together (psum: left to the compiler)."""
    compress: Compression = Compression()
    """Compression of the gradients that are sent."""

    def __post_init__(self) -> None:
        check(self.bucket_mb > 0, f"strategy.bucket_mb={self.bucket_mb} must be more than 0")
        check(
            not self.bidirectional or self.reduction == "ring",
            f"strategy.bidirectional is for strategy.reduction=ring, not {self.reduction}",
        )
        kind = self.compress.kind
        check(
            kind in ("none", "powersgd") or self.reduction == "psum",
            f"strategy.compress.kind={kind} has collectives of its own and takes no"
            f" strategy.reduction={self.reduction}: leave it at psum, or use kind powersgd or none",
        )

    def build(self, parts: base.Parts) -> base.Strategy:
        return build(parts, self)

    def not_private(self) -> str:
        return self.compress.not_private()

    def not_by_term(self) -> str:
        return self.compress.not_by_term()

    def not_sparse(self) -> str:
        return self.compress.not_sparse()


def build(parts: base.Parts, config: AllReduce) -> base.Strategy:
    """Whole parameters in each replica, cut over its devices by rules.

    ValueError for models that it cannot take.
    """
    axes = reduce.reduction_axes(parts, "allreduce")
    reduce.check_noise_scale(parts, config.compress.kind)
    checked = config.reduction == "psum" and config.compress.kind == "none"
    return build_synchronous(parts, axes, build_reducer(parts, config, axes), check_vma=checked)


def build_synchronous(
    parts: base.Parts, axes: tuple[str, ...], reducer: reduce.Reducer, *, check_vma: bool = False
) -> base.Strategy:
    """Synchronous SGD with any Reducer: each device's gradient, their sum, one update.

    Args:
        parts: as of every strategy.
        axes: of the reduction.
        reducer: sums the gradients.
        check_vma: whether the types of the reduction's results say that they are equal on all devices, as
            those of the compiler's collectives do.
    """
    placed = reduce.param_shardings(parts)
    shardings = dataclasses.replace(
        base.shardings_of(parts, params=placed, moments=placed, fsdp=True),
        strategy_state=reduce.state_shardings(parts, axes, reducer),
    )
    gradients = reduce.build_gradients(parts, axes)
    specs = jax.tree.map(lambda s: s.spec, placed)
    reduction = reduce.build_reduction(parts, axes, reducer, specs, check_vma=check_vma)

    init = functools.partial(reduce.init_state, reducer, reduce.num_devices(parts, axes))

    def step(state: base.TrainState, batch: base.Batch) -> tuple[base.TrainState, base.Metrics]:
        pulled = tables.pull(parts, state, batch)
        grads, sums, model_state = gradients(
            Trained(state.params, pulled.rows), state.model_state, batch, base.step_key(state)
        )
        total, carried = reduction(grads.params, state.strategy_state)
        grads = Trained(total, grads.rows)
        return update.update_state(parts, state, grads, sums, model_state, pulled, carried)

    return base.build_strategy(parts, shardings, step, init)


def build_reducer(parts: base.Parts, config: AllReduce, axes: tuple[str, ...]) -> reduce.Reducer:
    """The Reducer of strategy.reduction and strategy.compress."""
    bucket_bytes = config.bucket_mb * reduce.MiB
    match config.reduction:
        case "psum":
            total = functools.partial(jax.tree.map, scope.batch_sum)  # the compiler's own buckets
        case "ring":
            ring = functools.partial(
                collectives.ring_all_reduce, axes=axes, bidirectional=config.bidirectional
            )
            total = lambda grads: collectives.reduce_buckets(ring, grads, bucket_bytes)
        case "reduce_scatter":
            both = functools.partial(collectives.scatter_gather, axes=axes)
            total = lambda grads: collectives.reduce_buckets(both, grads, bucket_bytes)
        case "hierarchical":
            levels = functools.partial(
                collectives.hierarchical,
                inner=tuple(axis for axis in axes if axis != "replica"),
                outer=tuple(axis for axis in axes if axis == "replica"),
            )
            total = lambda grads: collectives.reduce_buckets(levels, grads, bucket_bytes)
    if config.compress.kind == "none":
        return reduce.stateless(total)
    sums = exchange.PlainSums(total, total)
    group = reduce.communicator(parts, axes)
    return exchange.build_reducer(config.compress, group, sums, bucket_bytes)
