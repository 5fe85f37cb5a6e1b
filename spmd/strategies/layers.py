"""Norms of each layer's gradient, parameters and update, as one small array of a step."""

# G layers, or modules that are none

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from spmd.core import tree

KINDS = ("gradient_norm", "parameter_norm", "update_norm")
UNMEASURED = -1.0  # in the steps between two logs
_TO_NUMBER = re.compile(r"(.*?/\d+)(?:/|$)")
Dims = Mapping[str, Sequence[str | None] | None]


def layer_names(params: Any, dims: Dims) -> list[str]:
    """Names of the layers of `params`, sorted by number: `blocks/3` of a stack, `layers/1`, else `embed`.

    Where unlike blocks are in turn, those of a kind are a stack, and the number is that in it: `blocks/0/3`.

    Args:
        params: parameters, or their shapes.
        dims: logical dims by name; a stack's first is `layers`.
    """
    leaves = tree.named_leaves(params)
    names = {name for leaf_name, leaf in leaves.items() for name in _names(leaf_name, leaf, dims)}
    number = lambda part: (1, int(part), "") if part.isdecimal() else (0, 0, part)
    return sorted(names, key=lambda name: [number(part) for part in name.split("/")])


def layer_norms(trees: Sequence[Any], dims: Dims) -> jax.Array:
    """L2 norms [len(trees), G] of trees shaped as the parameters, at least in float32; G: layer_names."""
    return jnp.stack([_norms(each, dims) for each in trees])


def _norms(arrays: Any, dims: Dims) -> jax.Array:
    squares: dict[str, jax.Array] = {}
    for leaf_name, leaf in tree.named_leaves(arrays).items():
        square = jnp.square(jnp.abs(leaf).astype(tree.at_least_float32(leaf.dtype)))
        names = [*_names(leaf_name, leaf, dims)]
        axes = tuple(range(int(_is_stack(leaf_name, dims)), leaf.ndim))
        each_L = square.sum(axes).reshape(len(names))
        for i, name in enumerate(names):
            squares[name] = squares[name] + each_L[i] if name in squares else each_L[i]
    return jnp.sqrt(jnp.stack([squares[name] for name in layer_names(arrays, dims)]))


def _is_stack(name: str, dims: Dims) -> bool:
    return (dims.get(name) or (None,))[:1] == ("layers",)


def _names(name: str, leaf: Any, dims: Dims) -> Iterator[str]:
    """The layer of a parameter, or those of a stack in order."""
    found = _TO_NUMBER.match(name)
    group = found[1] if found else name.split("/", 1)[0]
    if not _is_stack(name, dims):
        yield group
        return
    yield from (f"{group}/{i}" for i in range(leaf.shape[0]))
