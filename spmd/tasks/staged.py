"""A training loss in parts, for a pipeline: of a model whose layers are stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from spmd.core.fields import check
from spmd.models.functional import FunctionalModel
from spmd.models.stack import Chunk
from spmd.parallel import scope
from spmd.parallel.follows import resolve_dims
from spmd.tasks.bound import cast_inputs, sum_notes, training, without
from spmd.tasks.objective import VARIABLES, Batch, Notes, PyTree, Staged, Sums, scaled_loss

if TYPE_CHECKING:
    from spmd.tasks.tracing import Tracer

# What a module has that can be a pipeline. enter, through and leave return the stream into the first layer,
# behind some layers (a models.stack.Chunk), and what `logits` takes; the optional `between` returns it into a
# further stack. stream: its logical dims. stacks: a models.stack.LayerStack for each stack of layers.
PARTS = ("enter", "through", "leave", "logits", "stream", "stacks")


def stages_of(tracer: Tracer) -> Staged:
    """The loss in parts, of a module with PARTS; ValueError, by name, for what a pipeline cannot carry."""
    net: FunctionalModel = tracer.net
    check_stages(net)
    _, unread = jax.eval_shape(net.init, jax.random.key(0))
    inputs = lambda batch: cast_inputs(tracer.task.inputs(batch), tracer.real)

    def call(params: PyTree, state: PyTree, run: Callable[[Any], Any]) -> tuple[Any, PyTree]:
        return net.call(without(params, VARIABLES), state, run, train=True)

    def enter(params, batch, step_key):
        with training(batch, step_key):
            return call(params, unread, lambda m: m.enter(*inputs(batch)))[0]

    def between(params, x, batch, step_key, stack):
        run = lambda module: module.between(x, *inputs(batch), stack=net.stacks[stack].name)
        with training(batch, step_key):
            return call(params, unread, run)[0]

    def through(params, state, x, batch, step_key, chunk, scale):
        notes: Notes = {}
        stack, first = chunk
        of = Chunk(net.stacks[stack].name, first)
        run = lambda module: module.through(x, *inputs(batch), chunk=of)
        with training(batch, step_key), scope.bind(notes=notes):
            x, state = call(params, state, run)
        sums = sum_notes(notes, batch)
        return x, scaled_loss(sums, scale), sums, state

    def leave(params, x, batch, step_key, scale):
        batch = tracer.with_extras(params, {}, batch)

        def run(module: Any) -> Sums:
            hidden = module.leave(x, *inputs(batch))
            return tracer.sums(module, batch, train=True, hidden=hidden)

        with training(batch, step_key):
            sums = call(params, unread, run)[0]
        return scaled_loss(sums, scale), sums

    def read_frozen(state: PyTree, batch_M: Batch) -> tuple[PyTree, PyTree, Batch]:
        frozen = {name: state[name] for name in tracer.frozen_keys}
        if not frozen:
            return {}, state, batch_M
        # Beside the pipeline, each of them whole: their outputs are features of a microbatch.
        outputs_M = jax.lax.map(lambda batch: tracer.frozen_outputs(frozen, batch), dict(batch_M))
        return frozen, without(state, *frozen), {**batch_M, **outputs_M}

    return Staged(
        enter=enter,
        between=between if hasattr(net.kind, "between") else None,
        through=through,
        leave=leave,
        stream=_resolve(net.kind.stream, net.follows),
        stacks=net.stacks,
        read_frozen=read_frozen,
    )


def check_stages(net: FunctionalModel) -> None:
    """ValueError for a model without PARTS, or with a state that a pipeline does not carry."""
    kind = f"{net.kind.__module__}.{net.kind.__qualname__}"
    missing = [name for name in PARTS if not hasattr(net.kind, name)]
    check(
        not missing,
        f"mesh.stage splits a stack of layers, and {kind} is none: it has no"
        f" {', '.join(missing)}; use spmd.models.transformer, spmd.models.mlp with model.stacked, or"
        " --mesh.stage 1",
    )
    unstacked = [name for name, dims in net.state_dims.items() if (dims or ("",))[0] != "layers"]
    check(
        not unstacked,
        f"mesh.stage: {kind} keeps a state that is not of its layers (batch statistics), which a pipeline"
        f" does not carry: {', '.join(unstacked)}; use --mesh.stage 1",
    )


def _resolve(stream: Any, follows: Mapping[str, str]) -> PyTree:
    """The stream's dims as base dims."""
    is_dims = lambda x: isinstance(x, tuple) and all(d is None or isinstance(d, str) for d in x)
    return jax.tree.map(lambda dims: resolve_dims("stream", dims, follows), stream, is_leaf=is_dims)
