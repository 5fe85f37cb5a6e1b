"""DLRM: numbers through an MLP, categories through embedding tables, their pairs through another MLP."""

# B batch, F vectors of an example, D width of a vector

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spmd.core.fields import check
from spmd.models.layers import Dense
from spmd.parallel.tables import Lookup, SparseTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class DLRM:
    """Deep learning recommendation model (Naumov et al. 2019, arXiv 1906.00091): a logit from numbers, and
    from the pairwise inner products of embedded categories.
    """

    ids: tuple[int, ...]
    """Number of ids of each category, in the order of `features`."""
    features: tuple[str, ...] = ()
    """Features of the categories; empty is category_00, category_01, ..."""
    numbers: int = 13
    """Real values of an example."""
    dim: int = 16
    """Width of the embeddings, and of what the numbers become."""
    bottom: tuple[int, ...] = (64,)
    """Widths of the hidden layers that read the numbers."""
    top: tuple[int, ...] = (64, 32)
    """Widths of the hidden layers that read the pairs."""
    hashed: bool = False
    """Take any id, hashed to a row; else an id out of range is refused."""
    limit: int = 0
    """Rows of a table, at most, whatever its ids say; 0 is no limit. The data must have no more ids."""
    placement: Literal["auto", "rows", "tables", "replicated"] = "auto"
    """Placement of the tables: each device owns a part of the rows, or complete tables, or has all; auto goes
    by size."""

    def __post_init__(self) -> None:
        for width in (self.numbers, self.dim, *self.ids, *self.bottom, *self.top):
            check(width >= 1, f"model widths and numbers of ids must be at least 1, given {width}")
        check(self.limit >= 0, f"model.limit={self.limit} must not be negative")
        check(
            len(self.names) == len(self.ids) > 0,
            f"model.features names {len(self.names)} categories, and model.ids {len(self.ids)}; give as many",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Features of the categories."""
        return self.features or tuple(f"category_{i:02}" for i in range(len(self.ids)))

    @property
    def tables(self) -> dict[str, SparseTable]:
        """A sparse table for each category."""
        return {
            name: SparseTable(
                ids=min(num, self.limit or num),
                dim=self.dim,
                lookups=(Lookup(feature=name),),
                hashed=self.hashed,
                placement=self.placement,
            )
            for name, num in zip(self.names, self.ids, strict=True)
        }

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Net(self, rngs)


class _Net(nnx.Module):
    def __init__(self, config: DLRM, rngs: nnx.Rngs):
        self.config = config
        vectors = len(config.ids) + 1
        pairs = vectors * (vectors - 1) // 2
        self.bottom = _layers(rngs, (config.numbers, *config.bottom, config.dim))
        self.top = _layers(rngs, (config.dim + pairs, *config.top))
        self.head = Dense(rngs, ((config.top or (config.dim + pairs,))[-1], 1), ("mlp", "classes"))

    def __call__(self, numbers: jax.Array, rows: Mapping[str, jax.Array]) -> jax.Array:
        """Numbers [B, ...] and the rows [B, D] of each category -> logits [B]."""
        dense_BD = numbers
        for layer in self.bottom:
            dense_BD = jax.nn.relu(layer(dense_BD))
        embedded = [rows[name].astype(dense_BD.dtype) for name in self.config.names]
        x_BFD = jnp.stack([dense_BD, *embedded], axis=1)
        x = jnp.concatenate([dense_BD, pair_products(x_BFD)], axis=1)
        for layer in self.top:
            x = jax.nn.relu(layer(x))
        return self.head(x)[:, 0]


@jax.custom_vjp
def pair_products(x_BFD: jax.Array) -> jax.Array:
    """Inner products of all pairs of an example's vectors.

    The gradient is one matmul with the gradients of the pairs in a symmetric matrix; XLA's would scatter them
    into one half and take two.

    Args:
        x_BFD: [B, F, D].

    Returns:
        [B, F (F - 1) / 2], those of the second vector with the first, of the third with the first, ...
    """
    first, second = np.tril_indices(x_BFD.shape[1], -1)
    return jnp.einsum("bfd,bgd->bfg", x_BFD, x_BFD)[:, first, second]


def _forward(x_BFD: jax.Array) -> tuple[jax.Array, jax.Array]:
    return pair_products(x_BFD), x_BFD


def _backward(x_BFD: jax.Array, grads_BP: jax.Array) -> tuple[jax.Array]:
    num = x_BFD.shape[1]
    first, second = np.tril_indices(num, -1)
    place_FF = np.full((num, num), len(first), np.int32)  # the diagonal: a column of zeros
    place_FF[first, second] = place_FF[second, first] = np.arange(len(first))
    grads_BFF = jnp.pad(grads_BP, ((0, 0), (0, 1)))[:, place_FF]
    return (jnp.einsum("bfg,bgd->bfd", grads_BFF, x_BFD),)


pair_products.defvjp(_forward, _backward)


def _layers(rngs: nnx.Rngs, widths: tuple[int, ...]) -> nnx.List:
    pairs = itertools.pairwise(widths)
    return nnx.List([Dense(rngs, (i, o), ("input", "mlp")) for i, o in pairs])
