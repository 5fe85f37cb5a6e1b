"""Compressors: int8, top-k, PowerSGD, and error feedback around any of them.

A compressor encodes arrays as a message and decodes messages, in pure functions; exchange.py sends them and
decodes their sum. Error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847):
a device encodes its gradient plus the error of its earlier messages, so that over the steps everything
arrives.
"""

# N devices, C elements of a chunk, k entries; m x n a gradient as a matrix, r its rank

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from spmd.core import tree
from spmd.core.fields import check
from spmd.parallel import collectives
from spmd.parallel.communicator import Communicator
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

    def not_by_term(self) -> str:
        """As StrategyConfig's: what a term's gradient leaves out would come later, with another sum."""
        return "" if self.kind == "none" else f"strategy.compress.kind={self.kind} changes each sum"

    def not_sparse(self) -> str:
        """As StrategyConfig's: what is left out would have to find its row in a later step."""
        if self.kind == "none":
            return ""
        return f"strategy.compress.kind={self.kind} would send a part of a row's gradient in a later step"


class Compressor(NamedTuple):
    """A lossy encoding of a tree of arrays as pure functions, in the way of optax's GradientTransformation.

    init: tree (arrays or their shapes) -> state.
    encode: (tree, state) -> (message, state); a message is a tree of arrays.
    decode: (message, like) -> tree; like: arrays or shapes of what was encoded.
    """

    init: Callable[[PyTree], PyTree]
    encode: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    decode: Callable[[PyTree, PyTree], PyTree]


# ---- error feedback, and other wrappers


class Feedback(NamedTuple):
    """State of error feedback. errors: of all earlier messages, as the arrays. inner: the compressor's."""

    errors: PyTree
    inner: PyTree


def with_error_feedback(inner: Compressor) -> Compressor:
    """Encode arrays plus the error of the earlier messages; the error of this one is left for the next."""

    def init(like: PyTree) -> Feedback:
        zeros = lambda x: jnp.zeros(x.shape, tree.at_least_float32(x.dtype))
        return Feedback(jax.tree.map(zeros, like), inner.init(like))

    def encode(x: PyTree, state: Feedback) -> tuple[PyTree, Feedback]:
        x = jax.tree.map(lambda part, error: part.astype(error.dtype) + error, x, state.errors)
        message, inner_state = inner.encode(x, state.inner)
        errors = jax.tree.map(jnp.subtract, x, inner.decode(message, x))
        return message, Feedback(errors, inner_state)

    return Compressor(init, encode, inner.decode)


def replicate(inner: Compressor, group: Communicator) -> Compressor:
    """Encode and decode on whole arrays on each device, where the compiler cannot partition it."""

    def decode(message: PyTree, like: PyTree) -> PyTree:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        return group.replicate(lambda message: inner.decode(message, shapes))(message)

    return Compressor(inner.init, group.replicate(inner.encode), decode)


class Packing(NamedTuple):
    """Arrangement of named arrays in rows, the i-th for the i-th device to sum.

    pack: {name: array} -> list of [N, C]. unpack: (list of [N, C], like) -> {name: array}.
    """

    pack: Callable[[Leaves], list[jax.Array]]
    unpack: Callable[[list[jax.Array], Leaves], Leaves]


def pack_buckets(num: int, bucket_bytes: float) -> Packing:
    """Pack arrays end to end in buckets of about `bucket_bytes`, each split into `num` chunks."""

    def buckets(leaves: Leaves) -> list[list[str]]:
        names = sorted(leaves)
        places = collectives.buckets([leaves[name] for name in names], bucket_bytes)
        return [[names[i] for i in bucket] for bucket in places]

    def pack(leaves: Leaves) -> list[jax.Array]:
        flat = lambda bucket: jnp.concatenate([leaves[name].reshape(-1) for name in bucket])
        return [collectives.split(flat(bucket), num) for bucket in buckets(leaves)]

    def unpack(rows: list[jax.Array], like: Leaves) -> Leaves:
        leaves = Leaves()
        for bucket, x_NC in zip(buckets(like), rows, strict=True):
            start = 0
            for name in bucket:
                size = like[name].size
                leaves[name] = x_NC.reshape(-1)[start : start + size].reshape(like[name].shape)
                start += size
        return leaves

    return Packing(pack, unpack)


