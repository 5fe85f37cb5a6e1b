"""Routing of ids to the devices that own their rows, and of gradients after them.

An id travels to its owner by an all-to-all with buckets of a fixed size. Ids that do not fit wait for the
next round, so that none is dropped; the number of rounds is that of the fullest bucket.
"""

# B rows of a batch, L ids of each, D width of a row, N devices, U = B L / N lookups of a device, C slots of a
# bucket, K rows that an owner is asked for in a round

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any
NO_ROW = 2**31 - 1  # the place of no row: sorts behind all others
MARGIN = 4  # standard deviations of a bucket's number of ids, if their owners are drawn at random
ALIGN = 8  # slots of a bucket are a multiple


class Route(NamedTuple):
    """The lookups of a device, each [U], as `dedupe` sorted them.

    order: positions of the lookups, sorted by place; None on CPUs. rank: number of the distinct row of each,
    in that order. inverse: the same in the order of the batch. rows: places of the distinct rows, ascending,
    then NO_ROW.
    """

    order: jax.Array | None
    rank: jax.Array
    inverse: jax.Array
    rows: jax.Array


def bucket_slots(lookups: int, num_devices: int) -> int:
    """Slots of each bucket, C: nearly always enough for one round if ids are spread evenly."""
    mean = lookups / num_devices
    wanted = math.ceil((mean + MARGIN * math.sqrt(mean)) / ALIGN) * ALIGN
    return max(1, min(lookups, wanted))


def slots_of_bins(loads: Sequence[int], lookups: int, num_devices: int) -> int:
    """Slots of each bucket where bins of tables are owned by different devices.

    A device that owns complete bins is asked for the lookups in these at most: one round is always enough.

    Args:
        loads: lookups of an example in each of the bins, whose number is a power of two.
        lookups: of a device, U.
        num_devices: N.
    """
    examples, shared = lookups // sum(loads), num_devices // len(loads)
    if len(loads) == 1 or shared > 1:  # several devices own a bin
        return max(bucket_slots(examples * load, max(shared, 1)) for load in loads)
    together = len(loads) // num_devices
    owners = [sum(loads[i : i + together]) for i in range(0, len(loads), together)]
    return max(1, examples * max(owners))


def starts_of_runs(key_K: jax.Array) -> jax.Array:
    """Where runs of equal elements begin.

    Args:
        key_K: [K].

    Returns:
        bool [K], whether an element differs from the one before.
    """
    return jnp.append(True, key_K[1:] != key_K[:-1])


def dedupe(place_U: jax.Array, platform: str) -> Route:
    """The distinct rows of a device's lookups.

    Args:
        place_U: int32 [U].
        platform: of the devices. A CPU sorts one array five times as fast as two together.

    Returns:
        Rows and lookups of each.
    """
    if platform == "cpu":
        ordered = jax.lax.sort(place_U, is_stable=False)
        rank = jnp.cumsum(starts_of_runs(ordered), dtype=jnp.int32) - 1
        rows = jnp.full_like(place_U, NO_ROW).at[rank].set(ordered)
        return Route(None, rank, jnp.searchsorted(rows, place_U).astype(jnp.int32), rows)
    number = jnp.arange(place_U.size, dtype=jnp.int32)  # argsort would count in int64 under x64
    ordered, order = jax.lax.sort((place_U, number), num_keys=1, is_stable=True)
    rank = jnp.cumsum(starts_of_runs(ordered), dtype=jnp.int32) - 1
    rows = jnp.full_like(place_U, NO_ROW).at[rank].set(ordered)
    inverse = jnp.zeros_like(order).at[order].set(rank, unique_indices=True)
    return Route(order, rank, inverse, rows)


def totals(route: Route, x_KD: jax.Array, longest: int, platform: str) -> jax.Array:
    """Sums over the lookups of each distinct row; always in the same order.

    GPUs scatter-add by atomics, in no fixed order: there sorted neighbours are added in log2(longest) passes,
    which take 40 times as long on a CPU.

    Args:
        route: of the lookups.
        x_KD: [K, D] of each lookup.
        longest: lookups of a row, at most.
        platform: of the devices.

    Returns:
        Sums [K, D], as route.rows lists them.
    """
    none = jnp.zeros_like(x_KD)
    if route.order is None:
        return none.at[route.inverse].add(x_KD)
    key_K, x_KD, step = route.rank, x_KD[route.order], 1
    if platform != "gpu":
        return none.at[key_K].add(x_KD, indices_are_sorted=True)
    while step < longest:
        same = (key_K[:-step] == key_K[step:])[:, None]
        x_KD = x_KD.at[:-step].add(jnp.where(same, x_KD[step:], 0))
        step *= 2
    outside = key_K.size + jnp.arange(key_K.size, dtype=jnp.int32)
    to = jnp.where(starts_of_runs(key_K), key_K, outside)
    return none.at[to].set(x_KD, mode="drop", unique_indices=True)


