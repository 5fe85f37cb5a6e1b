"""An Objective: a task and a model as pure functions, which strategies differentiate."""

# B batch

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd.core.batches import Ids
from spmd.parallel import tables
from spmd.parallel.tables import SparseTable
from spmd.tasks.combine import Combine
from spmd.tasks.picture import Picture

Batch = Mapping[str, jax.Array]
PyTree = Any
Sums = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight)
MetricSums = dict[str, dict[str, jax.Array]]  # metric -> its sums
Notes = dict[str, tuple[jax.Array, jax.Array]]  # name -> ([B], its weights)
FROZEN = "frozen"  # where in the model state parameters are that are not trained
VARIABLES = "task"  # where in the parameters those of the task itself are


class Staged(NamedTuple):
    """A training loss in parts, for a pipeline.

    params: a tree in which the stacked leaves of one stack may hold only some of its layers; enter, between
    and leave read none of these, through reads no others. Each leaf of the model state belongs to the layers
    of a stack and is stacked.

    enter: (params, batch, step_key) -> x, the stream into the first layer: a pytree of fixed shapes.
    between: (params, x, batch, step_key, stack) -> x into a further stack, from that out of the one before;
      None where a model does nothing there.
    through: (params, state, x, batch, step_key, chunk, scale) -> (x behind these layers, scaled sum, Sums,
      their new state); chunk: (index of the stack, number of its first layer).
    leave: (params, x, batch, step_key, scale) -> (scaled sum, Sums).
    stream: logical dims of x. stacks: the stacks of layers in order, as models.stack.LayerStack.
    read_frozen: (state, microbatches) -> (state of the frozen models, the rest of the state, the microbatches
      with the outputs of these models).
    """

    enter: Callable[..., PyTree]
    between: Callable[..., PyTree] | None
    through: Callable[..., tuple[PyTree, jax.Array, Sums, PyTree]]
    leave: Callable[..., tuple[jax.Array, Sums]]
    stream: PyTree
    stacks: tuple[Any, ...]
    read_frozen: Callable[..., tuple[PyTree, PyTree, PyTree]]


def _unstaged() -> Staged:
    raise ValueError(
        "mesh.stage splits a stack of layers, and this task does not say what they are; use --mesh.stage 1"
    )


class Objective(NamedTuple):
    """Pure functions over plain dicts; the input of a strategy.

    init: key -> (params, model_state). dims: logical dims by parameter name, None where there are none.
    coefficients: the factor of each loss term; their sum is minimised, and logged as in `loss_of`.
    weigh: batch -> the weight of each loss term, in the parameters' precision: 1 / weight must round to the
      same number whatever is divided first; depends on the batch only, is summed over the devices.
    loss: (params, model_state, batch, step_key, scale) -> (scaled sum, (Sums, model_state)),
      scale = coefficient / global weight for each term, known before the backward pass.
    evaluate: (params, model_state, batch) -> {metric: {name: array}}, to be added over batches.
    measured: totals of `evaluate`, as numpy arrays -> {metric: value}, None where nothing counted.
    predict: (params, model_state, batch) -> the outputs.
    ranges: (shapes of a batch, of its outputs) -> the range of each feature that holds indices; ValueError,
      with the shapes, for those that the task does not take.
    call: (params, model_state, fn) -> fn(module), as in evaluation; for what a model does beside (decoding).
    whole_batch: layers that take statistics over the batch they see; only a jitted whole batch is right.
    state_dims: logical dims of the parts of the model state that are sharded as parameters are; the rest is
      replicated.
    plain: (params, model_state) -> those of the model itself, where more, or something else, is trained.
    combine: how the gradients of the loss terms become one; None adds the terms before the backward pass.
    initial: the frozen models that are the trained one as it starts.
    tables: the sparse tables of the model; what they give a batch is read as batch["rows/FEATURE"].
    row_dtype: type of their rows.
    staged: () -> the loss in parts; ValueError, by name, for a model that is no stack of layers.
    picture: (batch, outputs) as numpy arrays -> how they are drawn; None where they are not.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    dims: dict[str, tuple[str | None, ...] | None]
    coefficients: dict[str, float]
    weigh: Callable[[Batch], dict[str, jax.Array]]
    loss: Callable[..., tuple[jax.Array, tuple[Sums, PyTree]]]
    evaluate: Callable[[PyTree, PyTree, Batch], dict[str, dict[str, jax.Array]]]
    measured: Callable[[Mapping[str, Any]], dict[str, float | None]]
    predict: Callable[[PyTree, PyTree, Batch], Any]
    call: Callable[..., Any]
    whole_batch: tuple[str, ...] = ()
    state_dims: Mapping[str, tuple[str | None, ...] | None] = MappingProxyType({})
    ranges: Callable[[Any, Any], dict[str, Ids]] = lambda batch, outputs: {}
    plain: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] = lambda params, state: (params, state)
    combine: Combine | None = None
    initial: tuple[str, ...] = ()
    tables: Mapping[str, SparseTable] = MappingProxyType({})
    row_dtype: Any = jnp.float32
    staged: Callable[[], Staged] = _unstaged
    picture: Callable[[Any, Any], Picture | None] = lambda batch, outputs: None

    @property
    def num_gradients(self) -> int:
        """Gradients that a step takes: one, or one for each loss term."""
        return 1 if self.combine is None else len(self.coefficients)

    def with_rows(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The shapes of a batch, with those of the rows that it looks up."""
        return {**batch, **tables.row_shapes(self.tables, batch, self.row_dtype)}

    def scale(self, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """coefficient / global weight.

        Args:
            weights: {term: []}, summed over all devices.

        Returns:
            {term: []}, 0 where a term has no weight in this batch.
        """
        return {
            term: jnp.where(w > 0, self.coefficients[term] / jnp.where(w > 0, w, 1), 0)
            for term, w in weights.items()
        }

    def loss_of(self, means: Mapping[str, Any]) -> Any:
        """The loss that is logged, as `total_loss`."""
        return total_loss(self.coefficients, means)


def is_frozen(name: str) -> bool:
    """Whether a top-level part of the model state holds parameters that are not trained."""
    return name == FROZEN or name.startswith(f"{FROZEN}/")


def total_loss(coefficients: Mapping[str, float], means: Mapping[str, Any]) -> Any:
    """The loss that is logged: the term `loss`, or without one the sum that is minimised.

    Args:
      coefficients: the factor of each term.
      means: by name, those of all terms; None for a term that nothing weighs, which adds nothing.
    """
    if "loss" in coefficients:
        return means["loss"]
    parts = [c * means[term] for term, c in coefficients.items() if means[term] is not None]
    return sum(parts[1:], parts[0]) if parts else None


def scaled_loss(sums: Sums, scale: Mapping[str, jax.Array]) -> jax.Array:
    """The sum of the loss terms, each times its factor.

    Args:
        sums: of the terms that this part of the model has, and of metrics.
        scale: {term: []}, the factor of each term.

    Returns:
        [].
    """
    terms = [term for term in scale if term in sums]
    total = jnp.zeros((), sums[terms[0]][0].dtype if terms else next(iter(scale.values())).dtype)
    for term in terms:
        total += sums[term][0] * scale[term].astype(total.dtype)
    return total
