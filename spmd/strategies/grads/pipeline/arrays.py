"""Arrays of a pipeline: parameters in chunks of layers, and places of stacks that are read and written."""

# S stages, M microbatches, V chunks of layers on each stage, L layers

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from spmd.strategies.grads.pipeline import schedules

PyTree = Any
STAGE = "stage"


class StackedLeaves(NamedTuple):
    """How a parameter tree falls into stacked leaves and the others (embedding, last norm, head)."""

    stacked: list[bool]
    structure: Any
    places: list[P]

    def split(self, params: PyTree) -> tuple[list[jax.Array], list[jax.Array]]:
        """(stacked, others)."""
        return self._sides(self.structure.flatten_up_to(params))

    def _sides(self, leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        pairs = list(zip(leaves, self.stacked, strict=True))
        return [x for x, cut in pairs if cut], [x for x, cut in pairs if not cut]

    def placed(self, chunks: list[jax.Array], others: list[jax.Array]) -> Any:
        """Sums of gradients (chunks [V, L/SV, ...] and others), placed as the parameters are."""
        of_chunks, of_others = self._sides(self.places)
        place = jax.lax.with_sharding_constraint
        return (
            [place(x, P(None, *spec)) for x, spec in zip(chunks, of_chunks, strict=True)],
            [place(x, spec) for x, spec in zip(others, of_others, strict=True)],
        )

    def join(self, stacked: Any, others: Any) -> PyTree:
        """The tree again."""
        sides = iter(stacked), iter(others)
        return self.structure.unflatten([next(sides[not cut]) for cut in self.stacked])


def exchanged(chunks: PyTree, table: schedules.Table, *, back: bool) -> PyTree:
    """[V, ...] on each stage: from V neighbouring chunks of layers, as the parameters lie, to every S-th one,
    as virtual stages take them; `back` undoes it. V rounds of one chunk each.
    """
    num, virtual = table.stages, table.virtual
    if virtual == 1:
        return chunks
    stage = jax.lax.axis_index(STAGE)
    out = zeros(chunks)
    for numbers in exchange_turns(num, virtual):
        sends = [n - s * virtual for s, n in enumerate(numbers)]
        pairs = [(s, n % num) for s, n in enumerate(numbers)]
        slots = {to: n // num for (_, to), n in zip(pairs, numbers, strict=True)}
        here, there = jnp.asarray(sends), jnp.asarray([slots[s] for s in range(num)])
        if back:
            here, there, pairs = there, here, [(to, s) for s, to in pairs]
        move = lambda x: jax.lax.ppermute(pick(x, here[stage]), STAGE, pairs)  # noqa: B023
        out = jax.tree.map(lambda o, x: put(o, move(x), there[stage]), out, chunks)  # noqa: B023
    return out


def exchange_turns(stages: int, virtual: int) -> list[list[int]]:
    """In each turn, which chunk of all each stage sends, so that each receives one."""
    common = math.gcd(stages, virtual)
    own = lambda turn, s: turn // common * common + (turn + s // (stages // common)) % common
    return [[s * virtual + own(turn, s) for s in range(stages)] for turn in range(virtual)]


def added(sums: Any, new: Any) -> Any:
    """Leaf by leaf; a dict of sums may get some of them only."""
    if isinstance(sums, dict):
        return {
            name: added(sum_, new[name]) if name in new else sum_ for name, sum_ in sums.items()
        }
    return jax.tree.map(jnp.add, sums, new)


def zeros(like: PyTree) -> PyTree:
    """Leaf by leaf."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def where(condition: jax.Array, x: PyTree, y: PyTree) -> PyTree:
    """Leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def after(
    states: PyTree, new: PyTree, number: jax.Array, microbatch: jax.Array, when: jax.Array
) -> PyTree:
    """States with that of a chunk after a microbatch, [L/SV, ...], put in its place."""

    def one(s: jax.Array, n: jax.Array) -> jax.Array:
        at = (microbatch + 1, number, *(jnp.zeros_like(number),) * n.ndim)
        old = jax.lax.dynamic_slice(s, at, (1, 1, *n.shape))
        return jax.lax.dynamic_update_slice(s, jnp.where(when, n[None, None], old), at)

    return jax.tree.map(one, states, new)


def pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index]; an index of -1, where nothing is read, is as good as 0."""
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def put(x: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """x with x[index] = new."""
    return jax.lax.dynamic_update_index_in_dim(x, new, index, 0)


def put_if(x: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """x with x[index] = new, or x for an index of -1."""
    at = jnp.maximum(index, 0)
    return put(x, jnp.where(index >= 0, new, pick(x, at)), at)
