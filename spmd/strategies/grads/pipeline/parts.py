"""The parts of a loss on one stage of a pipeline: chunks of layers, and what comes before and after them."""

# S stages, M microbatches, V chunks of layers on each stage, L layers

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from spmd.core.fields import check
from spmd.parallel import scope
from spmd.strategies.grads.pipeline import schedules
from spmd.strategies.grads.pipeline.arrays import STAGE, LeafGroups, exchange_chunks, pick

PyTree = Any


class StackOfLayers(Protocol):
    """A stack of layers, as models.stack.LayerStack declares it."""

    @property
    def name(self) -> str:
        """Top of the names of its parameters."""
        ...

    @property
    def layers(self) -> int:
        """Number of layers."""
        ...

    @property
    def period(self) -> int:
        """A stage holds a multiple of so many."""
        ...

    @property
    def repeats(self) -> str:
        """The fields that make the period."""
        ...


class StagedLoss(Protocol):
    """A loss in parts, as tasks.Staged: what comes before a stack of layers, the layers, what comes after."""

    enter: Callable[..., PyTree]
    between: Callable[..., PyTree] | None
    through: Callable[..., tuple[PyTree, jax.Array, PyTree, PyTree]]
    leave: Callable[..., tuple[jax.Array, PyTree]]
    stream: PyTree
    stacks: Sequence[StackOfLayers]
    read_frozen: Callable[..., tuple[PyTree, PyTree, PyTree]]


