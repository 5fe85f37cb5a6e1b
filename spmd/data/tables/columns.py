"""Columns of Arrow as features: their types checked, their values as numpy arrays."""

# N rows

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import compute

from spmd.core.fields import check, closest
from spmd.data import ragged


class Column(NamedTuple):
    """A column that is read.

    name: as Parquet and Arrow know it, `image.bytes` for a field of a struct. width: values of a row, 0 for a
    scalar. dtype: of the feature, "bytes" for encoded values.
    """

    name: str
    width: int
    dtype: str


class Feature(NamedTuple):
    """A feature, and the columns that it is made of."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    columns: tuple[Column, ...]


_BINARY = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_string,
    pa.types.is_large_string,
)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def match(
    schema: pa.Schema,
    features: Mapping[str, tuple[tuple[int, ...], str]],
    columns: Mapping[str, Sequence[str]],
    file: str,
) -> tuple[Feature, ...]:
    """The columns of a schema that features are made of.

    Args:
      schema: of the file.
      features: {name: (shape, dtype)} as declared.
      columns: {feature: its columns}; by default the one of its name.
      file: for messages.

    Raises:
      ValueError: a column is missing, nested, or of a type that does not fit.
    """
    matched = []
    for name, (shape, dtype) in features.items():
        names = tuple(columns.get(name, (name,)))
        size = math.prod(shape)
        check(
            len(names) == 1 or len(names) == size,
            f"feature {name!r} has {size} elements and data.columns gives {len(names)} columns for it; give"
            " one for each, or a single column of lists",
        )
        width = 0 if len(names) > 1 or not shape else size
        found = tuple(_column(schema, column, width, dtype, name, file) for column in names)
        matched.append(Feature(name, tuple(shape), dtype, found))
    return tuple(matched)


def _column(
    schema: pa.Schema, name: str, width: int, dtype: str, feature: str, file: str
) -> Column:
    check(
        name in schema.names,
        f"{file} has no column {name!r} (feature {feature!r}).{closest(name, schema.names)} It has:"
        f" {', '.join(schema.names[:12])}{' ...' if len(schema.names) > 12 else ''}",
    )
    kind = schema.field(name).type
    if isinstance(kind, pa.ExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind) and dtype == ragged.BYTES and kind.get_field_index("bytes") >= 0:
        return Column(f"{name}.bytes", 0, dtype)  # an image as Hugging Face stores it
    inner = kind
    if width and any(is_list(kind) for is_list in _LISTS):
        inner = kind.value_type
        length = getattr(kind, "list_size", width)
        check(
            length == width,
            f"{file}: column {name!r} holds lists of {length} values, feature {feature!r} has"
            f" {width} elements",
        )
    declared = f"{dtype}[{width}]" if width else dtype
    if _fits(inner, dtype) and bool(width) == (inner is not kind):
        return Column(name, width, dtype)
    advice = "declare another dtype in data.features, or convert the column"
    if pa.types.is_nested(inner):
        advice = "nested columns are not read: flatten them to a column for each value"
    elif any(is_binary(inner) for is_binary in _BINARY):
        advice = (
            'text is no number: write numbers, or declare it "bytes" where it holds encoded images'
        )
    elif dtype.startswith(("int", "uint")) and pa.types.is_floating(inner):
        advice = "fractions would be lost: declare float32, or store whole numbers"
    raise ValueError(
        f"{file}: column {name!r} is {kind}, feature {feature!r} is declared {declared}; {advice}"
    )


def _fits(kind: pa.DataType, dtype: str) -> bool:
    """Whether the values of a column are those of a dtype, or narrower."""
    if dtype == ragged.BYTES:
        return any(is_binary(kind) for is_binary in _BINARY)
    if pa.types.is_boolean(kind):
        return True
    if pa.types.is_integer(kind):
        return np.dtype(dtype).kind in "iuf"
    return pa.types.is_floating(kind) and np.dtype(dtype).kind == "f"


def cast(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Values in the dtype of the feature; ValueError where whole numbers are out of its range."""
    if values.dtype == dtype:
        return values
    target = np.dtype(dtype)
    if target.kind in "iu" and values.dtype.kind in "iu" and values.size:
        limits = np.iinfo(target)
        low, high = int(values.min()), int(values.max())
        check(
            limits.min <= low and high <= limits.max,
            f"column {name!r} holds {low if low < limits.min else high}, out of the range of {dtype}",
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite
        return values.astype(target)


def to_numpy(
    column: pa.ChunkedArray | pa.Array, about: Column, fill: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """(the values [N] or [N, width], bool [N] where one is missing, or None); missing ones are `fill`."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_struct(array.type):
        array = array.field(about.name.rpartition(".")[2])
    missing_N = np.asarray(array.is_null()) if array.null_count else None
    if about.dtype == ragged.BYTES:
        values = [b"" if x is None else _bytes(x) for x in array.to_pylist()]
        return ragged.column(values), missing_N
    if about.width:
        lengths = compute.call_function("list_value_length", [array]).fill_null(about.width)
        check(
            bool((np.asarray(lengths) == about.width).all()),
            f"column {about.name!r}: not every list has {about.width} values",
        )
        if missing_N is not None:
            array = pa.array(
                [[0] * about.width if x is None else x for x in array.to_pylist()], array.type
            )
        flat = array.flatten()
        if flat.null_count:
            inside_N2 = np.asarray(flat.is_null()).reshape(-1, about.width)
            missing_N = np.array([row.any() for row in inside_N2])
        return _numbers(flat, about, fill).reshape(-1, about.width), missing_N
    return _numbers(array, about, fill), missing_N


def _numbers(array: pa.Array, about: Column, fill: float) -> np.ndarray:
    if array.null_count:
        number = fill if np.dtype(about.dtype).kind == "f" else 0
        if pa.types.is_floating(array.type):
            array = array.fill_null(number)
        elif number == number:
            array = array.fill_null(pa.scalar(number).cast(array.type))
        else:  # whole numbers for a feature of floats, where NaN stands for those missing
            array = array.cast(pa.float64()).fill_null(number)
    return cast(array.to_numpy(zero_copy_only=False), about.dtype, about.name)


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value


def join(parts: Sequence[np.ndarray], feature: Feature) -> np.ndarray:
    """A feature [N, ...] of the values of its columns."""
    if len(parts) == 1:
        return parts[0].reshape(len(parts[0]), *feature.shape)
    return np.stack(parts, axis=1).reshape(len(parts[0]), *feature.shape)


def refuse_missing(missing_N: np.ndarray | None, rows_N: np.ndarray, feature: str) -> None:
    """ValueError where one of the rows taken misses a value."""
    if missing_N is not None and missing_N.any():
        row = int(rows_N[np.flatnonzero(missing_N)[0]])
        raise ValueError(f"feature {feature!r} is missing in row {row} (data.missing)")
