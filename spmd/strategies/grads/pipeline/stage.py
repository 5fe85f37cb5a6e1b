"""Trace a pipeline stage: its forward and backward ticks, and the scan over all of them."""

# K ticks, S stages, M microbatches, V chunks of layers on each stage, L layers

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from spmd.parallel import scope
from spmd.strategies.grads.pipeline import schedules
from spmd.strategies.grads.pipeline.arrays import (
    STAGE,
    StackedLeaves,
    add,
    exchange_chunks,
    pick,
    put,
    put_if,
    put_state,
    where,
    zeros,
)

PyTree = Any


class StagedLoss(Protocol):
    """A loss in parts, as tasks.Staged: what comes before a stack of layers, the layers, what comes after."""

    enter: Callable[..., jax.Array]
    through: Callable[..., tuple[jax.Array, jax.Array, PyTree, PyTree]]
    leave: Callable[..., tuple[jax.Array, PyTree]]
    stream: tuple[str | None, ...]


class Carry(NamedTuple):
    """State of a stage between ticks. grads: of the stacked leaves [V, L/SV, ...] and of the others."""

    grads: tuple[list[jax.Array], list[jax.Array]]
    sums: PyTree
    states: PyTree  # [M + 1, V, L/SV, ...]: of the layers, before each microbatch
    inputs: jax.Array  # [slots, ...]
    gradients: jax.Array  # [slots, ...]
    sent: tuple[jax.Array, jax.Array]  # to this stage: an input, a gradient


