"""Parameter server, spread over the devices: each owns a part of the parameters and of the optimizer state.

Push: the gradients are reduce-scattered, each part's sum to its owner. The owner updates its part. Pull: the
parts are gathered (Li et al. 2014, OSDI; at staleness 0 this is ZeRO-1's traffic).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import tree
from spmd.core.fields import check
from spmd.parallel import collectives, scope, sharding
from spmd.strategies import base, exchange, reduce, tables, update
from spmd.strategies.compress import Compression
from spmd.strategies.config import StrategyConfig
from spmd.strategies.grads.direct import Trained

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server(StrategyConfig):
    """Parameter server on all devices: gradients are pushed to owners, parameters pulled from them."""

    name: ClassVar[str] = "server"
    by_device: ClassVar[bool] = True
    merges_over: ClassVar[tuple[str, ...]] = ("replica", "data")
    staleness: int = 0
    """Workers compute on parameters so many updates old; 0 is synchronous SGD."""
    compress: Compression = Compression()
    """Compression of the gradients that are pushed."""

    def __post_init__(self) -> None:
        check(self.staleness >= 0, f"strategy.staleness={self.staleness} must not be negative")

    def build(self, parts: base.Parts) -> base.Strategy:
        return build(parts, self)

    def not_private(self) -> str:
        return self.compress.not_private()

    def not_by_term(self) -> str:
        return self.compress.not_by_term()

    def not_sparse(self) -> str:
        if self.staleness:
            return f"strategy.staleness={self.staleness} would pair new rows with old parameters"
        return self.compress.not_sparse()


def build(parts: base.Parts, config: Server) -> base.Strategy:
    """Parameters, moments and average sharded over all replicas; small arrays, and those that do not divide,
    are replicated. ValueError for meshes and models that it cannot take.
    """
    axes = reduce.reduction_axes(parts, "server")
    params, _ = base.abstract_params(parts)
    owners = sharding.owner_shardings(params, parts.task.dims, parts.mesh, axes or ("data",))
    specs = jax.tree.map(lambda s: s.spec, owners)
    reduce.check_noise_scale(parts, config.compress.kind)
    reducer = build_reducer(parts, config, axes, owners)
    queue = Queue(config.staleness)
    shardings = dataclasses.replace(
        base.shardings_of(parts, params=owners, moments=owners, fsdp=True),
        strategy_state=queue.shardings(owners) | reduce.state_shardings(parts, axes, reducer),
    )
    gradients = reduce.build_gradients(parts, axes)
    push = reduce.build_reduction(parts, axes, reducer, specs)
    pull = build_pull(parts, axes, specs)

    def step(state: base.TrainState, batch: base.Batch) -> tuple[base.TrainState, base.Metrics]:
        pulled = tables.pull(parts, state, batch)
        stale, queued = queue.exchange(state.strategy_state, state.params)
        grads, sums, model_state = gradients(
            Trained(pull(stale), pulled.rows), state.model_state, batch, base.step_key(state)
        )
        carried = {
            key: part
            for key, part in state.strategy_state.items()
            if key in (reduce.PER_DEVICE, reduce.COMMON)
        }
        total, carried = push(grads.params, carried)
        grads = Trained(total, grads.rows)
        return update.update_state(parts, state, grads, sums, model_state, pulled, queued | carried)

    num = reduce.num_devices(parts, axes)
    init = lambda params: queue.init(params) | reduce.init_state(reducer, num, params)
    return base.build_strategy(parts, shardings, step, init)


def build_pull(parts: base.Parts, axes: tuple[str, ...], specs: PyTree) -> Any:
    """A function that gathers parameters sharded by `specs` into those of a replica."""

    def gather(x: jax.Array, spec: P) -> jax.Array:
        dim = sharded_dim(spec, axes)
        return x if dim is None else jax.lax.all_gather(x, axes, axis=dim, tiled=True)

    return jax.shard_map(
        lambda params: jax.tree.map(gather, params, specs),
        mesh=parts.mesh,
        in_specs=(specs,),
        out_specs=jax.tree.map(lambda s: s.spec, reduce.param_shardings(parts)),
        check_vma=False,  # what is gathered is the same everywhere, but typed as if it were not
    )


def build_reducer(
    parts: base.Parts, config: Server, axes: tuple[str, ...], owners: PyTree
) -> reduce.Reducer:
    """The Reducer of the push: each owner receives the sum of its shards.

    Args:
        parts: as of every strategy.
        config: the strategy.
        axes: of the reduction.
        owners: shardings of the parameters over their owners.
    """
    dims = {name: sharded_dim(s.spec, axes) for name, s in tree.named_leaves(owners).items()}

    def reduce_scatter(grads: reduce.Leaves) -> reduce.Leaves:
        return {n: collectives.reduce_scatter(g, axes, dims[n]) for n, g in grads.items()}

    def all_reduce(grads: reduce.Leaves) -> reduce.Leaves:
        return {name: scope.batch_sum(g) for name, g in grads.items()}

    if config.compress.kind == "none":
        plain = reduce.on_named_leaves(lambda grads, state: (reduce_scatter(grads), state))
        return reduce.stateless(lambda grads: plain(grads, {})[0])
    sums = exchange.PlainSums(all_reduce, reduce_scatter, dims)
    return exchange.build_reducer(config.compress, reduce.communicator(parts, axes), sums, 0)


def sharded_dim(spec: P, axes: tuple[str, ...]) -> int | None:
    """The dim that is sharded over `axes`; None: none is."""
    return next((i for i, entry in enumerate(spec) if entry in (axes, *axes)), None)


@dataclasses.dataclass(frozen=True)
class Queue:
    """Ring buffer of the parameters of the last `staleness` updates, sharded as the parameters are: an update
    overwrites the oldest.

    It counts updates itself: a step that was skipped (TrainState.step counts it) must not move it.
    """

    staleness: int

    def init(self, params: PyTree) -> PyTree:
        """Fill the queue with the initial parameters."""
        if not self.staleness:
            return {}
        copies = lambda p: jnp.broadcast_to(p, (self.staleness, *p.shape))
        return {"queue": jax.tree.map(copies, params), "oldest": jnp.zeros((), jnp.int32)}

    def exchange(self, queued: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        """(strategy state, parameters) -> (parameters `staleness` updates ago, the queue's next state)."""
        if not self.staleness:
            return params, {}
        slot = queued["oldest"]
        take = lambda q: jax.lax.dynamic_index_in_dim(q, slot, keepdims=False)
        put = lambda q, p: jax.lax.dynamic_update_index_in_dim(q, p, slot, 0)
        pushed = {
            "queue": jax.tree.map(put, queued["queue"], params),
            "oldest": (slot + 1) % self.staleness,
        }
        return jax.tree.map(take, queued["queue"]), pushed

    def shardings(self, owners: PyTree) -> PyTree:
        """Shardings of `init`."""
        if not self.staleness:
            return {}
        mesh = jax.tree.leaves(owners)[0].mesh
        stack = lambda s: NamedSharding(s.mesh, P(None, *s.spec))
        return {"queue": jax.tree.map(stack, owners), "oldest": NamedSharding(mesh, P())}
