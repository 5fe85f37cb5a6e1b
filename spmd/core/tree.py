"""Path names, bytes, norms and finiteness of pytrees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

PyTree = Any


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as `params/layers/0/kernel`."""
    names = []
    for key in path:
        match key:
            case DictKey(key=k) | FlattenedIndexKey(key=k):
                names.append(str(k))
            case GetAttrKey(name=n):
                names.append(n)
            case SequenceKey(idx=i):
                names.append(str(i))
            case _:
                names.append(str(key))
    return "/".join(names)


def named_leaves(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """`{path name: leaf}` in flattening order."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {path_name(path): leaf for path, leaf in flat}


def map_named(fn: Callable[..., Any], tree: PyTree, *rest: PyTree, **kwargs: Any) -> PyTree:
    """tree.map with the path name as the first argument."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: fn(path_name(path), *leaves), tree, *rest, **kwargs
    )


def num_elements(tree: PyTree) -> int:
    """Elements over all leaves (arrays or shape structs)."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def num_bytes(tree: PyTree) -> int:
    """Bytes over all leaves, unsharded."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bytes_per_device(tree: PyTree, shardings: PyTree) -> int:
    """Bytes that one device holds of `tree` under `shardings` (same structure)."""
    total = 0
    for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        total += int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize
    return total


def at_least_float32(dtype: Any) -> Any:
    """float32, or `dtype` when it is wider: the type to reduce in."""
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def global_norm(tree: PyTree) -> jax.Array:
    """sqrt of the sum of squares over all leaves, 0 without any; at least float32: bf16 could overflow."""
    squares = [
        jnp.sum(jnp.square(x.astype(at_least_float32(x.dtype)))) for x in jax.tree.leaves(tree)
    ]
    dtype = squares[0].dtype if squares else jnp.dtype(jnp.float32)
    return jnp.sqrt(sum(squares, start=jnp.zeros((), dtype)))


def select(keep_new: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Leafwise `new` where the scalar holds, else `old`."""
    return jax.tree.map(lambda n, o: jnp.where(keep_new, n, o), new, old)


def human_bytes(count: float) -> str:
    """`12.3 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