class StageParts:
    """A stage's layers and the parts of the loss, while they are traced on one device.

    A stage has V chunks of each stack of layers, those of the first stack first. leaves, state_leaves: how
    parameters and model state fall into stacks. orders: see wait_for.
    """

    def __init__(
        self,
        staged: StagedLoss,
        table: schedules.Timetable,
        leaves: LeafGroups,
        state_leaves: LeafGroups,
        orders: bool,
        params: PyTree,
        batch_M: PyTree,
        step_key: jax.Array,
        scale: PyTree,
    ):
        self.staged, self.table, self.orders = staged, table, orders
        self.leaves, self.state_leaves = leaves, state_leaves
        self.batch_M, self.key, self.scale = batch_M, step_key, scale
        self.index = jax.lax.axis_index(STAGE)
        self.virtual = table.virtual // len(staged.stacks)
        *stacked, self.others = leaves.split(params)
        self.chunks = [self.in_chunks(stack) for stack in stacked]
        # Stand-ins, so that a part that reads what it does not get a gradient for fails while it is traced.
        shapes = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        self.absent = jax.tree.map(shapes, [[x[0] for x in xs] for xs in self.chunks])
        self.absent.append(jax.tree.map(shapes, self.others))

    def in_chunks(self, leaves: PyTree) -> PyTree:
        """[L/S, ...] -> [V, L/SV, ...], the chunks that this stage runs."""
        chunks = jax.tree.map(lambda x: x.reshape(self.virtual, -1, *x.shape[1:]), leaves)
        return exchange_chunks(chunks, self.table.stages, self.virtual, back=False)

    def out_of_chunks(self, chunks: PyTree) -> PyTree:
        """The inverse of in_chunks."""
        chunks = exchange_chunks(chunks, self.table.stages, self.virtual, back=True)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), chunks)

    def _params(self, group: int, leaves: list[jax.Array]) -> PyTree:
        """Parameters that have the leaves of one group only."""
        groups = list(self.absent)
        groups[group] = leaves
        return self.leaves.join(groups)

    def enter(
        self, stack: int, others: list[jax.Array], x: PyTree, microbatch: jax.Array
    ) -> PyTree:
        """The stream into a stack, from that out of the one before."""
        params, rows = self._params(-1, others), pick(self.batch_M, microbatch)
        if stack == 0:
            return self.staged.enter(params, rows, self.key)
        assert self.staged.between is not None
        return self.staged.between(params, x, rows, self.key, stack)

    def has_entry(self, stack: int) -> bool:
        """Whether something comes before a stack's first layer."""
        return stack == 0 or self.staged.between is not None

    def through(
        self,
        stack: int,
        chunk: list[jax.Array],
        x: PyTree,
        states: PyTree,
        number: jax.Array,
        microbatch: jax.Array,
    ) -> tuple[PyTree, jax.Array, PyTree, PyTree]:
        """(x behind the layers of chunk `number` of this stage, scaled loss, sums, their new state)."""
        per_chunk = self.staged.stacks[stack].layers // (self.table.stages * self.virtual)
        first = (number * self.table.stages + self.index) * per_chunk
        # Other stacks' states are not read: any of their chunks will do.
        state = [pick(pick(s, microbatch), number) for s in states]
        rows = pick(self.batch_M, microbatch)
        args = (self._params(stack, chunk), self.state_leaves.join([*state, []]))
        x, loss, sums, new = self.staged.through(
            *args, x, rows, self.key, (stack, first), self.scale
        )
        return x, loss, sums, self.state_leaves.split(new)[stack]

    def leave(self, others: list[jax.Array], x: PyTree, microbatch: jax.Array) -> Any:
        """(scaled loss, sums)."""
        rows = pick(self.batch_M, microbatch)
        return self.staged.leave(self._params(-1, others), x, rows, self.key, self.scale)

    def is_first(self, number: jax.Array) -> jax.Array:
        """Whether chunk `number` of a stack on this stage is the stack's first."""
        return (self.index == 0) & (number == 0)

    def is_last(self, number: jax.Array) -> jax.Array:
        """Whether it is the stack's last."""
        return (self.index == self.table.stages - 1) & (number == self.virtual - 1)

    # The partitioner requires both branches to return the same shardings, so each result is constrained.

    def constrain(self, x: PyTree, *lead: None) -> PyTree:
        """The stream, constrained to its sharding, behind `lead` further dims."""
        place = lambda x, dims: scope.constrain(x, *lead, *dims)
        return jax.tree.map(place, x, self.staged.stream)

    def wait_for(self, x: PyTree, *numbers: jax.Array) -> tuple[jax.Array, ...]:
        """The numbers, made to depend on x.

        XLA on CPUs may start a collective that follows a branch before those in the branch, in an order that
        differs by device: a deadlock. A collective that depends on the branch's result cannot start earlier.
        """
        if not self.orders:
            return numbers
        zero = lambda x: (x.reshape(-1)[0] > 0).astype(jnp.int32) >> 1  # XLA does not fold it
        of_leaf = lambda x, dims: scope.blockwise(zero, (dims,), ())(x)
        first, *rest = jax.tree.leaves(jax.tree.map(of_leaf, x, self.staged.stream))
        total = scope.max_over_replicas(functools.reduce(jnp.add, rest, first))
        return tuple(number + total for number in numbers)

    def stream_into(self, kept: PyTree, chunk: jax.Array, microbatch: jax.Array) -> PyTree:
        """The stream into a chunk: `kept`, but at the first chunk of a stack what comes before its layers."""
        num, stack = len(self.staged.stacks), chunk // self.virtual
        keep = lambda: self.constrain(kept)

        def entry(stack: int) -> Callable[[], PyTree]:
            return lambda: self.constrain(self.enter(stack, self.others, kept, microbatch))

        entries = [entry(i) if self.has_entry(i) else keep for i in range(num)]
        enters = (microbatch >= 0) & self.is_first(chunk - stack * self.virtual)
        if num == 1:
            return jax.lax.cond(enters, entries[0], keep)
        return jax.lax.switch(jnp.where(enters, stack + 1, 0), [keep, *entries])

    def first_pass(self, states: PyTree) -> tuple[PyTree, PyTree]:
        """(the stream, all sums) of a microbatch, for their shapes; ValueError for a stream that changes."""
        at, sums = jnp.int32(0), {}
        x = self.enter(0, self.others, None, at)
        shapes = lambda x: jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), x)
        entered = shapes(x)
        for stack, spec in enumerate(self.staged.stacks):
            if stack and self.has_entry(stack):
                x = self.enter(stack, self.others, x, at)
            weights = [w[0] for w in self.chunks[stack]]
            x, _, new, _ = self.through(stack, weights, x, states, at, at)
            check(
                shapes(x) == entered,
                f"mesh.stage: the stream behind {spec.name} is {shapes(x)}, and that of `enter` {entered}; a"
                " pipeline sends arrays of fixed shapes and types",
            )
            sums |= new
        return x, self.leave(self.others, x, at)[1] | sums
