"""Tables whose rows are gathered by index, and the logits of their rows."""

# B batch, T time, D embed, V rows of a table

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.core import tree
from spmd.models.layers.initial import Init, param
from spmd.models.layers.matmul import contract
from spmd.parallel import scope


class Embedding(nnx.Module):
    """A table [V, D] whose rows are gathered by index.

    Args:
        rngs: source of the initial values.
        shape: (V, D).
        dim: logical dim of the rows ("vocab", "position").
        init: draws the table.
    """

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, int], dim: str, init: Init):
        self.table = param(rngs, shape, (dim, "embed"), init)
        self.dim = dim

    def __call__(self, index_BT: jax.Array, dtype: Any) -> jax.Array:
        """Rows [B, T, D] as `dtype`; NaN for an index that the table does not have."""
        # The table is gathered over fsdp as any weight is before its use. The result is constrained to be
        # unsharded along time: each device takes the rows that it holds and a sum joins them. With residuals
        # sharded over the axis of the vocabulary, the table would be gathered instead.
        table_VD = scope.constrain(self.table[...], self.dim, "embed")
        time = "time" if index_BT.shape[1] > 1 else None
        return scope.constrain(lookup(dtype, table_VD, index_BT), "batch", time, "embed")


def lookup(dtype: Any, table_VD: jax.Array, index: jax.Array) -> jax.Array:
    """Rows [..., D] of a table as `dtype`, NaN for an index beyond it.

    The table's gradient is summed in the table's own type.

    Args:
        dtype: type of the result.
        table_VD: table.
        index: rows, of any shape.

    Returns:
        [..., D].
    """
    rows: Any = _lookup(dtype, table_VD, index)
    return rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(dtype: Any, table_VD: jax.Array, index: jax.Array) -> jax.Array:
    return table_VD.astype(dtype).at[index].get(mode="fill")


def _lookup_forward(dtype, table_VD, index):
    return table_VD.astype(dtype).at[index].get(mode="fill"), (table_VD, index)


def _lookup_backward(dtype, residuals, gradient):
    table_VD, index = residuals
    rows = gradient.astype(table_VD.dtype)
    zeros_VD = jnp.zeros_like(table_VD)
    if scope.current().partial:
        # In a partly manual shard_map XLA gathers all rows on each device in any case, but its TPU
        # partitioner aborts over a table sharded over two axes. So the rows are gathered first, and only the
        # vocabulary is sharded.
        index = scope.constrain(index, *(None,) * index.ndim)
        rows = scope.constrain(rows, *(None,) * rows.ndim)
        zeros_VD = scope.constrain(zeros_VD, "vocab", None)
        return scope.constrain(zeros_VD.at[index].add(rows, mode="drop"), "vocab", None), None
    return zeros_VD.at[index].add(rows, mode="drop"), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def vocab_logits(
    spec: str, x_BTD: jax.Array, kernel: jax.Array, *, vocab: int, cap: float = 0.0
) -> jax.Array:
    """Logits [B, T, V] over the rows of a head, at least float32.

    Args:
        spec: einsum of x and the kernel: "btd,dv->btv", or "btd,vd->btv" for an embedding's table.
        x_BTD: output of the last norm.
        kernel: [D, V] or [V, D].
        vocab: tokens; logits of rows beyond, which pad the kernel, are the least finite number.
        cap: logits become cap * tanh(logits / cap) (Gemma 2, arXiv 2408.00118, section 2); 0 is off.

    Returns:
        [B, T, V].
    """
    dtype = tree.at_least_float32(x_BTD.dtype)
    logits_BTV = contract(spec, dtype, x_BTD, kernel)
    time = "time" if x_BTD.shape[1] > 1 else None
    logits_BTV = scope.constrain(logits_BTV, "batch", time, "vocab")
    if cap:
        logits_BTV = cap * jnp.tanh(logits_BTV / cap)
    if logits_BTV.shape[2] > vocab:
        token = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
        logits_BTV = jnp.where(token < vocab, logits_BTV, jnp.finfo(dtype).min)
    return logits_BTV
