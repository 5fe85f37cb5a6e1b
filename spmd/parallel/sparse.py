"""Lookups in sharded tables, and updates of the rows that were looked up.

`pull` runs before the gradients, `push` after them; the tables stand outside of the backward pass, so that a
step costs as much as its lookups, whatever the number of rows.
"""

# B examples, L ids of all bags of an example, D width of a row, N devices, U = B L / N, K rows of a round

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import batches, narrow
from spmd.core.fields import check
from spmd.parallel import sharding, tables
from spmd.parallel.mesh import AXES, BATCH_AXES, batch_shards
from spmd.parallel.owners import ROWS, CopiedRows, Held, OwnedRows
from spmd.parallel.routing import NO_ROW
from spmd.parallel.tables import PREFIX, STRIPES, StackedTables, Tables

Arrays = dict[str, dict[str, jax.Array]]  # stack -> array -> [lines, width] or [V]
# (rows [K, D], state of the optimizer [K, D] or [K], gradients [K, D], learning rate, step) -> (rows, state)
UpdateRows = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Routed(NamedTuple):
    """The lookups of a batch in a stack.

    factor_BL: by which each row is multiplied. widths: ids of an example in each lookup, in sum L.
    """

    route: Any
    factor_BL: jax.Array
    widths: tuple[int, ...]


class Pulled(NamedTuple):
    """Rows of a batch, {"rows/FEATURE": [B, ...]}, and how they were found; rounds of the exchange, int32."""

    rows: dict[str, jax.Array]
    routed: dict[str, Routed]
    rounds: jax.Array


class RowRule(NamedTuple):
    """How rows are updated. update: as RowWise.update. factors: of the rate, by table; absent is 1."""

    update: UpdateRows
    factors: Mapping[str, float] = MappingProxyType({})


class StepOfRows(NamedTuple):
    """A step. rate: [] learning rate. step: int32 [] number of steps before. key: uint32 [2] of the random
    bits that narrow rows are rounded by. finite: bool [] whether to update; else the rows stay.
    """

    rate: jax.Array
    step: jax.Array
    key: jax.Array
    finite: jax.Array


def platform_of(mesh: Mesh) -> str:
    """The platform whose forms of gather, scatter and sum are used."""
    return mesh.devices.flat[0].platform


