"""Rows of a stack of tables within a shard_map: owned by one device each, or copied to all.

Both forms pull the rows of a device's lookups, and push their gradients: all gradients of a row are summed
over all devices before it is updated, once.
"""

# U lookups of a device, D width of a row, K rows of a round, V rows of the array

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd.core.narrow import is_narrow
from spmd.parallel.routing import (
    NO_ROW,
    Route,
    dedupe,
    exchange_rounds,
    put,
    put_lines,
    slots_of_bins,
    take,
    totals,
)
from spmd.parallel.tables import Placement

ROWS = "rows"  # of a stack's arrays: the table itself; the others are state of its optimizer
Held = dict[str, jax.Array]  # arrays of a stack on a device: [lines, width] or [V]
# (old rows and state of each [K, ...], gradients [K, D], places [K]) -> the new ones
UpdateOwned = Callable[[Held, jax.Array, jax.Array], Held]


class OwnedRows(NamedTuple):
    """Rows of which each device owns a run of stripes. loads: lookups of an example in each bin."""

    placement: Placement
    axes: tuple[str, ...]
    num_devices: int
    platform: str
    loads: tuple[int, ...]

    @property
    def block(self) -> int:
        """Rows of an owner."""
        return self.placement.rows // self.num_devices

    def pull(self, table: jax.Array, place_U: jax.Array) -> tuple[jax.Array, Route, jax.Array]:
        """The rows of a device's lookups.

        Args:
            table: [lines, width] that the device owns.
            place_U: int32 [U], NO_ROW for none.

        Returns:
            (rows [U, D] in the table's type, 0 for none; how they were found; int32 [] number of rounds).
        """
        dim, route = self.placement.dim, dedupe(place_U, self.platform)
        by_line = self.platform == "tpu"
        if self.num_devices == 1:
            found = take(table, dim, self._local(route.rows), by_line)
            rounds = jax.lax.pmax((route.rows[0] < NO_ROW).astype(jnp.int32), self.axes)
            return found[route.inverse], route, rounds

        def exchange(rows_UD: jax.Array, index: jax.Array) -> jax.Array:
            local_K = self._local(self._ask(route, index))
            rows = self._swap(take(table, dim, local_K, by_line).reshape(*index.shape, dim))
            return rows_UD.at[index].set(rows, mode="drop", unique_indices=True)

        zeros = jax.lax.pcast(jnp.zeros((place_U.size, dim), table.dtype), self.axes, to="varying")
        found, rounds = self._rounds(route, exchange, zeros)
        return found[route.inverse], route, rounds

    def push(self, held: Held, route: Route, grads_UD: jax.Array, update: UpdateOwned) -> Held:
        """The arrays after the update of the rows that were pulled.

        Args:
            held: arrays that the device owns.
            route: of `pull`.
            grads_UD: [U, D] of each lookup.
            update: of rows.

        Returns:
            The arrays, updated in place.
        """
        dim = self.placement.dim
        sums_UD = totals(route, grads_UD, len(grads_UD), self.platform)
        if self.num_devices == 1:
            return self._set(held, route.rows, sums_UD, update)

        def exchange(held: Held, index: jax.Array) -> Held:
            asked = dedupe(self._ask(route, index), self.platform)
            grads_KD = self._swap(sums_UD.at[index].get(mode="fill", fill_value=0))
            # A device sends a row once at most.
            grads_KD = totals(asked, grads_KD.reshape(-1, dim), self.num_devices, self.platform)
            return self._set(held, asked.rows, grads_KD, update)

        return self._rounds(route, exchange, held)[0]

    def _set(self, held: Held, row_K: jax.Array, grads_KD: jax.Array, update: UpdateOwned) -> Held:
        """The arrays with new rows. row_K: places, ascending and distinct, then NO_ROW."""
        dim, by_line = self.placement.dim, self.platform == "tpu"
        outside = self.block + self.placement.pack * jnp.arange(len(row_K), dtype=jnp.int32)
        local_K = self._local(row_K, outside)
        old = {name: take(x, dim, local_K, by_line) for name, x in held.items()}
        new = update(old, grads_KD, row_K)

        def set_rows(name: str, x: jax.Array) -> jax.Array:
            if by_line and x.ndim == 2 and is_narrow(x.dtype):
                return put_lines(x, dim, local_K, new[name])
            return put(x, dim, local_K, old[name], new[name], by_line)

        return {name: set_rows(name, x) for name, x in held.items()}

    def _local(self, place_K: jax.Array, outside: jax.Array | int | None = None) -> jax.Array:
        """Numbers of this owner's rows; `outside` for NO_ROW."""
        start = jax.lax.axis_index(self.axes).astype(jnp.int32) * self.block
        none = self.block if outside is None else outside
        return jnp.where(place_K == NO_ROW, none, place_K - start)

    def _swap(self, x: jax.Array) -> jax.Array:
        """Bucket i of each device goes to device i."""
        return jax.lax.all_to_all(x, self.axes, 0, 0, tiled=True)

    def _ask(self, route: Route, index: jax.Array) -> jax.Array:
        """[K] the places that the other devices ask this one for."""
        return self._swap(route.rows.at[index].get(mode="fill", fill_value=NO_ROW)).ravel()

    def _rounds(self, route: Route, exchange: Any, carry: Any) -> tuple[Any, jax.Array]:
        slots = slots_of_bins(self.loads, len(route.rows), self.num_devices)
        return exchange_rounds(route.rows, self.block, slots, self.axes, exchange, carry)


