"""Recommenders over sparse tables: matrix factorisation, and two towers."""

# B batch, D width of a row, L items of a history, K negatives

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.core import tree
from spmd.core.batches import feature
from spmd.core.fields import check
from spmd.models.layers import Dense, param
from spmd.parallel.tables import PREFIX, Lookup, SparseTable

Batch = Mapping[str, jax.Array]
Rows = Mapping[str, jax.Array]  # feature -> its rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixFactorization:
    """A rating as mean + bias of the user + bias of the item + their inner product (Koren et al. 2009,
    "Matrix factorization techniques for recommender systems").
    """

    users: int = 0
    """Rows of users; 0 is that of the data."""
    items: int = 0
    """Rows of items; 0 is that of the data."""
    dim: int = 32
    """Width of a row: a bias and dim - 1 factors; use a power of two."""
    mean: float = 3.5
    """Initial value of the mean, which is learned."""
    scale: float = 0.05
    """Standard deviation of the initial rows."""
    decay: float = 0.1
    """Factor of the squared factors of user and item in the loss of each rating."""
    bias_decay: float = 0.01
    """Factor of the squared biases in the loss of each rating."""

    def __post_init__(self) -> None:
        check(self.dim >= 2, f"model.dim={self.dim} must be at least 2: a bias and a factor")
        for name in ("users", "items", "scale", "decay", "bias_decay"):
            value = getattr(self, name)
            check(value >= 0, f"model.{name}={value} must not be negative")

    @property
    def tables(self) -> dict[str, SparseTable]:
        """Users and items."""
        about = {"user": self.users, "item": self.items}
        options = {"dim": self.dim, "scale": self.scale or 1e-30}
        return {
            f"{name}s": SparseTable(ids=num, lookups=(Lookup(feature=name),), **options)
            for name, num in about.items()
        }

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with initial weights."""
        return _Factors(self, rngs)


class _Factors(nnx.Module):
    def __init__(self, config: MatrixFactorization, rngs: nnx.Rngs):
        self.config = config
        self.mean = param(rngs, (1,), ("classes",), nnx.initializers.constant(config.mean))

    def __call__(self, user_BD: jax.Array, item_BD: jax.Array) -> dict[str, jax.Array]:
        """Rows [B, D] of users and items -> {rating [B], penalty [B]}."""
        config = self.config
        product_B = (user_BD[:, 1:] * item_BD[:, 1:]).sum(1)
        bias_B = user_BD[:, 0] + item_BD[:, 0]
        rating_B = self.mean[...].astype(product_B.dtype) + bias_B + product_B
        squares = [jnp.square(x) for x in (user_BD, item_BD)]
        penalty = [config.decay * x[:, 1:].sum(1) + config.bias_decay * x[:, 0] for x in squares]
        return {"rating": rating_B, "penalty": penalty[0] + penalty[1]}

    def queries(self, batch: Batch) -> jax.Array:
        """Vectors [B, D] of users, whose products with those of items rank as ratings do."""
        user_BD = feature(batch, f"{PREFIX}user")
        return user_BD.at[:, 0].set(1)

    def candidates(self, batch: Batch) -> jax.Array:
        """Vectors [B, D] of items."""
        return feature(batch, f"{PREFIX}item")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTower:
    """Vectors of users and of items from a tower each, compared by their inner product (Yi et al. 2019,
    "Sampling-bias-corrected neural modeling for large corpus item recommendations").

    A user is a row of its own and the mean of the rows of its history; an item is its row.
    """

    users: int = 0
    """Rows of users; 0 is that of the data."""
    items: int = 0
    """Rows of items; 0 is that of the data."""
    dim: int = 64
    """Width of the rows and of the vectors; use a power of two."""
    hidden: tuple[int, ...] = ()
    """Widths of the hidden layers of both towers; empty is none, and vectors are sums of rows."""
    normalize: bool = True
    """Compare by the cosine."""
    history: bool = True
    """Whether the history is part of a user; without, a user who was not trained on has no vector."""
    scale: float = 0.05
    """Standard deviation of the initial rows."""

    def __post_init__(self) -> None:
        for name in ("users", "items"):
            value = getattr(self, name)
            check(value >= 0, f"model.{name}={value} must not be negative")
        for width in (self.dim, *self.hidden):
            check(width >= 1, f"model.dim and model.hidden must be at least 1, given {width}")
        check(self.scale > 0, f"model.scale={self.scale} must be more than 0")

    @property
    def tables(self) -> dict[str, SparseTable]:
        """Users; items as candidates; and items as parts of a history."""
        table = lambda num, *lookups: SparseTable(
            ids=num, dim=self.dim, lookups=lookups, scale=self.scale
        )
        items = (Lookup(feature="item"), Lookup(feature="negatives", pool="none"))
        tables = {
            "users": table(self.users, Lookup(feature="user")),
            "items": table(self.items, *items),
        }
        if self.history:
            tables["seen"] = table(self.items, Lookup(feature="history", pool="mean"))
        return tables

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with initial weights."""
        return _Towers(self, rngs)


class _Towers(nnx.Module):
    def __init__(self, config: TwoTower, rngs: nnx.Rngs):
        self.config = config
        widths = (config.dim, *config.hidden, config.dim)
        pairs = list(itertools.pairwise(widths)) if config.hidden else []
        layers = lambda: nnx.List([Dense(rngs, pair, ("input", "mlp")) for pair in pairs])
        self.user_layers, self.item_layers = layers(), layers()

    def __call__(self, rows: Rows) -> dict[str, jax.Array]:
        """The rows of each feature -> {user [B, D], item [B, D], negatives [B, K, D], catalogue []}."""
        items = {
            name: self._through(self.item_layers, rows[name]) for name in ("item", "negatives")
        }
        return {"user": self._user(rows), **items, "catalogue": jnp.asarray(self.config.items)}

    def queries(self, batch: Batch) -> jax.Array:
        """Vectors [B, D] of users."""
        return self._user(
            {k.removeprefix(PREFIX): x for k, x in batch.items() if k.startswith(PREFIX)}
        )

    def candidates(self, batch: Batch) -> jax.Array:
        """Vectors [B, D] of items."""
        return self._through(self.item_layers, feature(batch, f"{PREFIX}item"))

    def _user(self, rows: Rows) -> jax.Array:
        user_BD = rows["user"] + rows["history"] if self.config.history else rows["user"]
        return self._through(self.user_layers, user_BD)

    def _through(self, layers: nnx.List, x: jax.Array) -> jax.Array:
        for i, layer in enumerate(layers):
            x = layer(x if i == 0 else jax.nn.relu(x))
        if not self.config.normalize:
            return x
        x = x.astype(tree.at_least_float32(x.dtype))
        return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
