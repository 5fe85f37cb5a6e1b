"""Arrays of a pipeline: parameters in chunks of layers, and places of stacks that are read and written."""

# S stages, M microbatches, V chunks of layers on each stage, L layers

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

PyTree = Any
STAGE = "stage"


class LeafGroups(NamedTuple):
    """How a tree falls into the leaves of each stack of layers, and the others (embedding, last norm, head).

    group_of: for each leaf the index of its stack; `stacks`, their number, for one of the others.
    """

    group_of: list[int]
    structure: Any
    stacks: int
    specs: list[P]

    def split(self, nested: PyTree) -> list[list[Any]]:
        """The leaves of each stack, then the others."""
        return self._groups(self.structure.flatten_up_to(nested))

    def _groups(self, leaves: list[Any]) -> list[list[Any]]:
        pairs = list(zip(leaves, self.group_of, strict=True))
        return [[x for x, of in pairs if of == group] for group in range(self.stacks + 1)]

    def constrain(self, groups: list[list[jax.Array]]) -> list[list[jax.Array]]:
        """Sums of gradients (chunks [V, L/SV, ...] of each stack, and others), sharded as parameters are."""
        place = jax.lax.with_sharding_constraint
        leads = [(None,)] * self.stacks + [()]
        return [
            [place(x, P(*lead, *spec)) for x, spec in zip(leaves, specs, strict=True)]
            for leaves, specs, lead in zip(groups, self._groups(self.specs), leads, strict=True)
        ]

    def join(self, groups: list[list[Any]]) -> PyTree:
        """The tree again."""
        sides = [iter(group) for group in groups]
        return self.structure.unflatten([next(sides[of]) for of in self.group_of])


def exchange_chunks(chunks: PyTree, num: int, virtual: int, *, back: bool) -> PyTree:
    """[V, ...] on each stage: from V neighbouring chunks of layers, as the parameters are sharded, to every
    S-th chunk, as virtual stages take them; `back` undoes it. V rounds of one chunk each.

    num: stages. virtual: chunks of this stack on each.
    """
    if virtual == 1:
        return chunks
    stage = jax.lax.axis_index(STAGE)
    out = zeros(chunks)
    for numbers in exchange_turns(num, virtual):
        sends = [n - s * virtual for s, n in enumerate(numbers)]
        pairs = [(s, n % num) for s, n in enumerate(numbers)]
        slots = {to: n // num for (_, to), n in zip(pairs, numbers, strict=True)}
        source, target = jnp.asarray(sends), jnp.asarray([slots[s] for s in range(num)])
        if back:
            source, target, pairs = target, source, [(to, s) for s, to in pairs]
        move = lambda x: jax.lax.ppermute(pick(x, source[stage]), STAGE, pairs)  # noqa: B023
        out = jax.tree.map(lambda o, x: put(o, move(x), target[stage]), out, chunks)  # noqa: B023
    return out


def exchange_turns(stages: int, virtual: int) -> list[list[int]]:
    """In each turn, which chunk of all each stage sends, so that each receives one."""
    common = math.gcd(stages, virtual)
    chunk = lambda turn, s: turn // common * common + (turn + s // (stages // common)) % common
    return [[s * virtual + chunk(turn, s) for s in range(stages)] for turn in range(virtual)]


def add(sums: Any, new: Any) -> Any:
    """Sum leaf by leaf; `new` may lack some entries of a dict of sums."""
    if isinstance(sums, dict):
        return {name: add(sum_, new[name]) if name in new else sum_ for name, sum_ in sums.items()}
    return jax.tree.map(jnp.add, sums, new)


def zeros(like: PyTree) -> PyTree:
    """Zeros of the shapes and dtypes of `like`."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def where(condition: jax.Array, x: PyTree, y: PyTree) -> PyTree:
    """jnp.where leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def put_state(
    states: PyTree, new: PyTree, number: jax.Array, microbatch: jax.Array, when: jax.Array
) -> PyTree:
    """States with the state [L/SV, ...] of a chunk after a microbatch put in its place."""

    def put_leaf(s: jax.Array, n: jax.Array) -> jax.Array:
        at = (microbatch + 1, number, *(jnp.zeros_like(number),) * n.ndim)
        old = jax.lax.dynamic_slice(s, at, (1, 1, *n.shape))
        return jax.lax.dynamic_update_slice(s, jnp.where(when, n[None, None], old), at)

    return jax.tree.map(put_leaf, states, new)


def pick(nested: PyTree, index: jax.Array) -> PyTree:
    """x[index] of each leaf x; an index of -1, where nothing is read, is as good as 0."""
    at = lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
    return jax.tree.map(at, nested)


def put(x: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """x with x[index] = new."""
    return jax.lax.dynamic_update_index_in_dim(x, new, index, 0)


def put_if(nested: PyTree, new: PyTree, index: jax.Array) -> PyTree:
    """Each leaf x with x[index] = new, or x for an index of -1."""
    at = jnp.maximum(index, 0)
    put_leaf = lambda x, n: put(x, jnp.where(index >= 0, n, pick(x, at)), at)
    return jax.tree.map(put_leaf, nested, new)