class CopiedRows(NamedTuple):
    """Rows that every device has, of tables so small that a dense gradient costs less than an exchange."""

    placement: Placement
    axes: tuple[str, ...]
    platform: str

    def pull(self, table: jax.Array, place_U: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As OwnedRows.pull, without an exchange; what was found is the place of each lookup.

        Args:
            table: [lines, width].
            place_U: int32 [U], NO_ROW for none.

        Returns:
            (rows [U, D], place_U, 0).
        """
        rows = take(table, self.placement.dim, place_U, self.platform == "tpu")
        return rows, place_U, jnp.int32(0)

    def push(
        self, held: Held, place_U: jax.Array, grads_UD: jax.Array, update: UpdateOwned
    ) -> Held:
        """As OwnedRows.push: sums over the devices of the gradients of all rows, and of how often each is
        named, since rows that no example names stay.

        Args:
            held: all rows.
            place_U: int32 [U] of `pull`.
            grads_UD: [U, D] of each lookup.
            update: of rows.

        Returns:
            The arrays after the update.
        """
        num, dim = self.placement.rows, self.placement.dim
        values_UE = jnp.concatenate([grads_UD, jnp.ones_like(grads_UD[:, :1])], axis=1)
        zeros = jnp.zeros((num, dim + 1), values_UE.dtype)
        if self.platform == "gpu":  # whose scatter-add has no fixed order
            route = dedupe(place_U, self.platform)
            sums = totals(route, values_UE, len(values_UE), self.platform)
            dense_VE = zeros.at[route.rows].set(sums, mode="drop")
        else:
            dense_VE = zeros.at[place_U].add(values_UE, mode="drop")
        dense_VE = jax.lax.psum(dense_VE, self.axes)
        named_V = dense_VE[:, dim] > 0
        old = {name: self._by_row(name, x) for name, x in held.items()}
        new = update(old, dense_VE[:, :dim], jnp.arange(num, dtype=jnp.int32))
        keep = {n: named_V if x.ndim == 1 else named_V[:, None] for n, x in old.items()}
        return {n: jnp.where(keep[n], new[n], old[n]).reshape(x.shape) for n, x in held.items()}

    def _by_row(self, name: str, x: jax.Array) -> jax.Array:
        """[V] or [V, D] of an array of lines."""
        return x if x.ndim == 1 else x.reshape(self.placement.rows, self.placement.dim)
