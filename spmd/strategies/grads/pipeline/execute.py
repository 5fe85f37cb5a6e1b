"""Run any pipeline schedule: a gradient function whose layers are sharded over stages."""

# K ticks, S stages, M microbatches, V chunks of layers on each stage

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from spmd.core import tree
from spmd.core.fields import check
from spmd.parallel import scope, sharding
from spmd.strategies.grads.direct import GradsOf, microbatches
from spmd.strategies.grads.pipeline import schedules
from spmd.strategies.grads.pipeline.arrays import (
    STAGE,
    StackedLeaves,
    added,
    after,
    exchanged,
    pick,
    put,
    put_if,
    where,
    zeros,
)

PyTree = Any
# Manual beside the stages, so that gradients are summed over them once a step instead of once a microbatch;
# where a strategy has made them manual, it sums. What else cuts the batch cuts parameters too, and is left to
# the compiler.
MANUAL_BATCH = ("replica", "data")


class StagedLoss(Protocol):
    """A loss in parts, as tasks.Staged: what comes before a stack of layers, the layers, what comes after."""

    enter: Callable[..., jax.Array]
    through: Callable[..., tuple[jax.Array, jax.Array, PyTree, PyTree]]
    leave: Callable[..., tuple[jax.Array, PyTree]]
    stream: tuple[str, ...]


def grads_of(
    staged: StagedLoss, dims: Mapping[str, Any], mesh: Mesh, table: schedules.Table
) -> GradsOf:
    """The gradient function that runs `table` on mesh.stage; dims: of the parameters, those that begin with
    "layers" being stacked.

    Equals direct.accumulate of as many microbatches. ValueError for layers that the stages do not divide.
    """
    program, num_inputs, num_gradients = schedules.program(table)
    together = mesh.shape["context"] > 1

    def pipelined(params, model_state, batch, step_key, scale):
        outer, manual = scope.current().axes, sharding.inside()
        axes = tuple(a for a in MANUAL_BATCH if mesh.shape[a] > 1 and a not in manual)
        stacked = [_is_stacked(dims, name) for name in tree.named_leaves(params)]
        structure = jax.tree.structure(params)
        specs = structure.unflatten([P(STAGE) if cut else P() for cut in stacked])
        layers = num_layers(params, dims)
        parts = StackedLeaves(stacked, structure, _places(params, dims, mesh))

        def local(params, model_state, batch_M, step_key, scale):
            with scope.bind(axes=(*outer, *axes), partial=True):
                waits = scope.platform() == "cpu" and mesh.size > table.stages
                per_chunk = layers // (table.stages * table.virtual)
                given = (params, batch_M, step_key, scale)
                stage = Stage(staged, table, parts, per_chunk, together, waits, *given)
                return stage.run(model_state, program, num_inputs, num_gradients, axes)

        run = jax.shard_map(
            local,
            in_specs=(specs, P(STAGE), P(None, axes), P(), P()),
            out_specs=(specs, P(), P(STAGE)),
            **sharding.manual(mesh, (STAGE, *axes)),
            # A gradient stays on its device until it is summed, since its branch does not run on all.
            # Exchanges within a stage are shard_maps of their own, which say nothing of how results vary.
            check_vma=False,
        )
        return run(params, model_state, microbatches(batch, table.microbatches), step_key, scale)

    return pipelined


def _is_stacked(dims: Mapping[str, Any], name: str) -> bool:
    return (dims.get(name) or ("",))[0] == "layers"


def _places(params: PyTree, dims: Mapping[str, Any], mesh: Mesh) -> list[P]:
    """Where each parameter lies over the axes that are left to the compiler."""
    specs = [
        sharding.spec_of(name, x.shape, dims.get(name), mesh, fsdp=True)
        for name, x in tree.named_leaves(params).items()
    ]
    return [P(*(None if axis == STAGE else axis for axis in spec)) for spec in specs]


