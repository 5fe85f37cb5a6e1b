"""Sparse tables: embedding tables whose rows all devices share, and how ids find their rows.

Tables of one width and placement are stacked into one array: a step exchanges their ids and rows together
(TorchRec, Ivchenko et al. 2022). The place of a row does not depend on the mesh.
"""

# B examples, L ids of a bag, D width of a row, V rows, N devices

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from spmd.core import batches
from spmd.core.bits import mix
from spmd.core.fields import check

PREFIX = "rows/"  # of the looked-up rows among the features of a batch
STRIPES = 1024  # parts of each array, which the number of devices must divide
LANES = 128  # of a TPU's registers: shorter rows share a line
# Coprime to STRIPES: consecutive ids, the frequent ones in sorted tables, go to distant stripes.
_SPREAD = 633
REPLICATED_BYTES = 2**16  # float32 bytes of a table, up to which `auto` replicates it
_REPLICATED = "_replicated"  # ends the names of stacks that are
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
        placement: rows: each device owns rows, and ids travel to them. replicated: each device has all rows,
            and the dense gradient is all-reduced. auto: replicated up to 64 KiB of float32 rows. It depends
            on the table alone, so that a checkpoint fits any mesh.
    """

    ids: int
    dim: int
    lookups: tuple[Lookup, ...]
    hashed: bool = False
    scale: float = 0.0
    placement: Literal["auto", "rows", "replicated"] = "auto"

    @property
    def replicated(self) -> bool:
        """Whether each device has all rows."""
        if self.placement != "auto":
            return self.placement == "replicated"
        return 4 * self.ids * self.dim <= REPLICATED_BYTES

    def __post_init__(self) -> None:
        kinds = ("auto", "rows", "replicated")
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

    Each device owns a run of stripes. Neighbouring ids, and ids of any stride, are spread over the stripes.
    """

    ids: int
    dim: int
    stripes: int = STRIPES

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

    def place(self, id_: Any) -> Any:
        """The row of an id, int32; for each run of `stripes` ids a permutation of the stripes."""
        high, low = id_ // self.stripes, id_ % self.stripes
        return (low * _SPREAD + high) % self.stripes * (self.rows // self.stripes) + high

    def id(self, place: Any) -> Any:
        """The id at a row: the inverse of `place`; ids from `self.ids` on do not exist."""
        stripe, high = place // (self.rows // self.stripes), place % (self.rows // self.stripes)
        return high * self.stripes + (stripe - high) * pow(_SPREAD, -1, self.stripes) % self.stripes


class StackedLookup(NamedTuple):
    """A lookup within a stack: its table's first id, and the table."""

    lookup: Lookup
    table: SparseTable
    offset: int


class StackedTables(NamedTuple):
    """Tables of one width in one array. offsets: first id of each table, by name. replicated: all rows are on
    all devices.
    """

    name: str
    placement: Placement
    offsets: dict[str, int]
    lookups: tuple[StackedLookup, ...]
    replicated: bool = False


def is_replicated(stack: str) -> bool:
    """Whether a stack's arrays are on every device, by its name."""
    return stack.endswith(_REPLICATED)


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
    for dim, replicated in sorted({(table.dim, table.replicated) for table in tables.values()}):
        offset, offsets, lookups = 0, dict[str, int](), list[StackedLookup]()
        for name, table in tables.items():
            if (table.dim, table.replicated) == (dim, replicated):
                offsets[name] = offset
                lookups += [StackedLookup(lookup, table, offset) for lookup in table.lookups]
                offset += table.ids
        # A replicated array has no stripes, which would add rows.
        placement = Placement(offset, dim, 1 if replicated else STRIPES)
        check(
            placement.rows <= MAX_ROWS,
            f"tables: {', '.join(offsets)} have {offset:,} ids of width {dim}; one width takes {MAX_ROWS:,}",
        )
        name = f"dim{dim}" + _REPLICATED * replicated
        stacks.append(StackedTables(name, placement, offsets, tuple(lookups), replicated))
    return stacks


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
