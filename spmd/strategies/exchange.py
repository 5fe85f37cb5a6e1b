"""Sums of compressed messages: how the devices exchange them, and the Reducer of a strategy's Compression."""

# N devices, C elements of a chunk

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from spmd.core import tree
from spmd.parallel import collectives
from spmd.parallel.communicator import Communicator
from spmd.strategies.compress import (
    Compression,
    Feedback,
    int8,
    pack_buckets,
    pack_first,
    pack_shards,
    powersgd,
    replicate,
    top_k,
    with_error_feedback,
)
from spmd.strategies.reduce import COMMON, PER_DEVICE, Leaves, Reducer, on_named_leaves

PyTree = Any


class PlainSums(NamedTuple):
    """Uncompressed sums of named arrays over the devices, as a strategy takes them.

    all_reduce: every device receives the sum. reduce: every device receives what the strategy keeps on it:
    all of the sum, or its shard along dims[name] (None: all of it).
    """

    all_reduce: Callable[[Leaves], Leaves]
    reduce: Callable[[Leaves], Leaves]
    dims: Mapping[str, int | None] | None = None


def build_reducer(
    config: Compression, group: Communicator, plain: PlainSums, bucket_bytes: float
) -> Reducer:
    """The Reducer of a Compression.

    Args:
        config: the compression.
        group: devices that exchange messages.
        plain: sums of what the compression does not take (vectors, for PowerSGD).
        bucket_bytes: size of a message, about.
    """
    takes: Callable[[str, Any], bool] = lambda name, leaf: True
    dims = plain.dims
    match config.kind:
        case "int8" if dims is None:
            compressed = int8_all_reduce(config.block, bucket_bytes, group)
        case "int8":
            sharded = {name: dim for name, dim in (dims or {}).items() if dim is not None}
            takes = lambda name, leaf: name in sharded
            compressed = int8_reduce_scatter(config.block, sharded, group)
        case "top-k":
            compressed = keep_shards(top_k_all_gather(config.keep, group), dims, group)
        case "powersgd":
            takes = lambda name, leaf: len(leaf.shape) > 1
            compressed = powersgd_all_reduce(config.rank, plain.all_reduce)
            compressed = keep_shards(compressed, dims, group)
        case _:
            raise AssertionError(config.kind)
    return split_reduction(takes, compressed, plain.reduce)


def keep_shards(
    inner: Reducer, dims: Mapping[str, int | None] | None, group: Communicator
) -> Reducer:
    """Keep this device's shards of sums that every device has.

    Args:
        inner: the Reducer of the sums.
        dims: the dim of each leaf that is sharded over the group, by name; None keeps all.
        group: as `build_reducer` takes it.
    """
    if dims is None:
        return inner

    def reduce(grads: Leaves, state: PyTree) -> tuple[Leaves, PyTree]:
        sums, state = inner.reduce(grads, state)
        shard = lambda name, x: collectives.local_shard(x, group.axes, dims[name])
        return {name: shard(name, x) for name, x in sums.items()}, state

    return inner._replace(reduce=reduce)


def split_reduction(
    takes: Callable[[str, Any], bool], compressed: Reducer, plain: Callable[[Leaves], Leaves]
) -> Reducer:
    """A Reducer of trees whose leaves are compressed, or not.

    Args:
        takes: whether a leaf, by its name and shape, is compressed.
        compressed: the Reducer of those.
        plain: sums of the others.
    """

    def taken(params: PyTree) -> Leaves:
        return {name: x for name, x in tree.named_leaves(params).items() if takes(name, x)}

    def reduce(grads: Leaves, state: PyTree) -> tuple[Leaves, PyTree]:
        names = state[PER_DEVICE]["errors"]
        rest = {name: g for name, g in grads.items() if name not in names}
        sums, state = compressed.reduce({name: grads[name] for name in names}, state)
        sums = {name: x.astype(grads[name].dtype) for name, x in sums.items()}
        return sums | plain(rest), state

    def specs(params: PyTree, param_specs: PyTree) -> PyTree:
        return compressed.specs(taken(params), tree.named_leaves(param_specs))

    return Reducer(lambda params: compressed.init(taken(params)), on_named_leaves(reduce), specs)


# ---- int8


def int8_all_reduce(block: int, bucket_bytes: float, group: Communicator) -> Reducer:
    """All-reduce in two hops: chunks of each bucket go to their owners as int8, the sums come back as int8.

    Two quantisations, and error feedback for both: for the second one at the owner, in the state's "chunks".

    Args:
        block: number of elements that share a scale.
        bucket_bytes, group: as `build_reducer` takes them.
    """
    packing = pack_buckets(group.size, bucket_bytes)
    addends = with_error_feedback(replicate(pack_first(int8(block), packing), group))
    totals = with_error_feedback(replicate(int8(block), group))

    def init(like: Leaves) -> PyTree:
        feedback = addends.init(like)
        chunks = [x[0] for x in packing.pack(feedback.errors)]
        return _state(feedback, totals.init(chunks).errors)

    def reduce(grads: Leaves, state: PyTree) -> tuple[Leaves, PyTree]:
        message, feedback = addends.encode(grads, _feedback(state))
        chunks = sum_rows(message, block, packing.pack, feedback.errors, group)
        message, late = totals.encode(chunks, Feedback(state[PER_DEVICE]["chunks"], {}))
        sums = addends.decode(group.all_gather(message), feedback.errors)
        return sums, _state(feedback, late.errors)

    return _reducer(init, reduce)


