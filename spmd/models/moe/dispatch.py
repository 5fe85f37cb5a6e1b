"""Rows of tokens through their experts, on one device or exchanged by all-to-all."""

# B batch, T time, N tokens of a device, M = N * k rows, D embed, E experts, F mlp, k experts of a token,
# W devices that share the experts, r rows of a round

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from spmd.models.moe.grouped import grouped_matmul
from spmd.parallel import scope

UP_DIMS = ("experts", "embed", "mlp")
DOWN_DIMS = ("experts", "mlp", "embed")


def apply_experts(
    x_BTD: jax.Array,
    choice_BTk: jax.Array,
    share_BTk: jax.Array,
    up: jax.Array,
    down: jax.Array,
    gate: jax.Array | None,
) -> jax.Array:
    """Sum [B, T, D] of what each token's experts return, weighted by their shares; no token is dropped.

    Args:
        x_BTD: tokens.
        choice_BTk: experts of each token, distinct.
        share_BTk: weight of each expert's result.
        up: kernels [E, D, F].
        down: kernels [E, F, D].
        gate: kernels [E, D, F] of SwiGLU; None is GELU.

    Returns:
        [B, T, D].
    """
    kernels, kernel_dims = [up, down], [UP_DIMS, DOWN_DIMS]
    if gate is not None:
        kernels, kernel_dims = [*kernels, gate], [*kernel_dims, UP_DIMS]
    time = "time" if x_BTD.shape[1] > 1 else None
    row, chosen = ("batch", time, "embed"), ("batch", time, None)
    run = scope.blockwise(_apply_block, (row, chosen, chosen, *kernel_dims), row)
    return run(x_BTD, choice_BTk, share_BTk, *kernels)


def _apply_block(x_BTD, choice_BTk, share_BTk, up, down, gate=None):
    """The tokens of one device through their experts, wherever these are."""
    flat = lambda x: x.reshape(-1, x.shape[-1])
    apply = functools.partial(_feed_forward, up=up, down=down, gate=gate)
    if scope.sharding_axes("experts"):
        run = functools.partial(_exchanged, num_local=up.shape[0], apply=apply)
    else:
        run = functools.partial(_local, apply=apply)
    y_ND = run(flat(x_BTD), flat(choice_BTk), flat(share_BTk))
    if axes := tuple(scope.sharding_axes("mlp")):
        y_ND = jax.lax.psum(y_ND, axes)
    return y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape)


def _feed_forward(
    rows_MD: jax.Array,
    expert_M: jax.Array,
    *,
    up: jax.Array,
    down: jax.Array,
    gate: jax.Array | None,
) -> jax.Array:
    """Each row through its expert [M, D], in any order; 0 for rows of an expert past the last."""
    num = up.shape[0]
    order_M = jnp.argsort(expert_M, stable=True)
    sizes_E = _counts(expert_M, num)
    x_MD = rows_MD[order_M]
    y_MF = grouped_matmul(x_MD, up, sizes_E)
    if gate is None:
        y_MF = jax.nn.gelu(y_MF, approximate=True)
    else:
        y_MF = jax.nn.silu(grouped_matmul(x_MD, gate, sizes_E)) * y_MF
    y_MD = grouped_matmul(y_MF, down, sizes_E)
    return jnp.where((expert_M < num)[:, None], y_MD[jnp.argsort(order_M)], 0)


def _local(
    x_ND: jax.Array, choice_Nk: jax.Array, share_Nk: jax.Array, *, apply: Callable[..., jax.Array]
) -> jax.Array:
    """Weighted sums [N, D] where the device holds all experts."""
    (num, dim), top_k = x_ND.shape, choice_Nk.shape[1]
    y_MD = apply(jnp.repeat(x_ND, top_k, axis=0), choice_Nk.reshape(-1))
    y_NkD = y_MD.reshape(num, top_k, dim).astype(share_Nk.dtype)
    return (y_NkD * share_Nk[..., None]).sum(1)


def _exchanged(
    x_ND: jax.Array,
    choice_Nk: jax.Array,
    share_Nk: jax.Array,
    *,
    num_local: int,
    apply: Callable[..., jax.Array],
) -> jax.Array:
    """Weighted sums [N, D] where W devices share the experts: rows travel there and back by all-to-all.

    A round has room for M / W rows to each device. One is enough where loads are even; there are as many as
    the fullest device needs, W at most, so no row is dropped and no buffer exceeds the device's own M rows.
    """
    axes, num = tuple(scope.sharding_axes("experts")), scope.num_shards("experts")
    flat_M = choice_Nk.reshape(-1)
    order_M = jnp.argsort(flat_M, stable=True).astype(jnp.int32)
    room = -(-flat_M.size // num)
    counts_W = _counts(flat_M // num_local, num)
    ends_W = jnp.cumsum(counts_W, dtype=jnp.int32)
    needed = scope.max_over_replicas(jax.lax.pmax(-(-counts_W.max() // room), axes))
    exchange = functools.partial(
        jax.lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0, tiled=True
    )
    zeros_ND = jnp.zeros(x_ND.shape, share_Nk.dtype)

    def round_sum(number: jax.Array) -> jax.Array:
        """The part of the sums that the rows of one round contribute."""
        slot_Wr = (ends_W - counts_W)[:, None] + number * room
        slot_Wr += jnp.arange(room, dtype=jnp.int32).reshape(1, -1)
        taken_Wr = slot_Wr < ends_W[:, None]
        row_Wr = order_M[jnp.minimum(slot_Wr, flat_M.size - 1)]
        token_Wr = row_Wr // choice_Nk.shape[1]
        expert_Wr = jnp.where(taken_Wr, flat_M[row_Wr] % num_local, num_local)
        rows_WrD, remote_Wr = exchange(x_ND[token_Wr]), exchange(expert_Wr)
        y_MD = apply(rows_WrD.reshape(-1, x_ND.shape[1]), remote_Wr.reshape(-1))
        y_WrD = exchange(y_MD.reshape(rows_WrD.shape)).astype(zeros_ND.dtype)
        share_Wr = jnp.where(taken_Wr, share_Nk.reshape(-1)[row_Wr], 0)
        return zeros_ND.at[token_Wr].add(y_WrD * share_Wr[..., None])

    # Rematerialised in the backward pass: the residuals of W rounds are W times the tokens.
    @jax.checkpoint
    def add_round(y_ND: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        return y_ND + jax.lax.cond(number < needed, round_sum, lambda _: zeros_ND, number), None

    return jax.lax.scan(add_round, zeros_ND, jnp.arange(num, dtype=jnp.int32))[0]


def _counts(index_M: jax.Array, num: int) -> jax.Array:
    """How often each of 0 .. num - 1 occurs [num]."""
    return jnp.zeros(num, jnp.int32).at[index_M].add(1, mode="drop")
