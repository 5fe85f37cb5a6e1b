"""Features whose examples differ in size: encoded bytes, and images that are not decoded yet.

A source gives such a feature as a list; from there on it is an object array [N], which rows index as they do
any other feature. Declared as ((), "bytes") while encoded, with -1 for sizes that differ among the examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

BYTES = "bytes"  # the dtype of an encoded feature
UNKNOWN = -1  # a size that differs from example to example


def is_open(shape: Sequence[int], dtype: str) -> bool:
    """Whether a declared feature is not yet an array of one shape."""
    return dtype == BYTES or UNKNOWN in shape


def column(values: Sequence[Any]) -> np.ndarray:
    """A list of N values as an object array [N], also where the values are arrays of one shape."""
    array = np.empty(len(values), object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def columns(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with each list as an object array."""
    return {name: column(x) if isinstance(x, list) else x for name, x in batch.items()}


def zeros(num: int, shape: Sequence[int], dtype: str) -> np.ndarray:
    """N empty values of a declared feature."""
    if is_open(shape, dtype):
        return column([b""] * num)
    return np.zeros((num, *shape), dtype)


def zeros_like(x: np.ndarray) -> np.ndarray:
    """As many empty values."""
    return column([b""] * len(x)) if x.dtype.hasobject else np.zeros_like(x)


def num_bytes(x: Any) -> int:
    """Bytes of a feature's values."""
    if isinstance(x, np.ndarray) and not x.dtype.hasobject:
        return x.nbytes
    return sum(len(value) for value in x if isinstance(value, bytes))
