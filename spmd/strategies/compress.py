"""Compressed sums: int8, top-k, PowerSGD; each with error feedback, what was left out is sent later.

Error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847): a device compresses its
gradient plus what it has left out so far, so that over the steps everything arrives.
"""

# N devices, C elements of a chunk; m x n a gradient as a matrix, r its rank

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import tree
from spmd.core.fields import check
from spmd.parallel import collectives, sharding
from spmd.strategies import base, reduce
from spmd.strategies.reduce import Leaves

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression:
    """How gradients are made smaller to be sent; with error feedback: what is left out is sent later."""

    kind: Literal["none", "int8", "top-k", "powersgd"] = "none"
    """int8: blocks of small integers; top-k: the largest entries; powersgd: products of thin matrices."""
    block: int = 256
    """int8: elements that share a scale (4 bytes)."""
    keep: float = 0.01
    """top-k: the fraction of each array's entries that is sent, with their places (8 bytes each)."""
    rank: int = 4
    """powersgd: columns of the thin matrices; arrays of one dim are sent whole."""

    def __post_init__(self) -> None:
        check(self.block >= 1, f"strategy.compress.block={self.block} must be at least 1")
        check(0 < self.keep <= 1, f"strategy.compress.keep={self.keep} must be in (0, 1]")
        check(self.rank >= 1, f"strategy.compress.rank={self.rank} must be at least 1")

    def not_private(self) -> str:
        """As StrategyConfig's: noise is measured for clipped gradients, and what is left out comes later."""
        return "" if self.kind == "none" else f"strategy.compress.kind={self.kind} changes the sum"


class Way(NamedTuple):
    """Where the sums of a strategy go.

    total: {name: part} -> its sum, as the strategy wants it. whole: the same, whole on every device. dims: by
    name, which dim its owners share; None where every device wants all of everything. by: where the
    compiler makes the collectives.
    """

    axes: tuple[str, ...]
    num: int
    total: reduce.Sum
    whole: reduce.Sum
    dims: Mapping[str, int | None] | None = None
    by: collectives.Placing = collectives.DIRECT

    def keep(self, sums: Leaves) -> Leaves:
        """This device's part of the sums: all of them, or its shards."""
        dims = self.dims
        if dims is None:
            return sums
        return {name: collectives.local_shard(x, self.axes, dims[name]) for name, x in sums.items()}


class Sent(NamedTuple):
    """sums: as the strategy wants them. errors: what this device has left out, by name. chunks, common: the
    method's own state.
    """

    sums: Leaves
    errors: Leaves
    chunks: list[jax.Array]
    common: Leaves


class Method(NamedTuple):
    """takes: whether it compresses an array. chunks: shapes of what each device carries beside its errors.
    common: what all carry. send: (gradients plus errors, chunks, common) -> Sent.
    """

    takes: Callable[[str, Any], bool]
    send: Callable[[Leaves, list[jax.Array], Leaves], Sent]
    chunks: Callable[[Leaves], list[jax.ShapeDtypeStruct]] = lambda leaves: []
    common: Callable[[Leaves], Leaves] = lambda leaves: {}


def way(
    parts: base.Parts,
    axes: tuple[str, ...],
    total: reduce.Sum,
    whole: reduce.Sum,
    dims: Mapping[str, int | None] | None = None,
) -> Way:
    """The Way over `axes` within a shard_map over them."""
    num = math.prod(parts.mesh.shape[axis] for axis in axes)
    by = shared(parts.mesh, axes) if reduce.within(parts) else collectives.DIRECT
    return Way(axes, num, total, whole, dims, by)


