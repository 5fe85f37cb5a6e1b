"""Sparse tables: embedding tables whose rows all devices share, and how ids find their rows.

Tables of one width and placement are stacked into one array: a step exchanges their ids and rows together
(TorchRec, Ivchenko et al. 2022). The place of a row does not depend on the mesh.
"""

# B examples, L ids of a bag, D width of a row, V rows, N devices

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from spmd.core import batches
from spmd.core.bits import mix
from spmd.core.fields import check
from spmd.parallel.packing import TableBins, pack_tables

PREFIX = "rows/"  # of the looked-up rows among the features of a batch
STRIPES = 1024  # parts of each array, which the number of devices must divide
LANES = 128  # of a TPU's registers: shorter rows share a line
# Coprime to STRIPES: consecutive ids, the frequent ones in sorted tables, go to distant stripes.
_SPREAD = 633
REPLICATED_BYTES = 2**16  # float32 bytes of a table, up to which `auto` replicates it
_REPLICATED = "_replicated"  # ends the names of stacks that are
_BINS = "_bins"  # before the number of bins, in the names of stacks of complete tables
Kind = Literal["rows", "tables", "replicated"]
KINDS: tuple[Kind, ...] = ("rows", "tables", "replicated")
MAX_ROWS = 2**31 - 2  # places are int32, and the largest is that of no row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup:
    """A feature whose ids are looked up in a table.

    Attributes:
        feature: integers [B] or [B, L]; -1 is no id.
        pool: sum or mean of the rows of an example, [B, D], or none: each row by itself, [B, L, D].
        weights: a feature of floats, shaped as the ids: the factor of each row, also in the mean.
    """

    feature: str
    pool: Literal["sum", "mean", "none"] = "sum"
    weights: str = ""

    def __post_init__(self) -> None:
        kinds = ("sum", "mean", "none")
        check(self.pool in kinds, f"Lookup: pool={self.pool!r} must be one of {', '.join(kinds)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseTable:
    """An embedding table, which a model config (or an NNX module class) declares by name in `tables`.

    Attributes:
        ids: number of ids, 0 to ids - 1.
        dim: width of a row.
        lookups: the features that are looked up; the model's task finds the rows as batch["rows/FEATURE"].
        hashed: any id is taken, and hashed to a row (`hash_ids`); else an id that is out of range is refused.
        scale: standard deviation of the initial rows; 0 is 1 / sqrt(dim).
        placement: rows: each device owns rows of it, and ids travel to them. tables: tables of a width are
            packed into bins of equal size, and a device owns complete bins; where there are more devices
            than bins, several share one. replicated: each device has all rows, and the dense gradient is
            all-reduced. auto: replicated up to 64 KiB of float32 rows, else rows. It depends on the tables
            alone, so that a checkpoint fits any mesh.
    """

    ids: int
    dim: int
    lookups: tuple[Lookup, ...]
    hashed: bool = False
    scale: float = 0.0
    placement: Literal["auto", "rows", "tables", "replicated"] = "auto"

    @property
    def kind(self) -> Kind:
        """The placement, with that of `auto` by size."""
        if self.placement != "auto":
            return self.placement
        return "replicated" if 4 * self.ids * self.dim <= REPLICATED_BYTES else "rows"

    def __post_init__(self) -> None:
        kinds = ("auto", "rows", "tables", "replicated")
        check(
            self.placement in kinds,
            f"SparseTable: placement={self.placement!r} must be one of {', '.join(kinds)}",
        )
        check(
            self.ids >= 1 and self.dim >= 1,
            f"SparseTable: ids={self.ids}, dim={self.dim} must be 1 or more",
        )
        check(bool(self.lookups), "SparseTable: lookups must name the features that are looked up")


Tables = Mapping[str, SparseTable]


class Placement(NamedTuple):
    """The place of each id of a stack of tables in its array, the same on every mesh.

    Each device owns a run of stripes. Neighbouring ids, and ids of any stride, are spread over the stripes of
    their bin; bins, runs of ids and of stripes, are of equal size.
    """

    ids: int
    dim: int
    stripes: int = STRIPES
    bins: int = 1

    @property
    def pack(self) -> int:
        """Rows of a line of the array: a TPU would pad shorter lines, or copy the table."""
        return LANES // self.dim if LANES % self.dim == 0 else 1

    @property
    def rows(self) -> int:
        """Rows of the array, with those that no id has."""
        unit = self.stripes * self.pack
        return -(-self.ids // unit) * unit

    @property
    def shape(self) -> tuple[int, int]:
        """[lines, width of a line]."""
        return self.rows // self.pack, self.pack * self.dim

    @property
    def bin_rows(self) -> int:
        """Rows of a bin, and the ids that it has room for."""
        return self.rows // self.bins

    def place(self, id_: Any) -> Any:
        """The row of an id, int32; for each run of a bin's stripes a permutation of them."""
        stripes, local = self.stripes // self.bins, id_ % self.bin_rows
        high, low = local // stripes, local % stripes
        stripe = (low * _SPREAD + high) % stripes
        return id_ - local + stripe * (self.rows // self.stripes) + high

    def id(self, place: Any) -> Any:
        """The id at a row: the inverse of `place`; not all ids are of a table."""
        stripes, length = self.stripes // self.bins, self.rows // self.stripes
        local = place % self.bin_rows
        stripe, high = local // length, local % length
        inverse = pow(_SPREAD, -1, stripes)
        return place - local + high * stripes + (stripe - high) * inverse % stripes


class StackedLookup(NamedTuple):
    """A lookup within a stack: its table's first id, and the table."""

    lookup: Lookup
    table: SparseTable
    offset: int


class StackedTables(NamedTuple):
    """Tables of one width in one array. offsets: first id of each table, by name, ascending. replicated: all
    rows are on all devices.
    """

    name: str
    placement: Placement
    offsets: dict[str, int]
    lookups: tuple[StackedLookup, ...]
    replicated: bool = False

    def loads(self, widths: Sequence[int]) -> tuple[int, ...]:
        """Lookups of an example in each bin.

        Args:
            widths: ids of an example in each of the lookups.
        """
        loads = [0] * self.placement.bins
        for each, width in zip(self.lookups, widths, strict=True):
            loads[each.offset // self.placement.bin_rows] += width
        return tuple(loads)


def is_replicated(stack: str) -> bool:
    """Whether a stack's arrays are on every device, by its name."""
    return stack.endswith(_REPLICATED)


def placement_of(stack: str, rows: int) -> Placement:
    """The placement of a stack in stripes, by its name and the rows of its array."""
    dim, _, bins = stack.removeprefix("dim").partition(_BINS)
    return Placement(rows, int(dim), bins=int(bins or 1))


def stack(tables: Tables) -> list[StackedTables]:
    """The stacks of some tables, one for each width and placement.

    Raises:
        ValueError: too many ids of one width, or a feature that is looked up twice.
    """
    features = [lookup.feature for table in tables.values() for lookup in table.lookups]
    twice = sorted({name for name in features if features.count(name) > 1})
    check(
        not twice,
        f"tables: feature {', '.join(twice)} is looked up twice; repeat it in the data under another name",
    )
    stacks = []
    dims = sorted({table.dim for table in tables.values()})
    for dim, kind in itertools.product(dims, KINDS):
        members = {n: t for n, t in tables.items() if (t.dim, t.kind) == (dim, kind)}
        if not members:
            continue
        placement, offsets = _arrange({n: table.ids for n, table in members.items()}, dim, kind)
        check(
            placement.rows <= MAX_ROWS,
            f"tables: {', '.join(members)} have {sum(t.ids for t in members.values()):,} ids of width {dim};"
            f" one width takes {MAX_ROWS:,}",
        )
        lookups = tuple(
            StackedLookup(lookup, table, offsets[name])
            for name, table in members.items()
            for lookup in table.lookups
        )
        suffixes = {"rows": "", "tables": f"{_BINS}{placement.bins}", "replicated": _REPLICATED}
        offsets = dict(sorted(offsets.items(), key=lambda item: item[1]))
        name = f"dim{dim}{suffixes[kind]}"
        stacks.append(StackedTables(name, placement, offsets, lookups, kind == "replicated"))
    return stacks


def _arrange(sizes: dict[str, int], dim: int, kind: Kind) -> tuple[Placement, dict[str, int]]:
    """The placement of tables of these numbers of ids, and the first id of each."""
    # A replicated array has no stripes, which would add rows.
    stripes = 1 if kind == "replicated" else STRIPES
    if kind == "tables":
        packed = pack_tables([*sizes.values()], STRIPES)
    else:
        ends = [*itertools.accumulate(sizes.values())]
        packed = TableBins(1, ends[-1], (0,) * len(sizes), (0, *ends[:-1]))
    placement = Placement(packed.size * packed.num_bins, dim, stripes, packed.num_bins)
    firsts = zip(packed.bins, packed.starts, strict=True)
    offsets = [bin_ * placement.bin_rows + start for bin_, start in firsts]
    return placement, dict(zip(sizes, offsets, strict=True))


def by_table(stacked: StackedTables, values: Sequence[float], place_K: jax.Array) -> jax.Array:
    """A value of the table that each row belongs to.

    Args:
        stacked: the stack.
        values: of its tables.
        place_K: int32 [K] rows of the array; one that no id has gets the last table's.

    Returns:
        [K].
    """
    first = jnp.asarray([*stacked.offsets.values()], jnp.int32)[1:]
    table_K = (stacked.placement.id(place_K)[:, None] >= first[None]).sum(1, dtype=jnp.int32)
    return jnp.asarray(values, float)[table_K]


def hash_ids(id_: jax.Array, num: int) -> jax.Array:
    """Ids as rows: lowbias32 (Wellons 2018) of the id's low 32 bits, modulo the number of rows.

    Args:
        id_: integers [...].
        num: number of rows.

    Returns:
        [...] 0 to num - 1; -1 stays.
    """
    x = mix(id_.astype(jnp.uint32))
    return jnp.where(id_ == -1, -1, (x % jnp.uint32(num)).astype(jnp.int32))


def row_shapes(tables: Tables, batch: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Shapes of the rows that a batch looks up, as features of it.

    Args:
        tables: of the model.
        batch: arrays, or shapes.
        dtype: of the rows.

    Raises:
        ValueError: a feature of ids or weights is missing, or has another shape or type.
    """
    shapes = {}
    for table in tables.values():
        for lookup in table.lookups:
            ids = batches.feature(batch, lookup.feature)
            check(
                len(ids.shape) in (1, 2) and jnp.issubdtype(ids.dtype, jnp.integer),
                f"feature {lookup.feature!r} is {batches.describe_array(ids)}: ids to look up are int[B], or"
                " int[B, L] with -1 where there is none",
            )
            if lookup.weights:
                weights = batches.feature(batch, lookup.weights)
                check(
                    weights.shape == ids.shape and jnp.issubdtype(weights.dtype, jnp.floating),
                    f"feature {lookup.weights!r} is {batches.describe_array(weights)}: the weights of"
                    f" {lookup.feature!r} are float{list(ids.shape)}",
                )
            kept = ids.shape if lookup.pool == "none" else ids.shape[:1]
            shape = (*kept, table.dim)
            shapes[PREFIX + lookup.feature] = jax.ShapeDtypeStruct(shape, dtype)
    return shapes


def id_ranges(tables: Tables) -> dict[str, batches.Ids]:
    """The range of each feature that is looked up in a table that hashes nothing."""
    return {
        lookup.feature: batches.Ids(table.ids, f"ids of table {name!r}", low=-1)
        for name, table in tables.items()
        if not table.hashed
        for lookup in table.lookups
    }


def initial_rows(stacked: StackedTables, tables: Tables, key: jax.Array, dtype: Any) -> jax.Array:
    """Normal deviates times the scale of their table.

    Args:
        stacked: the stack.
        tables: of the model.
        key: [] of the draws.
        dtype: of the rows.

    Returns:
        [lines, width].
    """
    placement = stacked.placement
    scales = [tables[name].scale or 1 / math.sqrt(placement.dim) for name in stacked.offsets]
    rows = jax.random.normal(key, placement.shape, dtype)
    if len({*scales}) == 1:
        return rows * jnp.asarray(scales[0], dtype)
    line = jax.lax.broadcasted_iota(jnp.int32, placement.shape, 0) * placement.pack
    column = jax.lax.broadcasted_iota(jnp.int32, placement.shape, 1) // placement.dim
    ids = placement.id(line + column)
    factor = jnp.full(placement.shape, scales[0], dtype)
    for offset, scale in zip(stacked.offsets.values(), scales, strict=True):
        factor = jnp.where(ids >= offset, jnp.asarray(scale, dtype), factor)
    return rows * factor
