"""Messages between devices, of which several may hold the same: all-to-all, all-gather, each part sent once.

Notation as in spmd.parallel.collectives.
"""

# N devices of the axes, C elements of a chunk

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.parallel import sharding

PyTree = Any
Axes = tuple[str, ...]


class Communicator(NamedTuple):
    """The devices that exchange messages, trees of arrays, along mesh or vmap axes.

    size: number of them. copies: devices that hold identical copies of each array; every one sends 1 / copies
    of it. divide: wraps a collective of one array accordingly. replicate: wraps a local computation on
    replicated arrays that the compiler cannot partition. The defaults: one device holds each array.
    """

    axes: Axes
    size: int
    copies: int = 1
    divide: Callable[[Callable[[jax.Array], jax.Array]], Callable[[jax.Array], jax.Array]] = (
        lambda fn: fn
    )
    replicate: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn

    def all_to_all(self, message: PyTree) -> PyTree:
        """A[N, C] {different on each device} -> A[N, C]: row i is what device i had in this device's row."""
        if not self.axes:
            return message
        swap = self.divide(lambda x: jax.lax.all_to_all(x, self.axes, 0, 0, tiled=True))
        return jax.tree.map(swap, message)

    def all_gather(self, message: PyTree) -> PyTree:
        """A[N_X, C] -> A[N, C], from this device's [C]."""
        if not self.axes:
            return jax.tree.map(lambda x: x[None], message)
        gather = self.divide(lambda x: jax.lax.all_gather(x, self.axes))
        return jax.tree.map(gather, message)

    def pad(self, x: jax.Array) -> jax.Array:
        """[k] -> [k'].

        Args:
            x: [k].

        Returns:
            [k'], zeros at the end until the copies divide it.
        """
        return jnp.pad(x, (0, -x.size % self.copies))


def divide_among_copies(group: Communicator, mesh: Mesh, axes: Axes) -> Communicator:
    """Split each message among the devices that hold identical copies of it, so that each sends 1/n of it.

    Within a shard_map over the mesh `axes` the exchange is a shard_map over the others; under a vmap the
    compiler makes it, from the sharding of its operand.

    Args:
        group: devices that exchange messages.
        mesh: of all devices.
        axes: those of the group; the devices of the other axes hold copies.

    Returns:
        The group with `copies`, `divide` and `replicate`.
    """
    others = tuple(axis for axis in mesh.axis_names if axis not in axes and mesh.shape[axis] > 1)
    copies = math.prod(mesh.shape[axis] for axis in others)

    def shard_map(fn: Callable[..., Any], in_specs: P, out_specs: P) -> Callable[..., Any]:
        # That replicated arrays are equal on all devices is not in their types.
        return jax.shard_map(
            fn,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
            **sharding.shard_map_options(mesh),
        )

    def divide(fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        last = lambda ndim: P(*(None,) * (ndim - 1), others)
        shard = lambda x: sharding.constrain(x, NamedSharding(mesh, last(x.ndim)))

        def run(x: jax.Array) -> jax.Array:
            if copies == 1 or x.shape[-1] % copies:
                return fn(x)
            if not sharding.manual_axes():
                return shard(fn(shard(x)))
            return shard_map(fn, last(x.ndim), last(jax.eval_shape(fn, x).ndim))(x)

        return run

    def replicate(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: shard_map(fn, P(), P())(*args)

    return group._replace(copies=copies, divide=divide, replicate=replicate)
