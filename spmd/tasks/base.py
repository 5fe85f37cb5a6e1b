"""The base of tasks: a model, its loss as sums with global weights, its metrics."""

# B batch, C classes, T time, D embed, V vocab

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd.core import tree
from spmd.core.batches import Ids
from spmd.core.fields import check
from spmd.models.functional import FunctionalModel
from spmd.parallel import scope

Batch = Mapping[str, jax.Array]
PyTree = Any
Sums = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight)
Notes = dict[str, tuple[jax.Array, jax.Array]]  # name -> ([B], its weights)
FROZEN = "frozen"  # where in the model state parameters lie that are not trained


class Staged(NamedTuple):
    """A training loss in parts, for a pipeline. params: a tree in which stacked leaves may hold only some of
    the layers; enter and leave read none of these, through reads no others. The model state is of layers too,
    each of its leaves stacked.

    enter: (params, batch, step_key) -> x, what the first layer reads.
    through: (params, state, x, batch, step_key, first, scale) -> (x behind these layers, scaled sum, Sums,
      their new state); first: the number of the first.
    leave: (params, x, batch, step_key, scale) -> (scaled sum, Sums).
    stream: logical dims of x.
    """

    enter: Callable[..., jax.Array]
    through: Callable[..., tuple[jax.Array, jax.Array, Sums, PyTree]]
    leave: Callable[..., tuple[jax.Array, Sums]]
    stream: tuple[str, ...]


def _unstaged() -> Staged:
    raise ValueError(
        "mesh.stage cuts layers, and this task does not say what they are; use --mesh.stage 1"
    )


class Task(NamedTuple):
    """Pure functions over plain dicts; what a strategy is handed.

    init: key -> (params, model_state). dims: logical dims by parameter name, None where there are none.
    coefficients: the factor of each loss term.
    weigh: batch -> the weight of each loss term, as wide as the parameters: 1 / weight must round to the same
      whatever is divided first; depends on the batch only, is summed over the devices.
    loss: (params, model_state, batch, step_key, scale) -> (scaled sum, (Sums, model_state)),
      scale = coefficient / global weight for each term, known before the backward pass.
    evaluate: (params, model_state, batch) -> Sums.
    predict: (params, model_state, batch) -> logits.
    ranges: (shapes of a batch, of its logits) -> the range of each feature that holds indices; ValueError,
      with the shapes, for those that the task does not take.
    call: (params, model_state, fn) -> fn(module), as in evaluation; for what a model does beside (decoding).
    whole_batch: layers that take statistics over the batch they see; only a jitted whole batch is right.
    state_dims: logical dims of what in the model state is cut as parameters are; the rest lies whole on
      every device.
    plain: (params, model_state) -> those of the model itself, where the task trains something else.
    staged: () -> the loss in parts; ValueError, by name, for a model that is no stack of layers.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    dims: dict[str, tuple[str, ...] | None]
    coefficients: dict[str, float]
    weigh: Callable[[Batch], dict[str, jax.Array]]
    loss: Callable[..., tuple[jax.Array, tuple[Sums, PyTree]]]
    evaluate: Callable[[PyTree, PyTree, Batch], Sums]
    predict: Callable[[PyTree, PyTree, Batch], jax.Array]
    call: Callable[..., Any]
    whole_batch: tuple[str, ...] = ()
    state_dims: Mapping[str, tuple[str | None, ...] | None] = MappingProxyType({})
    ranges: Callable[[Any, Any], dict[str, Ids]] = lambda batch, logits: {}
    plain: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] = lambda params, state: (params, state)
    staged: Callable[[], Staged] = _unstaged

    def scale(self, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """coefficient / global weight; 0 where a term has no weight in this batch."""
        return {
            term: jnp.where(w > 0, self.coefficients[term] / jnp.where(w > 0, w, 1), 0)
            for term, w in weights.items()
        }


PARTS = ("enter", "through", "leave", "logits", "stream")


def stages_of(
    net: FunctionalModel,
    inputs: Callable[[Batch], Any],
    finish: Callable[..., tuple[jax.Array, Sums]],
) -> Staged:
    """The loss in parts, of a module with PARTS: methods, and stream, the logical dims of what flows between
    them. finish: (module, x, batch, scale) -> (scaled sum, Sums), x being what the head reads.
    """
    kind = f"{net.kind.__module__}.{net.kind.__qualname__}"
    missing = [name for name in PARTS if not hasattr(net.kind, name)]
    check(
        not missing,
        f"mesh.stage cuts a stack of equal layers, and {kind} is none: it has no"
        f" {', '.join(missing)}; use spmd.models.transformer, spmd.models.mlp with model.stacked, or"
        " --mesh.stage 1",
    )
    unstacked = [name for name, dims in net.state_dims.items() if (dims or ("",))[0] != "layers"]
    check(
        not unstacked,
        f"mesh.stage: {kind} keeps a state that is not of its layers (batch statistics), which a pipeline"
        f" does not carry: {', '.join(unstacked)}; use --mesh.stage 1",
    )
    _, unread = jax.eval_shape(net.init, jax.random.key(0))

    def enter(params, batch, step_key):
        with training(batch, step_key):
            return net.call(params, unread, lambda m: m.enter(*inputs(batch)), train=True)[0]

    def through(params, state, x, batch, step_key, first, scale):
        notes: Notes = {}
        run = lambda module: module.through(x, *inputs(batch), first=first)
        with training(batch, step_key), scope.bind(notes=notes):
            x, state = net.call(params, state, run, train=True)
        sums = noted_sums(notes, batch)
        return x, scaled_loss(sums, scale), sums, state

    def leave(params, x, batch, step_key, scale):
        run = lambda module: finish(module, module.leave(x), batch, scale)
        with training(batch, step_key):
            return net.call(params, unread, run, train=True)[0]

    return Staged(enter, through, leave, net.kind.stream)


def training(batch: Batch, step_key: jax.Array) -> contextlib.AbstractContextManager[Any]:
    """The scope of a training step's forward pass: a key and a weight for each example."""
    keys_B = scope.example_keys(step_key, batch["example_id"])
    return scope.bind(keys=keys_B, weight=batch["weight"], calls=0)


def noted_sums(notes: Notes, batch: Batch) -> Sums:
    """Sums over the examples of the values that layers noted."""
    wide = lambda x_B: x_B.astype(tree.at_least_float32(x_B.dtype))
    total = lambda x_B: jnp.sum(wide(x_B) * batch["weight"].astype(wide(x_B).dtype))
    return {name: (total(value_B), total(weight_B)) for name, (value_B, weight_B) in notes.items()}


def scaled_loss(sums: Sums, scale: Mapping[str, jax.Array]) -> jax.Array:
    """The loss: each of its terms by its factor; a part of the model has some of them."""
    terms = [term for term in scale if term in sums]
    total = jnp.zeros((), sums[terms[0]][0].dtype if terms else scale["loss"].dtype)
    for term in terms:
        total += sums[term][0] * scale[term].astype(total.dtype)
    return total