class ShardedTables:
    """The tables of a model on a mesh: all devices own rows, whatever else the mesh shards; small tables are
    replicated.

    Raises:
        ValueError: the number of devices does not divide the stripes of the arrays.
    """

    def __init__(self, declared: Tables, mesh: Mesh) -> None:
        self.stacks = tables.stack(declared)
        num = mesh.size
        check(
            STRIPES % num == 0 or all(stacked.replicated for stacked in self.stacks),
            f"tables are stored in {STRIPES} stripes, which {num} devices do not divide; use"
            f" 1, 2, 4, 8, 16 or another power of two up to {STRIPES}",
        )
        self.declared, self.mesh = dict(declared), mesh
        # The batch first, so that a device's rows of the batch are divided among those that share them.
        self.axes = (*BATCH_AXES, *(axis for axis in AXES if axis not in BATCH_AXES))
        self.copies = num // batch_shards(mesh)
        self.platform = platform_of(mesh)

    def shardings(self, arrays: Any) -> Any:
        """Shardings of the arrays (or of their shapes): rows over all devices, or replicated."""
        return {
            stacked.name: dict.fromkeys(
                arrays[stacked.name], NamedSharding(self.mesh, self._spec(stacked))
            )
            for stacked in self.stacks
        }

    def _spec(self, stacked: StackedTables) -> P:
        return P() if stacked.replicated else P(self.axes)

    def pull(
        self, arrays: Arrays, batch: Mapping[str, jax.Array], dtype: Any = jnp.float32
    ) -> Pulled:
        """The rows that a global batch looks up.

        Args:
            arrays: of the stacks.
            batch: the features, ids [B, ...] among them.
            dtype: of the rows, where the tables are narrow.

        Returns:
            The rows; NaN for an id that a table does not have.
        """
        rows, routed, rounds = dict[str, jax.Array](), dict[str, Routed](), jnp.int32(0)
        placed = NamedSharding(self.mesh, sharding.batch_spec())
        for stacked in self.stacks:
            table = arrays[stacked.name][ROWS]
            real = dtype if narrow.is_narrow(table.dtype) else table.dtype
            place_BL, factor_BL = self._places(stacked, batch, real)
            widths = tuple(batch[lookup.feature][:1].size for lookup, *_ in stacked.lookups)
            looked_up, route, count = self._mapped(
                functools.partial(self._pull, stacked, widths),
                (self._spec(stacked), P(self.axes), P(self.axes)),
                (P(self.axes), P(self.axes), P()),
            )(table, place_BL, factor_BL)
            num = batch["weight"].shape[0]
            for (lookup, *_), found in zip(stacked.lookups, looked_up, strict=True):
                found = self._drop_padding(found, num)
                if found.ndim == 3 and batch[lookup.feature].ndim == 1:
                    found = found[:, 0]
                rows[PREFIX + lookup.feature] = jax.lax.with_sharding_constraint(found, placed)
            routed[stacked.name] = Routed(route, factor_BL, widths)
            rounds += count
        return Pulled(rows, routed, rounds)

    def push(
        self,
        arrays: Arrays,
        pulled: Pulled,
        grads: Mapping[str, jax.Array],
        rule: RowRule,
        now: StepOfRows,
    ) -> Arrays:
        """Update the rows that were pulled.

        Args:
            arrays: of the stacks.
            pulled: the lookups of the batch.
            grads: of pulled.rows [B, ...]; a row that several examples name gets the sum of theirs.
            rule: of the update.
            now: the step.

        Returns:
            The arrays after the update.
        """
        new: Arrays = {}
        for stacked in self.stacks:
            route, factor_BL, widths = pulled.routed[stacked.name]
            by_lookup = [
                self._pad(grads[PREFIX + lookup.feature]) for lookup, *_ in stacked.lookups
            ]
            along, placed = P(self.axes), self._spec(stacked)
            new[stacked.name] = self._mapped(
                functools.partial(self._push, stacked, rule, widths),
                (placed, along, along, along, P()),
                placed,
            )(arrays[stacked.name], route, factor_BL, by_lookup, now)
        return new

    def _mapped(self, fn: Any, in_specs: Any, out_specs: Any) -> Any:
        return jax.shard_map(fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    # ---- the batch

    def _places(
        self, stacked: StackedTables, batch: Mapping[str, jax.Array], dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        """(place of each lookup, NO_ROW for none; its factor), [B, L] padded."""
        places, factors = [], []
        for lookup, table, offset in stacked.lookups:
            ids_BL = batches.wide_indices(batch[lookup.feature])
            ids_BL = ids_BL.reshape(ids_BL.shape[0], -1)
            signed = jnp.issubdtype(ids_BL.dtype, jnp.signedinteger)
            absent_BL = ids_BL == -1 if signed else jnp.zeros(ids_BL.shape, bool)
            if table.hashed:
                ids_BL = tables.hash_ids(ids_BL, table.ids)
            known_BL = (ids_BL >= 0) & (ids_BL < table.ids) & ~absent_BL
            place_BL = stacked.placement.place(ids_BL.astype(jnp.int32) + offset)
            places.append(jnp.where(known_BL, place_BL, NO_ROW))
            weight_BL = jnp.ones(ids_BL.shape, dtype)
            if lookup.weights:
                weight_BL = batch[lookup.weights].reshape(ids_BL.shape).astype(dtype)
            factor_BL = jnp.where(known_BL, weight_BL, jnp.where(absent_BL, 0, jnp.nan))
            if lookup.pool == "mean":
                total_B = factor_BL.sum(1, keepdims=True)
                factor_BL = factor_BL / jnp.where(total_B != 0, total_B, 1)
            factors.append(factor_BL.astype(dtype))
        pad = lambda parts, value: self._pad(jnp.concatenate(parts, axis=1), value)
        return pad(places, NO_ROW), pad(factors, 0)

    def _pad(self, x: jax.Array, value: Any = 0) -> jax.Array:
        """[B, ...] with rows added to each batch shard, so that the devices that share it divide it."""
        shards = batch_shards(self.mesh)
        rows = x.shape[0] // shards
        missing = -rows % self.copies
        if not missing:
            return x
        x = x.reshape(shards, rows, *x.shape[1:])
        widths = [(0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)]
        return jnp.pad(x, widths, constant_values=value).reshape(-1, *x.shape[2:])

    def _drop_padding(self, x: jax.Array, num: int) -> jax.Array:
        """The inverse of `_pad`. num: rows without padding."""
        shards = batch_shards(self.mesh)
        if x.shape[0] == num:
            return x
        return x.reshape(shards, -1, *x.shape[1:])[:, : num // shards].reshape(num, *x.shape[1:])

    # ---- on each device

    def _rows_of(self, stacked: StackedTables, widths: tuple[int, ...]) -> OwnedRows | CopiedRows:
        if stacked.replicated:
            return CopiedRows(stacked.placement, self.axes, self.platform)
        loads = stacked.loads(widths)
        return OwnedRows(stacked.placement, self.axes, self.mesh.size, self.platform, loads)

    def _pull(
        self,
        stacked: StackedTables,
        widths: tuple[int, ...],
        table: jax.Array,
        place_BL: jax.Array,
        factor_BL: jax.Array,
    ) -> tuple[list[jax.Array], Any, jax.Array]:
        rows_UD, route, rounds = self._rows_of(stacked, widths).pull(table, place_BL.ravel())
        rows_BLD = rows_UD.astype(factor_BL.dtype).reshape(*place_BL.shape, -1)
        rows_BLD = rows_BLD * factor_BL[..., None]
        found, first = [], 0
        for (lookup, *_), num in zip(stacked.lookups, widths, strict=True):
            part = rows_BLD[:, first : first + num]
            found.append(part if lookup.pool == "none" else part.sum(1))
            first += num
        return found, route, rounds

    def _push(
        self,
        stacked: StackedTables,
        rule: RowRule,
        widths: tuple[int, ...],
        held: dict[str, jax.Array],
        route: Any,
        factor_BL: jax.Array,
        grads: list[jax.Array],
        now: StepOfRows,
    ) -> dict[str, jax.Array]:
        dim, dtype = stacked.placement.dim, factor_BL.dtype
        bags = [
            jnp.broadcast_to(g if g.ndim == 3 else g[:, None], (g.shape[0], num, dim))
            for g, num in zip(grads, widths, strict=True)
        ]
        each_BLD = jnp.concatenate(bags, axis=1).astype(dtype) * factor_BL[..., None]
        rates = [rule.factors.get(name, 1.0) for name in stacked.offsets]
        name_key = jnp.uint32(zlib.crc32(stacked.name.encode()))

        def update(old: Held, grads_KD: jax.Array, row_K: jax.Array) -> Held:
            state = {name: x for name, x in old.items() if name != ROWS}
            rate = now.rate
            if {*rates} != {1.0}:
                rate = rate * tables.by_table(stacked, rates, row_K)[:, None]
            rows, state = rule.update(old[ROWS].astype(dtype), state, grads_KD, rate, now.step)
            if narrow.is_narrow(old[ROWS].dtype):
                rows = narrow.round_rows(rows, row_K, now.key ^ name_key)
            new = {ROWS: rows, **state}
            # A selection of complete tables would cost a pass over them.
            return {
                n: jnp.where(now.finite, x, old[n]).astype(old[n].dtype) for n, x in new.items()
            }

        return self._rows_of(stacked, widths).push(held, route, each_BLD.reshape(-1, dim), update)
