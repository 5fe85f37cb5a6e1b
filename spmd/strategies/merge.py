"""Merge of the replicas in an outer step: their differences to the consensus are averaged over `replica`.

Compressed, each replica sends its share of the mean plus its earlier errors (exchange.py). The
methods run in a vmap over the replicas, whose collectives the compiler makes: so the result depends on the
replicas only, not on how they lie on the mesh, and the arrays of one of them may be cut (FSDP, tensor
parallelism). Several replicas of one device each send for themselves.
"""

# R replicas

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd.parallel.communicator import Communicator, divide_among_copies
from spmd.parallel.mesh import BATCH_AXES
from spmd.strategies import base, exchange, reduce
from spmd.strategies.compress import Compression

PyTree = Any
AXIS = "replica"
INSIDE = tuple(axis for axis in BATCH_AXES if axis != AXIS)  # of a replica's batch
REPLICAS = "replicas"  # the axis of the vmap
_BUCKET_BYTES = 4 * reduce.MiB


class Merge(NamedTuple):
    """mean: ({"params", "statistics"} [R, ...], weights [R], key, state) -> (their weighted mean, metrics,
    state). init: params -> the state that it carries; shardings: of that.
    """

    mean: Callable[..., tuple[PyTree, base.Metrics, PyTree]]
    init: Callable[[PyTree], PyTree] = lambda params: {}
    shardings: Any = MappingProxyType({})


def stateless(mean: Callable[..., tuple[PyTree, base.Metrics]]) -> Merge:
    """A merge without state, from (x [R, ...], weights [R], key) -> (mean, metrics)."""
    return Merge(lambda x_R, weight_R, key, state: (*mean(x_R, weight_R, key), state))


def shares(weight_R: jax.Array, like_R: jax.Array) -> jax.Array:
    """The share of each replica in a mean.

    Args:
        weight_R: [R].
        like_R: [R, ...], of whose dtype and number of dims the result is.

    Returns:
        [R, 1, ...], zeros where nothing weighs.
    """
    weight_R = weight_R.astype(like_R.dtype)
    total = weight_R.sum()
    share_R = weight_R / jnp.where(total > 0, total, jnp.ones_like(total))
    return share_R.reshape(-1, *(1,) * (like_R.ndim - 1))


def weighted(x_R: jax.Array, weight_R: jax.Array) -> jax.Array:
    """The mean over replicas.

    Args:
        x_R: [R, ...].
        weight_R: [R].

    Returns:
        [...], zeros where nothing weighs.
    """
    return jnp.sum(x_R * shares(weight_R, x_R), axis=0)


def weighted_mean(
    x_R: PyTree, weight_R: jax.Array, key: jax.Array
) -> tuple[PyTree, dict[str, jax.Array]]:
    """The mean over replicas of a tree, without compression.

    Args:
        x_R: [R, ...] for each leaf.
        weight_R: [R].
        key: of this step; not read.

    Returns:
        [...] for each leaf, and no metrics.
    """
    del key
    return jax.tree.map(lambda leaf_R: weighted(leaf_R, weight_R), x_R), {}


def build(config: Compression, parts: base.Parts, num_replicas: int) -> Merge:
    """The Merge of strategy.compress; batch statistics are sent uncompressed.

    Args:
        config: the compression.
        parts: as of every strategy.
        num_replicas: number of replicas.
    """
    if config.kind == "none":
        return stateless(weighted_mean)
    all_reduce = lambda leaves: {n: jax.lax.psum(x, REPLICAS) for n, x in leaves.items()}
    sums = exchange.PlainSums(all_reduce, all_reduce)
    group = Communicator((REPLICAS,), num_replicas)
    group = divide_among_copies(group, parts.mesh, (AXIS,))
    reducer = exchange.build_reducer(config, group, sums, _BUCKET_BYTES)
    axes = {reduce.PER_DEVICE: 0, reduce.COMMON: None}
    send = jax.vmap(
        reducer.reduce,
        in_axes=(0, axes),
        out_axes=(None, axes),
        axis_name=REPLICAS,
        spmd_axis_name=AXIS,
    )

    def mean(
        x_R: PyTree, weight_R: jax.Array, key: jax.Array, state: PyTree
    ) -> tuple[PyTree, base.Metrics, PyTree]:
        statistics, metrics = weighted_mean(x_R["statistics"], weight_R, key)
        sent_R = jax.tree.map(lambda leaf_R: leaf_R * shares(weight_R, leaf_R), x_R["params"])
        params, state = send(sent_R, state)
        return {"params": params, "statistics": statistics}, metrics, state

    init = functools.partial(reduce.init_state, reducer, num_replicas)
    return Merge(mean, init, reduce.state_shardings(parts, (AXIS,), reducer))