def pack_shards(num: int, dims: Mapping[str, int]) -> Packing:
    """Pack each array alone; row i is the shard, along its dim of `dims`, that device i owns."""

    def pack(leaves: Leaves) -> list[jax.Array]:
        front = lambda name: jnp.moveaxis(leaves[name], dims[name], 0)
        return [front(name).reshape(num, -1) for name in sorted(leaves)]

    def unpack(rows: list[jax.Array], like: Leaves) -> Leaves:
        leaves = Leaves()
        for name, x_NC in zip(sorted(like), rows, strict=True):
            dim, shape = dims[name], like[name].shape
            front = (shape[dim], *shape[:dim], *shape[dim + 1 :])
            leaves[name] = jnp.moveaxis(x_NC.reshape(front), 0, dim)
        return leaves

    return Packing(pack, unpack)


def pack_first(inner: Compressor, packing: Packing) -> Compressor:
    """Encode the rows of a packing instead of the named arrays."""

    def encode(leaves: Leaves, state: PyTree) -> tuple[PyTree, PyTree]:
        return inner.encode(packing.pack(leaves), state)

    def decode(message: PyTree, like: Leaves) -> Leaves:
        return packing.unpack(inner.decode(message, jax.eval_shape(packing.pack, like)), like)

    return Compressor(inner.init, encode, decode)


# ---- int8


def int8(block: int) -> Compressor:
    """Encode blocks of the last dim as small integers and a scale: (int8 [..., C'], float32 [..., C'/K])."""

    def encode(x: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        return jax.tree.map(lambda part: collectives.quantise(part, block), x), state

    def decode(message: PyTree, like: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x, part: collectives.dequantise(part[0], part[1], x), like, message
        )

    return Compressor(lambda like: {}, encode, decode)


# ---- top-k


class Entries(NamedTuple):
    """Message of top-k: values and their places in the flattened array, [k] or of all devices [N, k]."""

    value: jax.Array
    place: jax.Array


def top_k(keep: float) -> Compressor:
    """Encode each array as its largest entries (Lin et al. 2018, arXiv 1712.01887, without its momentum)."""

    def largest(x: jax.Array) -> Entries:
        flat = x.reshape(-1)
        _, place_k = jax.lax.top_k(jnp.abs(flat), num_kept(flat.size, keep))
        return Entries(flat[place_k], place_k)

    def add(like: jax.Array, entries: Entries) -> jax.Array:
        zeros = jnp.zeros(like.size, entries.value.dtype)
        return (
            zeros.at[entries.place.reshape(-1)].add(entries.value.reshape(-1)).reshape(like.shape)
        )

    return Compressor(
        init=lambda like: {},
        encode=lambda x, state: (jax.tree.map(largest, x), state),
        decode=lambda message, like: jax.tree.map(add, like, message),
    )


def num_kept(size: int, keep: float) -> int:
    """Number of entries kept."""
    return min(size, max(1, math.ceil(size * keep)))


# ---- PowerSGD


class Factors(NamedTuple):
    """Message of PowerSGD, by name. left: [m, r], equal on all devices; right: [n, r], to be summed."""

    left: Leaves
    right: Leaves


def powersgd(rank: int, all_reduce: Callable[[Leaves], Leaves]) -> Compressor:
    """Encode arrays of two and more dims as products of two thin matrices, found by one power iteration that
    starts from the last step's right factors, the state (Vogels et al. 2019, arXiv 1905.13727).

    The left factors are all-reduced while encoding, so that all devices project on one basis, and the sum of
    their messages is the message of their sum. Both bases are made orthonormal by QR: a full rank then gives
    the whole gradient, even where the last step's had a lower rank, which the paper's warm start would lose.
    """

    def init(like: Leaves) -> Leaves:
        right_nr = Leaves()
        for i, (name, leaf) in enumerate(like.items()):
            m, n = math.prod(leaf.shape[:-1]), leaf.shape[-1]
            key = jax.random.fold_in(jax.random.key(0), i)
            dtype = tree.at_least_float32(leaf.dtype)
            right_nr[name] = jax.random.normal(key, (n, min(rank, m, n)), dtype)
        return right_nr

    def encode(x: Leaves, right_nr: Leaves) -> tuple[Factors, Leaves]:
        matrix_mn = {name: part.reshape(-1, part.shape[-1]) for name, part in x.items()}
        basis_nr = {name: jnp.linalg.qr(q)[0] for name, q in right_nr.items()}
        left_mr = all_reduce({name: mat @ basis_nr[name] for name, mat in matrix_mn.items()})
        left_mr = {name: jnp.linalg.qr(p)[0] for name, p in left_mr.items()}
        projected_nr = {name: mat.T @ left_mr[name] for name, mat in matrix_mn.items()}
        return Factors(left_mr, projected_nr), right_nr

    def decode(message: Factors, like: Leaves) -> Leaves:
        return {
            name: (message.left[name] @ q.T).reshape(like[name].shape)
            for name, q in message.right.items()
        }

    return Compressor(init, encode, decode)
