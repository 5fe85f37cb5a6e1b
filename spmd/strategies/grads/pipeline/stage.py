"""Trace a pipeline stage: its forward and backward ticks, and the scan over all of them."""

# K ticks, S stages, M microbatches, V chunks of layers on each stage, L layers

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd.parallel import scope
from spmd.strategies.grads.pipeline import schedules
from spmd.strategies.grads.pipeline.arrays import (
    STAGE,
    add,
    pick,
    put,
    put_if,
    put_state,
    where,
    zeros,
)
from spmd.strategies.grads.pipeline.parts import StageParts

PyTree = Any


class Carry(NamedTuple):
    """State of a stage between ticks. The stream is a pytree, and so are inputs, gradients and sent.

    grads: of the leaves of each stack [V, L/SV, ...], and of the others.
    """

    grads: list[list[jax.Array]]
    sums: PyTree
    states: PyTree  # [M + 1, V, L/SV, ...] by stack: of the layers, before each microbatch
    inputs: PyTree  # [slots, ...]
    gradients: PyTree  # [slots, ...]
    sent: tuple[PyTree, PyTree]  # to this stage: an input, a gradient


class Stage:
    """The ticks of a device's stage while they are traced.

    permutes: the layers permute blocks within a stage. A permutation waits for all devices, so it must not be
    in a branch that some stages skip: an idle stage runs its layers on the buffer's content at the same time
    as the others, and its results are discarded.
    """

    def __init__(self, parts: StageParts, permutes: bool):
        self.parts, self.permutes = parts, permutes
        self.table, self.leaves, self.virtual = parts.table, parts.leaves, parts.virtual

    def _by_stack(
        self, chunk: jax.Array, runs: jax.Array, carry: Any, step: Callable[..., tuple[Any, Any]]
    ) -> tuple[Any, Any]:
        """step(stack, number of the chunk in it, runs, carry) -> (stream, carry), of the chunk's stack."""
        num = len(self.parts.staged.stacks)
        if num == 1:
            return step(0, chunk, runs, carry)
        at = [chunk - stack * self.virtual for stack in range(num)]
        own = chunk // self.virtual
        if not self.permutes:
            branches = [functools.partial(step, i, at[i], runs, carry) for i in range(num)]
            return jax.lax.switch(own, branches)
        streams = []
        for stack in range(num):  # as an idle stage, each runs the layers of all stacks
            number = jnp.clip(at[stack], 0, self.virtual - 1)
            x, carry = step(stack, number, runs & (own == stack), carry)
            streams.append(x)
        select = lambda *xs: jax.lax.select_n(own, *xs)
        return jax.tree.map(select, *streams), carry

    # What is kept is read outside of the branches: a buffer that goes into one is copied.

    def forward(
        self,
        carry: Carry,
        row: schedules.BufferedTable,
        now: schedules.BufferedTable,
        idle: PyTree,
    ) -> tuple[PyTree, PyTree]:
        """(what goes to the next stage, states); row: the tick of all stages, now: of this one. That of
        the last one is part of its backward.
        """
        kept = pick(carry.inputs, now.forward_x)
        x = self.parts.stream_into(kept, now.forward_chunk, now.forward)
        chunk, microbatch, some = self.parts.wait_for(
            x, now.forward_chunk, now.forward, row.forward.max()
        )
        runs = (microbatch >= 0) & ~self.parts.is_last(chunk - self._before_last)

        def step(stack: int, number: jax.Array, runs: jax.Array, states: PyTree) -> Any:
            weights = [pick(w, number) for w in self.parts.chunks[stack]]
            y, _, _, state = self.parts.through(stack, weights, x, states, number, microbatch)
            states = list(states)
            states[stack] = put_state(states[stack], state, number, microbatch, runs)
            return self.parts.constrain(y), states

        run = lambda: self._by_stack(chunk, runs, carry.states, step)
        rest = lambda: (self.parts.constrain(idle), carry.states)
        return jax.lax.cond(some >= 0 if self.permutes else runs, run, rest)

    @property
    def _before_last(self) -> int:
        """Chunks of a stage before those of the last stack."""
        return self.table.virtual - self.virtual

    def backward(
        self,
        carry: Carry,
        row: schedules.BufferedTable,
        now: schedules.BufferedTable,
        idle: PyTree,
        y: PyTree,
    ) -> tuple[Any, PyTree, PyTree, PyTree]:
        """(gradients, sums, states, cotangent for the previous stage); rematerialises the chunk.

        y: output of the same tick's forward, which runs first.
        """
        kept = pick(carry.inputs, now.backward_x)
        at = self.parts.wait_for(y, now.backward_chunk, now.backward, row.backward.max())
        x = self.parts.stream_into(kept, *at[:2])
        chunk, microbatch, some = self.parts.wait_for(x, *at)
        runs = microbatch >= 0
        arrived = pick(carry.gradients, now.backward_ct)

        def step(stack: int, number: jax.Array, runs: jax.Array, sofar: Any) -> Any:
            (*stack_grads, other_grads), sums, states = sofar
            weights = [pick(w, number) for w in self.parts.chunks[stack]]

            def layers(weights: list[jax.Array], x: PyTree) -> Any:
                y, loss, *aux = self.parts.through(stack, weights, x, states, number, microbatch)
                return (y, loss), aux

            (y, loss), pull, (layer_sums, state) = jax.vjp(layers, weights, x, has_aux=True)
            cotangent, states = arrived, list(states)
            if stack == len(self.parts.chunks) - 1:
                is_last = runs & self.parts.is_last(number)
                groups = [*stack_grads, other_grads]
                cotangent, other_grads, sums = self._head(
                    groups, sums, is_last, y, arrived, microbatch
                )
                states[stack] = put_state(states[stack], state, number, microbatch, is_last)
            grads, cotangent = self._pull_layers(pull, cotangent, jnp.ones_like(loss))
            if self.parts.has_entry(stack):
                enters = runs & self.parts.is_first(number)
                groups = [*stack_grads, other_grads]
                other_grads, cotangent = self._entry(
                    stack, groups, enters, kept, cotangent, microbatch
                )
            if self.permutes:
                grads, layer_sums = where(runs, (grads, layer_sums), zeros((grads, layer_sums)))
            stack_grads[stack] = [
                put(sum_, pick(sum_, number) + new, number)
                for sum_, new in zip(stack_grads[stack], grads, strict=True)
            ]
            summed = self.leaves.constrain([*stack_grads, other_grads]), add(sums, layer_sums)
            return self.parts.constrain(cotangent), (*summed, states)

        sofar = carry.grads, carry.sums, carry.states
        run = lambda: self._by_stack(chunk, runs, sofar, step)
        rest = lambda: (self.parts.constrain(idle), (self.leaves.constrain(sofar[0]), *sofar[1:]))
        cotangent, (grads, sums, states) = jax.lax.cond(
            some >= 0 if self.permutes else runs, run, rest
        )
        return grads, sums, states, cotangent

    # The gradients of head and embedding are each taken inside a branch, so that no array of the size of the
    # logits leaves it.

    def _constrain_others(
        self, groups: list[list[jax.Array]], others: list[jax.Array]
    ) -> list[jax.Array]:
        return self.leaves.constrain([*groups[:-1], others])[-1]

    def _head(
        self,
        grads: list[list[jax.Array]],
        sums: PyTree,
        is_last: jax.Array,
        y: PyTree,
        arrived: PyTree,
        microbatch: jax.Array,
    ) -> tuple[PyTree, list[jax.Array], PyTree]:
        """(cotangent of y, gradients of the other leaves, sums); of the last chunk those of the loss too."""
        place = functools.partial(self._constrain_others, grads)

        def head() -> tuple[PyTree, list[jax.Array], PyTree]:
            leave = lambda others, y: self.parts.leave(others, y, microbatch)
            loss, pull, new = jax.vjp(leave, self.parts.others, y, has_aux=True)
            new_grads, cotangent = pull(jnp.ones_like(loss))
            cotangent = self.parts.constrain(cotangent)
            return cotangent, place(add(grads[-1], new_grads)), add(sums, new)

        rest = lambda: (self.parts.constrain(arrived), place(grads[-1]), sums)
        return jax.lax.cond(is_last, head, rest)

    def _entry(
        self,
        stack: int,
        grads: list[list[jax.Array]],
        enters: jax.Array,
        kept: PyTree,
        cotangent: PyTree,
        microbatch: jax.Array,
    ) -> tuple[list[jax.Array], PyTree]:
        """(gradients of the other leaves, cotangent of `kept`), from that of the stream into the chunk.

        They change where the chunk is the first of its stack: by the embedding's, or what is between stacks.
        """
        place = functools.partial(self._constrain_others, grads)
        enter = lambda others, x: self.parts.enter(stack, others, x, microbatch)

        def embedding() -> list[jax.Array]:
            _, pull = jax.vjp(lambda others: enter(others, kept), self.parts.others)
            return place(add(grads[-1], pull(cotangent)[0]))

        def between() -> tuple[list[jax.Array], PyTree]:
            _, pull = jax.vjp(enter, self.parts.others, kept)
            new, below = pull(cotangent)
            return place(add(grads[-1], new)), self.parts.constrain(below)

        if stack == 0:
            rest = lambda: place(grads[-1])
            return jax.lax.cond(enters, embedding, rest), cotangent
        unchanged = lambda: (place(grads[-1]), self.parts.constrain(cotangent))
        return jax.lax.cond(enters, between, unchanged)

    def _pull_layers(self, pull: Callable[..., Any], cotangent: PyTree, one: jax.Array) -> Any:
        """The layers' gradients and the cotangent of their input, computed after the head's."""
        run = lambda: pull((cotangent, one))
        if not self.parts.orders:
            return run()
        (when,) = self.parts.wait_for(cotangent, jnp.int32(0))
        return jax.lax.cond(when >= 0, run, lambda: zeros(jax.eval_shape(run)))

    def start(self, model_state: PyTree, num_inputs: int, num_gradients: int) -> Carry:
        """The state before the first tick."""
        states = jax.tree.map(
            lambda s: jnp.broadcast_to(s, (self.table.microbatches + 1, *s.shape)),
            self.parts.in_chunks(self.parts.state_leaves.split(model_state)[:-1]),
        )
        x, sums = jax.eval_shape(lambda: self.parts.first_pass(states))

        def slots(num: int) -> PyTree:
            empty = jax.tree.map(lambda x: jnp.zeros((num, *x.shape), x.dtype), x)
            return self.parts.constrain(empty, None)

        grads = self.leaves.constrain(zeros([*self.parts.chunks, self.parts.others]))
        idle = jax.tree.map(scope.batch_over_replicas, zeros(x))
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
        down = [(j, i) for i, j in up]
        send = lambda x, pairs: jax.tree.map(lambda x: jax.lax.ppermute(x, STAGE, pairs), x)

        def tick(carry: Carry, row: schedules.BufferedTable) -> tuple[Carry, None]:
            now = jax.tree.map(lambda x_S: pick(x_S, self.parts.index), row)
            # Written first, read later: the other way round XLA would copy the buffers in every tick.
            carry = carry._replace(
                inputs=put_if(carry.inputs, carry.sent[0], now.x_to),
                gradients=put_if(carry.gradients, carry.sent[1], now.ct_to),
            )
            y, states = self.forward(carry, row, now, idle)
            carry = carry._replace(states=states)
            grads, sums, states, below = self.backward(carry, row, now, idle, y)
            # Outside every branch: all stages exchange at every tick.
            sent = send(y, up), send(below, down)
            return carry._replace(grads=grads, sums=sums, states=states, sent=sent), None

        last, _ = jax.lax.scan(tick, start, jax.tree.map(jnp.asarray, program))
        *stack_grads, other_grads = last.grads
        states = [jax.tree.map(lambda s: s[-1], stack) for stack in last.states]
        stack_grads, states = self.parts.out_of_chunks((stack_grads, states))
        if axes:
            stack_grads = jax.lax.psum(stack_grads, axes)
        # Over the stages too: a tied embedding has a part of its gradient on two.
        everywhere = (*axes, STAGE)
        other_grads = jax.lax.psum(other_grads, everywhere)
        sums = jax.lax.psum(last.sums, everywhere)
        grads = self.leaves.join([*stack_grads, other_grads])
        return grads, sums, self.parts.state_leaves.join([*states, []])
