"""Sums that the server learns without learning the summands, by masks that cancel in pairs.

After Bonawitz et al. 2017 (Practical secure aggregation): numbers are integers modulo 2^32, each pair of
clients shares a seed, the one adds what it generates and the other subtracts it. Every single input is
uniformly distributed, the sum is exact. Of a client that has dropped out, the others reveal the seeds that
they share with it, so that its masks leave the sum; a round that only half of the clients survive is void.

What is here is the arithmetic of the protocol, inside one program that holds all seeds: no key agreement, no
secret sharing, and no second mask against a server that lies about who dropped out. It costs S^2 streams of
random numbers, each as long as the parameters.
"""

# S clients of a round

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from spmd.core import tree

PyTree = Any


def fraction_bits(num_clients: int, limit: float) -> int:
    """Binary places of numbers up to `limit`, so that the sum over all clients does not overflow."""
    return 30 - math.ceil(math.log2(num_clients * limit))


def to_fixed_point(x: jax.Array, places: int) -> jax.Array:
    """Integers modulo 2^32.

    Args:
        x: float [...].
        places: binary places.

    Returns:
        uint32 [...].
    """
    return jax.lax.bitcast_convert_type(jnp.round(x * 2.0**places).astype(jnp.int32), jnp.uint32)


def from_fixed_point(x: jax.Array, places: int, dtype: Any) -> jax.Array:
    """Inverse of `to_fixed_point`.

    Args:
        x: uint32 [...].
        places: binary places.
        dtype: of the result.

    Returns:
        [...].
    """
    return jax.lax.bitcast_convert_type(x, jnp.int32).astype(dtype) / 2.0**places


def mask_inputs(x_S: jax.Array, present_S: jax.Array, key: jax.Array) -> jax.Array:
    """Messages of the clients to the server: x plus the client's masks.

    In the place of an absent client are its masks towards the present ones, which these reveal, so that the
    sum over S is the sum of the present x.

    Args:
        x_S: uint32 [S, ...].
        present_S: bool [S].
        key: of this round and array.

    Returns:
        uint32 [S, ...].
    """
    num_clients = len(x_S)
    shape = x_S.shape[1:]

    def mask(client: jax.Array, partners_S: jax.Array) -> jax.Array:
        def add(other: jax.Array, total: jax.Array) -> jax.Array:
            low, high = jnp.minimum(client, other), jnp.maximum(client, other)
            pair = jax.random.fold_in(jax.random.fold_in(key, low), high)
            stream = jax.random.bits(pair, shape, jnp.uint32)
            signed = jnp.where(client < other, stream, -stream)
            counts = partners_S[other] & (other != client)
            return total + jnp.where(counts, signed, jnp.uint32(0))

        return jax.lax.fori_loop(0, num_clients, add, jnp.zeros(shape, jnp.uint32))

    def send(client: jax.Array, x: jax.Array, present: jax.Array) -> jax.Array:
        masked = mask(client, present_S | present)
        return masked + jnp.where(present, x, jnp.uint32(0))

    return jax.vmap(send)(jnp.arange(num_clients), x_S, present_S)


def mean(
    x_S: PyTree, weight_S: jax.Array, key: jax.Array, *, limit: float, max_weight: float
) -> tuple[PyTree, dict[str, jax.Array]]:
    """The weighted mean of the clients' arrays.

    Args:
        x_S: [S, ...] for each leaf.
        weight_S: [S] integers, 0 for drop-outs.
        key: of this round.
        limit: of the absolute value of x; larger ones are clipped.
        max_weight: the largest weight.

    Returns:
        [...] for each leaf, and the metric secure_clipped, the number of clipped values.
    """
    num_clients = len(weight_S)
    places = fraction_bits(num_clients, limit)
    present_S = weight_S > 0
    quorum = 2 * present_S.sum() > num_clients
    summed = lambda x_S, key: mask_inputs(x_S, present_S, key).sum(axis=0, dtype=jnp.uint32)
    weight = summed(weight_S.astype(jnp.uint32), jax.random.fold_in(key, 0))
    clipped = jnp.zeros((), jnp.float32)
    means = {}
    for index, (name, leaf_S) in enumerate(tree.named_leaves(x_S).items(), 1):
        part_S = (weight_S / max_weight).astype(leaf_S.dtype).reshape(-1, *(1,) * (leaf_S.ndim - 1))
        uploaded_S = to_fixed_point(jnp.clip(leaf_S, -limit, limit) * part_S, places)
        total = from_fixed_point(
            summed(uploaded_S, jax.random.fold_in(key, index)), places, leaf_S.dtype
        )
        share = jnp.where(quorum, max_weight / jnp.maximum(weight, 1).astype(leaf_S.dtype), 0)
        means[name] = total * share
        clipped += jnp.sum(jnp.abs(leaf_S) > limit).astype(jnp.float32)
    return tree.map_named(lambda name, _: means[name], x_S), {"secure_clipped": clipped}