class Stage:
    """A device's stage while it is traced.

    permutes: the layers permute blocks within a stage. A permutation waits for all devices, so it must not be
    in a branch that some stages skip: an idle stage runs its layers on the buffer's content at the same time
    as the others, and its results are discarded. orders: see _wait_for.
    """

    def __init__(
        self,
        staged: StagedLoss,
        table: schedules.Table,
        leaves: StackedLeaves,
        per_chunk: int,
        permutes: bool,
        orders: bool,
        params: PyTree,
        batch_M: PyTree,
        step_key: jax.Array,
        scale: PyTree,
    ):
        self.staged, self.table, self.leaves = staged, table, leaves
        self.per_chunk, self.permutes, self.orders = per_chunk, permutes, orders
        self.batch_M, self.key, self.scale = batch_M, step_key, scale
        self.index = jax.lax.axis_index(STAGE)
        stacked, self.others = leaves.split(params)
        self.chunks = [x.reshape(table.virtual, -1, *x.shape[1:]) for x in stacked]
        self.chunks = exchange_chunks(self.chunks, table, back=False)
        # Stand-ins, so that a part that reads what it does not get a gradient for fails while it is traced.
        shapes = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        self.no_chunk = [shapes(x[0]) for x in self.chunks]
        self.no_others = [shapes(x) for x in self.others]

    def enter(self, others: list[jax.Array], microbatch: jax.Array) -> jax.Array:
        """Input of the first layer."""
        params = self.leaves.join(self.no_chunk, others)
        return self.staged.enter(params, self._rows(microbatch), self.key)

    def through(
        self,
        chunk: list[jax.Array],
        x: jax.Array,
        states: PyTree,
        number: jax.Array,
        microbatch: jax.Array,
    ) -> tuple[jax.Array, jax.Array, PyTree, PyTree]:
        """(x behind the layers of chunk `number` of this stage, scaled loss, sums, their new state)."""
        params = self.leaves.join(chunk, self.no_others)
        first = (number * self.table.stages + self.index) * self.per_chunk
        state = jax.tree.map(lambda s: pick(pick(s, microbatch), number), states)
        rows = self._rows(microbatch)
        return self.staged.through(params, state, x, rows, self.key, first, self.scale)

    def leave(self, others: list[jax.Array], x: jax.Array, microbatch: jax.Array) -> Any:
        """(scaled loss, sums)."""
        params = self.leaves.join(self.no_chunk, others)
        return self.staged.leave(params, x, self._rows(microbatch), self.key, self.scale)

    def _rows(self, microbatch: jax.Array) -> PyTree:
        return jax.tree.map(lambda x: pick(x, microbatch), self.batch_M)

    def _is_first(self, chunk: jax.Array) -> jax.Array:
        return (self.index == 0) & (chunk == 0)

    def _is_last(self, chunk: jax.Array) -> jax.Array:
        return (self.index == self.table.stages - 1) & (chunk == self.table.virtual - 1)

    # The partitioner requires both branches to return the same shardings, so each result is constrained.

    def _constrain(self, x: jax.Array) -> jax.Array:
        return scope.constrain(x, *self.staged.stream)

    def _wait_for(self, x: jax.Array, *numbers: jax.Array) -> tuple[jax.Array, ...]:
        """The numbers, made to depend on x.

        XLA on CPUs may start a collective that follows a branch before those in the branch, in an order that
        differs by device: a deadlock. A collective that depends on the branch's result cannot start earlier.
        """
        if not self.orders:
            return numbers
        zero = lambda x: (x.reshape(-1)[0] > 0).astype(jnp.int32) >> 1  # XLA does not fold it
        zero = scope.max_over_replicas(scope.blockwise(zero, (self.staged.stream,), ())(x))
        return tuple(number + zero for number in numbers)

    def _input(self, kept: jax.Array, chunk: jax.Array, microbatch: jax.Array) -> jax.Array:
        return jax.lax.cond(
            (microbatch >= 0) & self._is_first(chunk),
            lambda: self._constrain(self.enter(self.others, microbatch)),
            lambda: self._constrain(kept),
        )

    # What is kept is read outside of the branches: a buffer that goes into one is copied.

    def forward(
        self,
        carry: Carry,
        row: schedules.BufferedTable,
        now: schedules.BufferedTable,
        idle: jax.Array,
    ) -> tuple[jax.Array, PyTree]:
        """(what goes to the next stage, states); row: the tick of all stages, now: of this one. That of
        the last one is part of its backward.
        """
        kept = pick(carry.inputs, now.forward_x)
        x = self._input(kept, now.forward_chunk, now.forward)
        number, microbatch, some = self._wait_for(
            x, now.forward_chunk, now.forward, row.forward.max()
        )
        runs = (microbatch >= 0) & ~self._is_last(number)

        def run() -> tuple[jax.Array, PyTree]:
            chunk = [pick(w, number) for w in self.chunks]
            y, _, _, state = self.through(chunk, x, carry.states, number, microbatch)
            return self._constrain(y), put_state(carry.states, state, number, microbatch, runs)

        rest = lambda: (self._constrain(idle), carry.states)
        return jax.lax.cond(some >= 0 if self.permutes else runs, run, rest)

    def backward(
        self,
        carry: Carry,
        row: schedules.BufferedTable,
        now: schedules.BufferedTable,
        idle: jax.Array,
        y: jax.Array,
    ) -> tuple[Any, PyTree, PyTree, jax.Array]:
        """(gradients, sums, states, cotangent for the previous stage); rematerialises the chunk.

        y: output of the same tick's forward, which runs first.
        """
        kept = pick(carry.inputs, now.backward_x)
        at = self._wait_for(y, now.backward_chunk, now.backward, row.backward.max())
        x = self._input(kept, *at[:2])
        number, microbatch, some = self._wait_for(x, *at)
        runs = microbatch >= 0
        is_first, is_last = runs & self._is_first(number), runs & self._is_last(number)
        arrived = pick(carry.gradients, now.backward_ct)

        def layers(chunk: list[jax.Array], x: jax.Array) -> Any:
            y, loss, *aux = self.through(chunk, x, carry.states, number, microbatch)
            return (y, loss), aux

        def run() -> tuple[Any, PyTree, PyTree, jax.Array]:
            chunk = [pick(w, number) for w in self.chunks]
            (y, loss), pull, (layer_sums, state) = jax.vjp(layers, chunk, x, has_aux=True)
            cotangent, other_grads, sums = self._head(carry, is_last, y, arrived, microbatch)
            grads, cotangent = self._pull_layers(pull, cotangent, jnp.ones_like(loss))
            other_grads = self._embedding(carry, is_first, other_grads, cotangent, microbatch)
            if self.permutes:
                grads, layer_sums = where(runs, (grads, layer_sums), zeros((grads, layer_sums)))
            chunk_grads = [
                put(sum_, pick(sum_, number) + new, number)
                for sum_, new in zip(carry.grads[0], grads, strict=True)
            ]
            grads = self.leaves.constrain(chunk_grads, other_grads)
            states = put_state(carry.states, state, number, microbatch, is_last)
            return grads, add(sums, layer_sums), states, self._constrain(cotangent)

        def rest() -> tuple[Any, PyTree, PyTree, jax.Array]:
            grads = self.leaves.constrain(*carry.grads)
            return grads, carry.sums, carry.states, self._constrain(idle)

        return jax.lax.cond(some >= 0 if self.permutes else runs, run, rest)

    # The gradients of head and embedding are each taken inside a branch, so that no array of the size of the
    # logits leaves it.

    def _constrain_others(self, carry: Carry, others: list[jax.Array]) -> list[jax.Array]:
        return self.leaves.constrain(carry.grads[0], others)[1]

    def _head(
        self,
        carry: Carry,
        is_last: jax.Array,
        y: jax.Array,
        arrived: jax.Array,
        microbatch: jax.Array,
    ) -> tuple[jax.Array, list[jax.Array], PyTree]:
        """(cotangent of y, gradients of the other leaves, sums); of the last chunk those of the loss too."""
        place = functools.partial(self._constrain_others, carry)

        def head() -> tuple[jax.Array, list[jax.Array], PyTree]:
            leave = lambda others, y: self.leave(others, y, microbatch)
            loss, pull, sums = jax.vjp(leave, self.others, y, has_aux=True)
            grads, cotangent = pull(jnp.ones_like(loss))
            cotangent = self._constrain(cotangent)
            return cotangent, place(add(carry.grads[1], grads)), add(carry.sums, sums)

        rest = lambda: (self._constrain(arrived), place(carry.grads[1]), carry.sums)
        return jax.lax.cond(is_last, head, rest)

    def _embedding(
        self,
        carry: Carry,
        is_first: jax.Array,
        grads: list[jax.Array],
        cotangent: jax.Array,
        microbatch: jax.Array,
    ) -> list[jax.Array]:
        """The gradients of the other leaves, with the embedding's where the chunk is the first."""
        place = functools.partial(self._constrain_others, carry)

        def embedding() -> list[jax.Array]:
            _, pull = jax.vjp(lambda others: self.enter(others, microbatch), self.others)
            return place(add(grads, pull(cotangent)[0]))

        return jax.lax.cond(is_first, embedding, lambda: place(grads))

    def _pull_layers(self, pull: Callable[..., Any], cotangent: jax.Array, one: jax.Array) -> Any:
        """The layers' gradients and the cotangent of their input, computed after the head's."""
        run = lambda: pull((cotangent, one))
        if not self.orders:
            return run()
        (when,) = self._wait_for(cotangent, jnp.int32(0))
        return jax.lax.cond(when >= 0, run, lambda: zeros(jax.eval_shape(run)))

    def start(self, model_state: PyTree, num_inputs: int, num_gradients: int) -> Carry:
        """The state before the first tick."""
        chunks = jax.tree.map(
            lambda s: s.reshape(self.table.virtual, -1, *s.shape[1:]), model_state
        )
        states = jax.tree.map(
            lambda s: jnp.broadcast_to(s, (self.table.microbatches + 1, *s.shape)),
            exchange_chunks(chunks, self.table, back=False),
        )
        at = jnp.int32(0)

        def first_and_last() -> tuple[jax.Array, PyTree]:
            x = self.enter(self.others, at)
            _, _, layer_sums, _ = self.through([w[0] for w in self.chunks], x, states, at, at)
            return x, self.leave(self.others, x, at)[1] | layer_sums

        x, sums = jax.eval_shape(first_and_last)
        slots = lambda num: scope.constrain(
            jnp.zeros((num, *x.shape), x.dtype), None, *self.staged.stream
        )
        grads = self.leaves.constrain(*zeros((self.chunks, self.others)))
        idle = scope.mapped(zeros(x))
        sent = idle, idle
        return Carry(grads, zeros(sums), states, slots(num_inputs), slots(num_gradients), sent)

    def run(
        self,
        model_state: PyTree,
        program: schedules.BufferedTable,
        num_inputs: int,
        num_gradients: int,
        axes: tuple[str, ...],
    ) -> tuple[PyTree, PyTree, PyTree]:
        """(gradients, sums, model state), each summed over the devices that share it."""
        start = self.start(model_state, num_inputs, num_gradients)
        idle, num = start.sent[0], self.table.stages
        up = [(i, (i + 1) % num) for i in range(num if self.table.virtual > 1 else num - 1)]

        def tick(carry: Carry, row: schedules.BufferedTable) -> tuple[Carry, None]:
            now = jax.tree.map(lambda x_S: pick(x_S, self.index), row)
            # Written first, read later: the other way round XLA would copy the buffers in every tick.
            carry = carry._replace(
                inputs=put_if(carry.inputs, carry.sent[0], now.x_to),
                gradients=put_if(carry.gradients, carry.sent[1], now.ct_to),
            )
            y, states = self.forward(carry, row, now, idle)
            carry = carry._replace(states=states)
            grads, sums, states, below = self.backward(carry, row, now, idle, y)
            # Outside every branch: all stages exchange at every tick.
            down = [(j, i) for i, j in up]
            sent = jax.lax.ppermute(y, STAGE, up), jax.lax.ppermute(below, STAGE, down)
            return carry._replace(grads=grads, sums=sums, states=states, sent=sent), None

        last, _ = jax.lax.scan(tick, start, jax.tree.map(jnp.asarray, program))
        chunk_grads, other_grads = last.grads
        states = jax.tree.map(lambda s: s[-1], last.states)
        chunk_grads, states = exchange_chunks((chunk_grads, states), self.table, back=True)
        stack_grads, model_state = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (chunk_grads, states)
        )
        if axes:
            stack_grads = jax.lax.psum(stack_grads, axes)
        # Over the stages too: a tied embedding has a part of its gradient on two.
        everywhere = (*axes, STAGE)
        other_grads = jax.lax.psum(other_grads, everywhere)
        sums = jax.lax.psum(last.sums, everywhere)
        return self.leaves.join(stack_grads, other_grads), sums, model_state