def num_layers(params: PyTree, dims: Mapping[str, Any]) -> int:
    """Length of the stack."""
    named = tree.named_leaves(params)
    return max(x.shape[0] for name, x in named.items() if _is_stacked(dims, name))


def check_layers(layers: int, stages: int, virtual: int) -> None:
    """ValueError with the counts that work, for layers that the stages do not divide."""
    times = f" x train.virtual_stages={virtual}" if virtual > 1 else ""
    counts = [n for n in range(2, layers // virtual + 1) if layers % (n * virtual) == 0]
    check(
        layers % (stages * virtual) == 0,
        f"mesh.stage={stages}{times} does not divide the {layers} layers of the model; "
        + (f"use mesh.stage={' or '.join(map(str, counts))}" if counts else "use mesh.stage=1")
        + f", or {-(-layers // (stages * virtual)) * stages * virtual} layers",
    )


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

    together: the layers permute blocks within a stage. A permutation waits for all devices, so it must not be
    in a branch that some stages skip: an idle stage runs its layers on the buffer's content at the same time
    as the others, and its results are discarded. waits: see _after.
    """

    def __init__(
        self,
        staged: StagedLoss,
        table: schedules.Table,
        parts: StackedLeaves,
        per_chunk: int,
        together: bool,
        waits: bool,
        params: PyTree,
        batch_M: PyTree,
        step_key: jax.Array,
        scale: PyTree,
    ):
        self.staged, self.table, self.parts = staged, table, parts
        self.per_chunk, self.together, self.waits = per_chunk, together, waits
        self.batch_M, self.key, self.scale = batch_M, step_key, scale
        self.index = jax.lax.axis_index(STAGE)
        stacked, self.others = parts.split(params)
        self.chunks = [x.reshape(table.virtual, -1, *x.shape[1:]) for x in stacked]
        self.chunks = exchanged(self.chunks, table, back=False)
        # Stand-ins, so that a part that reads what it does not get a gradient for fails while it is traced.
        shapes = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        self.no_chunk = [shapes(x[0]) for x in self.chunks]
        self.no_others = [shapes(x) for x in self.others]

    def enter(self, others: list[jax.Array], microbatch: jax.Array) -> jax.Array:
        """Input of the first layer."""
        params = self.parts.join(self.no_chunk, others)
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
        params = self.parts.join(chunk, self.no_others)
        first = (number * self.table.stages + self.index) * self.per_chunk
        state = jax.tree.map(lambda s: pick(pick(s, microbatch), number), states)
        rows = self._rows(microbatch)
        return self.staged.through(params, state, x, rows, self.key, first, self.scale)

    def leave(self, others: list[jax.Array], x: jax.Array, microbatch: jax.Array) -> Any:
        """(scaled loss, sums)."""
        params = self.parts.join(self.no_chunk, others)
        return self.staged.leave(params, x, self._rows(microbatch), self.key, self.scale)

    def _rows(self, microbatch: jax.Array) -> PyTree:
        return jax.tree.map(lambda x: pick(x, microbatch), self.batch_M)

    def _is_first(self, chunk: jax.Array) -> jax.Array:
        return (self.index == 0) & (chunk == 0)

    def _is_last(self, chunk: jax.Array) -> jax.Array:
        return (self.index == self.table.stages - 1) & (chunk == self.table.virtual - 1)

    # The partitioner requires both branches to return the same shardings, so each result is constrained.

    def _flows(self, x: jax.Array) -> jax.Array:
        return scope.constrain(x, *self.staged.stream)

    def _after(self, x: jax.Array, *numbers: jax.Array) -> tuple[jax.Array, ...]:
        """The numbers, known only once x is.

        XLA on CPUs may start a collective that stands behind a branch before those in the branch, in an order
        that differs by device, and then all wait for ever. What depends on the branch's result cannot.
        """
        if not self.waits:
            return numbers
        zero = lambda x: (x.reshape(-1)[0] > 0).astype(jnp.int32) >> 1  # which XLA does not see
        zero = scope.max_over_replicas(scope.blockwise(zero, (self.staged.stream,), ())(x))
        return tuple(number + zero for number in numbers)

    def _input(self, kept: jax.Array, chunk: jax.Array, microbatch: jax.Array) -> jax.Array:
        return jax.lax.cond(
            (microbatch >= 0) & self._is_first(chunk),
            lambda: self._flows(self.enter(self.others, microbatch)),
            lambda: self._flows(kept),
        )

    # What is kept is read outside of the branches: a buffer that goes into one is copied.

    def forward(
        self,
        carry: Carry,
        row: schedules.BufferedTable,
        now: schedules.BufferedTable,
        nothing: jax.Array,
    ) -> tuple[jax.Array, PyTree]:
        """(what goes to the next stage, states); row: the tick of all stages, now: of this one. That of
        the last one is part of its backward.
        """
        kept = pick(carry.inputs, now.forward_x)
        x = self._input(kept, now.forward_chunk, now.forward)
        number, microbatch, some = self._after(x, now.forward_chunk, now.forward, row.forward.max())
        runs = (microbatch >= 0) & ~self._is_last(number)

        def run() -> tuple[jax.Array, PyTree]:
            chunk = [pick(w, number) for w in self.chunks]
            y, _, _, state = self.through(chunk, x, carry.states, number, microbatch)
            return self._flows(y), after(carry.states, state, number, microbatch, runs)

        rest = lambda: (self._flows(nothing), carry.states)
        return jax.lax.cond(some >= 0 if self.together else runs, run, rest)

    def backward(
        self,
        carry: Carry,
        row: schedules.BufferedTable,
        now: schedules.BufferedTable,
        nothing: jax.Array,
        y: jax.Array,
    ) -> tuple[Any, PyTree, PyTree, jax.Array]:
        """(gradients, sums, states, cotangent for the previous stage); rematerialises the chunk.

        y: output of the same tick's forward, which runs first. The gradients of head and embedding are each
        taken inside a branch, so that no array of the size of the logits leaves it.
        """
        kept = pick(carry.inputs, now.backward_x)
        at = self._after(y, now.backward_chunk, now.backward, row.backward.max())
        x = self._input(kept, *at[:2])
        number, microbatch, some = self._after(x, *at)
        runs = microbatch >= 0
        is_first, is_last = runs & self._is_first(number), runs & self._is_last(number)
        arrived = pick(carry.gradients, now.backward_ct)
        placed = lambda others: self.parts.placed(carry.grads[0], others)[1]

        def layers(chunk: list[jax.Array], x: jax.Array) -> Any:
            y, total, *told = self.through(chunk, x, carry.states, number, microbatch)
            return (y, total), told

        def run() -> tuple[Any, PyTree, PyTree, jax.Array]:
            of_chunks, of_others = carry.grads
            chunk = [pick(w, number) for w in self.chunks]
            (y, total), pull, (told, state) = jax.vjp(layers, chunk, x, has_aux=True)

            def head() -> tuple[jax.Array, list[jax.Array], PyTree]:
                loss = lambda others, y: self.leave(others, y, microbatch)
                total, pull, sums = jax.vjp(loss, self.others, y, has_aux=True)
                grads, above = pull(jnp.ones_like(total))
                return self._flows(above), placed(added(of_others, grads)), added(carry.sums, sums)

            above, of_others, sums = jax.lax.cond(
                is_last, head, lambda: (self._flows(arrived), placed(of_others), carry.sums)
            )
            grads, below = self._pulled(pull, above, jnp.ones_like(total))

            def embedding() -> list[jax.Array]:
                _, pull = jax.vjp(lambda others: self.enter(others, microbatch), self.others)
                return placed(added(of_others, pull(below)[0]))

            of_others = jax.lax.cond(is_first, embedding, lambda: placed(of_others))
            if self.together:
                grads, told = where(runs, (grads, told), zeros((grads, told)))
            of_chunks = [
                put(sum_, pick(sum_, number) + new, number)
                for sum_, new in zip(of_chunks, grads, strict=True)
            ]
            grads = self.parts.placed(of_chunks, of_others)
            states = after(carry.states, state, number, microbatch, is_last)
            return grads, added(sums, told), states, self._flows(below)

        def rest() -> tuple[Any, PyTree, PyTree, jax.Array]:
            return self.parts.placed(*carry.grads), carry.sums, carry.states, self._flows(nothing)

        return jax.lax.cond(some >= 0 if self.together else runs, run, rest)

    def _pulled(self, pull: Callable[..., Any], above: jax.Array, one: jax.Array) -> Any:
        """The layers' gradients, computed after the head's and available together."""
        run = lambda: pull((above, one))
        if not self.waits:
            return run()
        (when,) = self._after(above, jnp.int32(0))
        return jax.lax.cond(when >= 0, run, lambda: zeros(jax.eval_shape(run)))

    def start(self, model_state: PyTree, num_inputs: int, num_gradients: int) -> Carry:
        """Before the first tick."""
        chunks = jax.tree.map(
            lambda s: s.reshape(self.table.virtual, -1, *s.shape[1:]), model_state
        )
        states = jax.tree.map(
            lambda s: jnp.broadcast_to(s, (self.table.microbatches + 1, *s.shape)),
            exchanged(chunks, self.table, back=False),
        )
        at = jnp.int32(0)

        def ends() -> tuple[jax.Array, PyTree]:
            x = self.enter(self.others, at)
            _, _, told, _ = self.through([w[0] for w in self.chunks], x, states, at, at)
            return x, self.leave(self.others, x, at)[1] | told

        x, sums = jax.eval_shape(ends)
        slots = lambda num: scope.constrain(
            jnp.zeros((num, *x.shape), x.dtype), None, *self.staged.stream
        )
        grads = self.parts.placed(*zeros((self.chunks, self.others)))
        nothing = scope.mapped(zeros(x))
        sent = nothing, nothing
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
        nothing, num = start.sent[0], self.table.stages
        up = [(i, (i + 1) % num) for i in range(num if self.table.virtual > 1 else num - 1)]

        def tick(carry: Carry, row: schedules.BufferedTable) -> tuple[Carry, None]:
            now = jax.tree.map(lambda x_S: pick(x_S, self.index), row)
            # Written first, read later: the other way round XLA would copy the buffers in every tick.
            carry = carry._replace(
                inputs=put_if(carry.inputs, carry.sent[0], now.x_to),
                gradients=put_if(carry.gradients, carry.sent[1], now.ct_to),
            )
            y, states = self.forward(carry, row, now, nothing)
            carry = carry._replace(states=states)
            grads, sums, states, below = self.backward(carry, row, now, nothing, y)
            # Outside every branch: all stages exchange at every tick.
            down = [(j, i) for i, j in up]
            sent = jax.lax.ppermute(y, STAGE, up), jax.lax.ppermute(below, STAGE, down)
            return carry._replace(grads=grads, sums=sums, states=states, sent=sent), None

        done, _ = jax.lax.scan(tick, start, jax.tree.map(jnp.asarray, program))
        of_chunks, of_others = done.grads
        last = jax.tree.map(lambda s: s[-1], done.states)
        of_chunks, last = exchanged((of_chunks, last), self.table, back=True)
        of_stack, model_state = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (of_chunks, last)
        )
        if axes:
            of_stack = jax.lax.psum(of_stack, axes)
        # Over the stages too: a tied embedding has a part of its gradient on two.
        everywhere = (*axes, STAGE)
        of_others = jax.lax.psum(of_others, everywhere)
        sums = jax.lax.psum(done.sums, everywhere)
        return self.parts.join(of_stack, of_others), sums, model_state