def int8_reduce_scatter(block: int, dims: Mapping[str, int], group: Communicator) -> Reducer:
    """Reduce-scatter in one hop: each device's part of an array goes to its owner as int8, who sums.

    Args:
        block: number of elements that share a scale.
        dims: the dim of each leaf that is sharded over the group, by name.
        group: as `build_reducer` takes it.
    """
    packing = pack_shards(group.size, dims)
    addends = with_error_feedback(replicate(pack_first(int8(block), packing), group))

    def shard(x: jax.Array, dim: int) -> jax.ShapeDtypeStruct:
        shape = (*x.shape[:dim], x.shape[dim] // group.size, *x.shape[dim + 1 :])
        return jax.ShapeDtypeStruct(shape, x.dtype)

    def reduce(grads: Leaves, state: PyTree) -> tuple[Leaves, PyTree]:
        message, feedback = addends.encode(grads, _feedback(state))
        chunks = sum_rows(message, block, packing.pack, feedback.errors, group)
        shards: Any = {name: shard(x, dims[name]) for name, x in feedback.errors.items()}
        return packing.unpack(chunks, shards), _state(feedback)

    return _reducer(lambda like: _state(addends.init(like)), reduce)


def sum_rows(
    message: PyTree, block: int, pack: Callable[[Leaves], Any], like: Leaves, group: Communicator
) -> list[jax.Array]:
    """int8 messages of A[N, C] {U_X} -> A[N_X, C]: each device sums the rows that are meant for it.

    Args:
        message: the encoded rows.
        block: number of elements that share a scale.
        pack: puts leaves into rows, as the sender did.
        like: leaves of the shapes and dtypes that were sent.
        group: as `build_reducer` takes it.

    Returns:
        [C] of each array.
    """
    rows = replicate(int8(block), group)
    received = rows.decode(group.all_to_all(message), jax.eval_shape(pack, like))
    return [x_NC.sum(axis=0) for x_NC in received]


# ---- top-k and PowerSGD


def top_k_all_gather(keep: float, group: Communicator) -> Reducer:
    """All-reduce by an all-gather of the entries; every device adds them up."""
    compressor = with_error_feedback(replicate(top_k(keep), group))

    def reduce(grads: Leaves, state: PyTree) -> tuple[Leaves, PyTree]:
        message, feedback = compressor.encode(grads, _feedback(state))
        message = group.all_gather(jax.tree.map(group.pad, message))
        return compressor.decode(message, feedback.errors), _state(feedback)

    return _reducer(lambda like: _state(compressor.init(like)), reduce)


def powersgd_all_reduce(rank: int, all_reduce: Callable[[Leaves], Leaves]) -> Reducer:
    """All-reduce of the left factors, then of the right ones, which are the next step's first basis."""
    compressor = with_error_feedback(powersgd(rank, all_reduce))

    def reduce(grads: Leaves, state: PyTree) -> tuple[Leaves, PyTree]:
        message, feedback = compressor.encode(grads, _feedback(state))
        message = message._replace(right=all_reduce(message.right))
        sums = compressor.decode(message, feedback.errors)
        return sums, _state(feedback._replace(inner=message.right))

    return _reducer(lambda like: _state(compressor.init(like)), reduce)


# ---- state

# The state of every compressed sum has the same parts, which checkpoints hold under these names.


def _state(feedback: Feedback, chunks: PyTree = ()) -> PyTree:
    per_device = {"errors": feedback.errors, "chunks": list(chunks)}
    return {PER_DEVICE: per_device, COMMON: feedback.inner}


def _feedback(state: PyTree) -> Feedback:
    return Feedback(state[PER_DEVICE]["errors"], state[COMMON])


def _reducer(init: Callable[[Leaves], PyTree], reduce: Callable[..., Any]) -> Reducer:
    """A Reducer of named leaves. Errors are sharded as parameters are; chunks and bases are replicated."""

    def specs(like: Leaves, param_specs: Mapping[str, P]) -> PyTree:
        state = jax.eval_shape(init, like)
        errors = {name: param_specs[name] for name in state[PER_DEVICE]["errors"]}
        chunks = [P() for _ in state[PER_DEVICE]["chunks"]]
        return _state(Feedback(errors, {name: P() for name in state[COMMON]}), chunks)

    return Reducer(init, reduce, specs)