def put_lines(table: jax.Array, dim: int, local_K: jax.Array, new_KD: jax.Array) -> jax.Array:
    """Set rows by complete lines, without the rounding of a difference: for narrow rows.

    Args:
        table: [lines, width].
        dim: D, numbers of a row.
        local_K: int32 [K] numbers of the rows, ascending, no number twice.
        new_KD: [K, D].

    Returns:
        The array with the new rows.
    """
    width = table.shape[1]
    pack, line_K = width // dim, local_K // (width // dim)
    column = jnp.arange(width, dtype=jnp.int32) // dim
    within = column[None] == (local_K % pack)[:, None]
    values, step = jnp.where(within, jnp.tile(new_KD, (1, pack)), 0), 1
    while step < pack:  # rows of a line are neighbours: gather them in the first one
        same = (line_K[:-step] == line_K[step:])[:, None]
        values = values.at[:-step].set(
            jnp.where(same & ~within[:-step], values[step:], values[:-step])
        )
        within = within.at[:-step].set(within[:-step] | (same & within[step:]))
        step *= 2
    old = table.at[line_K].get(mode="fill", fill_value=0)
    outside = table.shape[0] + line_K.size + jnp.arange(line_K.size, dtype=jnp.int32)
    to = jnp.where(starts_of_runs(line_K), line_K, outside)
    lines = jnp.where(within, values, old)
    return table.at[to].set(lines, mode="drop", unique_indices=True)


def take(table: jax.Array, dim: int, local_K: jax.Array, by_line: bool) -> jax.Array:
    """Rows of an array of lines, or elements of one of numbers.

    Args:
        table: [lines, width], or [rows] numbers.
        dim: D, numbers of a row.
        local_K: int32 [K] numbers of the rows.
        by_line: fetch complete lines, as on TPUs, where a reshape to rows would copy the table.

    Returns:
        [K, D] or [K]; 0 for a row that is outside.
    """
    if table.ndim == 1 or not by_line:
        rows = table if table.ndim == 1 else table.reshape(-1, dim)
        return rows.at[local_K].get(mode="fill", fill_value=0)
    pack = table.shape[1] // dim
    line = table.at[local_K // pack].get(mode="fill", fill_value=0).reshape(-1, pack, dim)
    within = (jnp.arange(pack, dtype=jnp.int32)[None] == (local_K % pack)[:, None])[..., None]
    return jnp.where(within, line, 0).sum(1)


def put(
    table: jax.Array, dim: int, local_K: jax.Array, old: jax.Array, new: jax.Array, by_line: bool
) -> jax.Array:
    """Set rows, in place; no number twice.

    Args:
        table, dim, local_K: as `take` takes them.
        old: [K, D] or [K], the rows as they are.
        new: [K, D] or [K].
        by_line: adds differences to complete lines.

    Returns:
        The array with the new rows.
    """
    if table.ndim == 1 or not by_line:
        rows = table.reshape(-1, *new.shape[1:])
        rows = rows.at[local_K].set(new, mode="drop", unique_indices=True)
        return rows.reshape(table.shape)
    pack = table.shape[1] // dim
    column = jnp.arange(table.shape[1], dtype=jnp.int32) // dim
    within = column[None] == (local_K % pack)[:, None]
    change = jnp.where(within, jnp.tile(new - old, (1, pack)), 0)
    return table.at[local_K // pack].add(change, mode="drop")


def exchange_rounds(
    rows_U: jax.Array,
    block: int,
    slots: int,
    axes: tuple[str, ...],
    exchange: Callable[[PyTree, jax.Array], PyTree],
    carry: PyTree,
) -> tuple[PyTree, jax.Array]:
    """Call exchange(carry, index [N, C] into rows_U) until every row has been in a bucket.

    A round takes, of each owner, the rows below a bound common to all devices: the least place at which a
    device's bucket is full. So all gradients of a row meet in one round, and the owner may square their sum.

    Args:
        rows_U: [U] distinct places, ascending, then NO_ROW.
        block: rows of an owner.
        slots: of a bucket.
        axes: of the exchange.
        exchange: a round.
        carry: its first argument in the first round.

    Returns:
        (the last carry, int32 [] number of rounds).
    """
    num = rows_U.shape[0]
    owners = jnp.arange(jax.lax.axis_size(axes) + 1, dtype=jnp.int32)
    edges = jnp.searchsorted(rows_U, owners * block).astype(jnp.int32)
    first, end = edges[:-1], edges[1:]

    def bound(first: jax.Array) -> jax.Array:
        """[N] of each owner: NO_ROW where no device wants a row of it any more."""
        full = rows_U[jnp.minimum(first + slots, num - 1)]
        own = jnp.where(first < end, jnp.where(first + slots < end, full, NO_ROW - 1), NO_ROW)
        return jax.lax.pmin(own, axes)

    def run_round(state: PyTree) -> PyTree:
        first, below, count, carry = state
        stop = jnp.clip(jnp.searchsorted(rows_U, below).astype(jnp.int32), first, end)
        index = first[:, None] + jnp.arange(slots, dtype=jnp.int32)[None]
        # Numbers out of range, each another one: negative ones would count from the end.
        none = num + jnp.arange(index.size, dtype=jnp.int32).reshape(index.shape)
        carry = exchange(carry, jnp.where(index < stop[:, None], index, none))
        return stop, bound(stop), count + 1, carry

    begin = (first, bound(first), jnp.int32(0), carry)
    state = jax.lax.while_loop(lambda state: (state[1] < NO_ROW).any(), run_round, begin)
    return state[3], state[2]