def shared(mesh: Mesh, axes: tuple[str, ...]) -> collectives.Placing:
    """Split a message among the devices that hold identical copies, so that each sends 1/n of it over `axes`.

    Within a shard_map over `axes` the exchange is one over the others; under a vmap the compiler makes it, of
    what is laid so.
    """
    others = tuple(axis for axis in mesh.axis_names if axis not in axes and mesh.shape[axis] > 1)
    ways = math.prod(mesh.shape[axis] for axis in others)

    def mapped(fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        how = {"check_vma": False, **sharding.manual(mesh)}  # what all hold alike is not typed so
        return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, **how)

    def exchanged(fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        last = lambda ndim: P(*(None,) * (ndim - 1), others)
        placed = lambda x: sharding.constrain(x, NamedSharding(mesh, last(x.ndim)))

        def run(x: jax.Array) -> jax.Array:
            if ways == 1 or x.shape[-1] % ways:
                return fn(x)
            if not sharding.inside():
                return placed(fn(placed(x)))
            return mapped(fn, last(x.ndim), last(jax.eval_shape(fn, x).ndim))(x)

        return run

    return collectives.Placing(ways, exchanged, lambda fn: mapped(fn, P(), P()))


def reducer(config: Any, way: Way, bucket_bytes: float) -> reduce.Reducer:
    """The Reducer of a strategies.Compression. What it does not take (vectors, for PowerSGD) goes plainly."""
    match config.kind:
        case "int8" if way.dims is None:
            method = int8_all_reduce(way, config.block, bucket_bytes)
        case "int8":
            method = int8_push(way, config.block)
        case "top-k":
            method = top_k(way, config.keep)
        case "powersgd":
            method = powersgd(way, config.rank)
        case _:
            raise AssertionError(config.kind)

    def init(params: PyTree) -> PyTree:
        named = tree.named_leaves(params).items()
        taken = {
            n: jnp.zeros(p.shape, tree.at_least_float32(p.dtype))
            for n, p in named
            if method.takes(n, p)
        }
        zeros = lambda x: jnp.zeros((way.num, *x.shape), x.dtype)
        own = {"errors": taken, "chunks": method.chunks(taken)}
        return {"own": jax.tree.map(zeros, own), "common": method.common(taken)}

    def send(grads: Leaves, state: PyTree) -> tuple[Leaves, PyTree]:
        errors, chunks = state["own"]["errors"], state["own"]["chunks"]
        rest = {name: g for name, g in grads.items() if name not in errors}
        x = {name: grads[name].astype(e.dtype) + e for name, e in errors.items()}
        sent = method.send(x, chunks, state["common"])
        sums = {name: total.astype(grads[name].dtype) for name, total in sent.sums.items()}
        own = {"errors": sent.errors, "chunks": sent.chunks}
        return sums | way.total(rest), {"own": own, "common": sent.common}

    return reduce.Reducer(init, reduce.by_name(send))


# ---- int8


def int8_all_reduce(way: Way, block: int, bucket_bytes: float) -> Method:
    """A bucket's chunks go to their owners as int8, the sums come back as int8: two quantisations, and error
    feedback for both, the second one's at the owner.
    """

    def buckets(leaves: Leaves) -> list[list[str]]:
        names = list(leaves)
        found = collectives.buckets(list(leaves.values()), bucket_bytes)
        return [[names[i] for i in bucket] for bucket in found]

    def chunks(leaves: Leaves) -> list[jax.ShapeDtypeStruct]:
        sizes = [sum(leaves[n].size for n in bucket) for bucket in buckets(leaves)]
        return [
            jax.ShapeDtypeStruct((-(-size // way.num),), leaves[bucket[0]].dtype)
            for size, bucket in zip(sizes, buckets(leaves), strict=True)
        ]

    def chunked(parts: list[jax.Array]) -> jax.Array:
        """[N, C] end to end."""
        return collectives.split(jnp.concatenate([part.reshape(-1) for part in parts]), way.num)

    def send(x: Leaves, chunks: list[jax.Array], common: Leaves) -> Sent:
        sums, errors, left = Leaves(), Leaves(), list[jax.Array]()
        for bucket, late_C in zip(buckets(x), chunks, strict=True):
            x_NC = way.by.alone(chunked)([x[name] for name in bucket])
            mine_C, error_NC = collectives.int8_reduce_scatter(x_NC, way.axes, block, way.by)
            whole_NC, late_C = collectives.int8_all_gather(mine_C + late_C, way.axes, block, way.by)
            left.append(late_C)
            start = 0
            for name in bucket:
                cut = slice(start, start + x[name].size)
                sums[name] = whole_NC.reshape(-1)[cut].reshape(x[name].shape)
                errors[name] = error_NC.reshape(-1)[cut].reshape(x[name].shape)
                start += x[name].size
        return Sent(sums, errors, left, common)

    return Method(lambda name, leaf: True, send, chunks)


def int8_push(way: Way, block: int) -> Method:
    """Each device's part of an array goes to its owner as int8, who sums; what has no owner goes plainly."""
    assert way.dims is not None
    dims = way.dims

    def send(x: Leaves, chunks: list[jax.Array], common: Leaves) -> Sent:
        sums, errors = Leaves(), Leaves()
        for name, part in x.items():
            dim = dims[name]
            assert dim is not None
            rows = jnp.moveaxis(part, dim, 0)
            mine_C, error_NC = collectives.int8_reduce_scatter(
                rows.reshape(way.num, -1), way.axes, block, way.by
            )
            errors[name] = jnp.moveaxis(error_NC.reshape(rows.shape), 0, dim)
            sums[name] = jnp.moveaxis(mine_C.reshape(-1, *rows.shape[1:]), 0, dim)
        return Sent(sums, errors, chunks, common)

    return Method(lambda name, leaf: dims[name] is not None, send)


# ---- top-k


def top_k(way: Way, keep: float) -> Method:
    """The largest entries of each array, with their places, gathered by every device (Lin et al. 2018, arXiv
    1712.01887, without its momentum).
    """

    def largest(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(their values, their places, x without them)."""
        flat = x.reshape(-1)
        _, place_k = jax.lax.top_k(jnp.abs(flat), num_kept(flat.size, keep))
        return flat[place_k], place_k, flat.at[place_k].set(0).reshape(x.shape)

    def gathered(x_k: jax.Array) -> jax.Array:
        if not way.axes:
            return x_k
        x_k = jnp.pad(x_k, (0, -x_k.size % way.by.ways))  # a part for each device
        return way.by.exchanged(lambda x: jax.lax.all_gather(x, way.axes, tiled=True))(x_k)

    def send(x: Leaves, chunks: list[jax.Array], common: Leaves) -> Sent:
        sums, errors = Leaves(), Leaves()
        for name, part in x.items():
            value_k, place_k, errors[name] = way.by.alone(largest)(part)
            added = lambda v, p, like=part: jnp.zeros(like.size, v.dtype).at[p].add(v)
            whole = way.by.alone(added)(gathered(value_k), gathered(place_k))
            sums[name] = whole.reshape(part.shape)
        return Sent(way.keep(sums), errors, chunks, common)

    return Method(lambda name, leaf: True, send)


def num_kept(size: int, keep: float) -> int:
    """Number of entries kept."""
    return min(size, max(1, math.ceil(size * keep)))


# ---- PowerSGD


def powersgd(way: Way, rank: int) -> Method:
    """Arrays of two and more dims as products of two thin matrices, found by one power iteration that starts
    from the last step's (Vogels et al. 2019, arXiv 1905.13727).

    Both bases are made orthonormal by QR: a full rank then gives the whole gradient, even where the last
    step's had a lower rank, which the paper's warm start would lose.
    """

    def ranks(shape: tuple[int, ...]) -> tuple[int, int, int]:
        m, n = math.prod(shape[:-1]), shape[-1]
        return m, n, min(rank, m, n)

    def common(leaves: Leaves) -> Leaves:
        found = Leaves()
        for i, (name, leaf) in enumerate(leaves.items()):
            _, n, r = ranks(leaf.shape)
            key = jax.random.fold_in(jax.random.key(0), i)
            found[name] = jax.random.normal(key, (n, r), leaf.dtype)
        return found

    def send(x: Leaves, chunks: list[jax.Array], right_nr: Leaves) -> Sent:
        matrix_mn = {name: part.reshape(-1, part.shape[-1]) for name, part in x.items()}
        basis_nr = {name: jnp.linalg.qr(q)[0] for name, q in right_nr.items()}
        left_mr = way.whole({name: mat @ basis_nr[name] for name, mat in matrix_mn.items()})
        left_mr = {name: jnp.linalg.qr(p)[0] for name, p in left_mr.items()}
        own_nr = {name: mat.T @ left_mr[name] for name, mat in matrix_mn.items()}
        right_nr = way.whole(own_nr)

        def product(right_nr: Leaves) -> Leaves:
            return {n: (left_mr[n] @ q.T).reshape(x[n].shape) for n, q in right_nr.items()}

        errors = {name: x[name] - sent for name, sent in product(own_nr).items()}
        return Sent(way.keep(product(right_nr)), errors, chunks, right_nr)

    return Method(lambda name, leaf: len(leaf.shape) > 1, send, common=common)
