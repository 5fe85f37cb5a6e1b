"""Exact top-k of inner products over a table that is sharded over all devices."""

# B queries, D width, N rows, S excluded rows of a query, K results

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

NONE = -1  # in place of a row, where there are fewer than k


class TopK(NamedTuple):
    """Rows of largest scores, each [B, K] in descending order; of equal scores the lower row first.

    scores: -inf, and rows: -1, where fewer than K rows are left.
    """

    scores: jax.Array
    rows: jax.Array


def all_axes(mesh: Mesh) -> tuple[str, ...]:
    """All axes of a mesh, over which the rows are sharded."""
    return tuple(map(str, mesh.axis_names))


def padded_rows(num_rows: int, mesh: Mesh) -> int:
    """Rows of a table of `num_rows` that the devices of a mesh divide."""
    return -(-num_rows // mesh.size) * mesh.size


def sharded_top_k(
    mesh: Mesh,
    query_BD: jax.Array,
    table_ND: jax.Array,
    excluded_BS: jax.Array,
    *,
    num_rows: int,
    k: int,
) -> TopK:
    """The k rows of largest inner product with each query: of each device's rows, then of all.

    Each device sends k scores and rows for each query, whatever the size of the table.

    Args:
        mesh: devices that share the table.
        query_BD: [B, D], the same on all devices.
        table_ND: [N, D], N a multiple of the number of devices, rows sharded over all of them.
        excluded_BS: int32 [B, S] rows that are no results, -1 for none.
        num_rows: rows from this one on are padding.
        k: number of results.

    Returns:
        [B, K], K = min(k, N), on all devices.
    """
    axes = all_axes(mesh)

    def best_of_device(
        query_BD: jax.Array, table_ND: jax.Array, excluded_BS: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        num = table_ND.shape[0]
        first = jax.lax.axis_index(axes).astype(jnp.int32) * num
        score_BN = _scores(query_BD, table_ND, excluded_BS - first, num_rows - first)
        score_BK, row_BK = jax.lax.top_k(score_BN, min(k, num))
        return score_BK[None], row_BK.astype(jnp.int32)[None] + first

    along, replicated = P(axes), P()
    by_device = jax.shard_map(
        best_of_device,
        mesh=mesh,
        in_specs=(replicated, along, replicated),
        out_specs=(along, along),
    )(query_BD, table_ND, excluded_BS)
    # In the order of the devices, and so of the rows: the first of equal scores has the lowest row.
    together = NamedSharding(mesh, replicated)
    joined = [
        jax.lax.with_sharding_constraint(
            jnp.moveaxis(x, 0, 1).reshape(query_BD.shape[0], -1), together
        )
        for x in by_device
    ]
    score_BK, place_BK = jax.lax.top_k(joined[0], min(k, joined[0].shape[1]))
    row_BK = jnp.take_along_axis(joined[1], place_BK, axis=1)
    return TopK(score_BK, jnp.where(jnp.isneginf(score_BK), NONE, row_BK))


def _scores(
    query_BD: jax.Array, table_ND: jax.Array, excluded_BS: jax.Array, num_rows: jax.Array
) -> jax.Array:
    """Scores [B, N] of a device's rows, -inf where one is excluded or from num_rows on."""
    num = table_ND.shape[0]
    highest = jax.lax.Precision.HIGHEST
    score_BN = jnp.einsum("bd,nd->bn", query_BD, table_ND, precision=highest)
    least = jnp.asarray(-jnp.inf, score_BN.dtype)
    real_N = jnp.arange(num, dtype=jnp.int32) < num_rows
    score_BN = jnp.where(real_N[None], score_BN, least)
    # Negative numbers would count from the end.
    at_BS = jnp.where((excluded_BS >= 0) & (excluded_BS < num), excluded_BS, num)
    query_B1 = jnp.arange(at_BS.shape[0], dtype=jnp.int32)[:, None]
    return score_BN.at[query_B1, at_BS].set(least, mode="drop")
