"""The base of tasks: what a user writes, and how it becomes an Objective."""

# B batch

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from spmd.core import batches
from spmd.core.batches import Ids
from spmd.core.fields import check
from spmd.metrics import Metric, measure
from spmd.tasks.combine import Combine
from spmd.tasks.objective import Batch, MetricSums, Objective
from spmd.tasks.picture import Picture, beside_truth
from spmd.tasks.tracing import Tracer


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenModel:
    """A model that a task reads and does not train: a teacher, a reference policy."""

    model: tyro.conf.Suppress[Any] = None
    """Config of the model, as an experiment's; None is the trained model as it starts."""
    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Weights, as init.from: a run's directory, one step of it, or safetensors; without, random ones."""

    def __post_init__(self) -> None:
        check(
            self.model is not None or not self.from_,
            f"from={self.from_!r}: a frozen model that is the trained one as it starts has its weights",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """The base of tasks: the inputs of a model, the loss of each element, the metrics.

    A subclass is a frozen dataclass, its fields the settings. The base does the rest for every strategy: it
    opens the scope, multiplies by the example's weight along the batch dim, sums, divides by the global
    weight before the backward pass, collects what layers note, evaluates, predicts, and gives a pipeline its
    parts.
    """

    metrics: ClassVar[tuple[Metric, ...]] = ()
    """Measures of an evaluation beside the loss terms; a property where fields decide."""
    train_metrics: ClassVar[tuple[str, ...]] = ()
    """Names of those that training logs too: each a metrics.Mean."""
    combine: ClassVar[Combine | None] = None
    """How the gradients of the loss terms, each taken by itself, become one; None adds the terms before the
    backward pass. A property where fields decide."""
    frozen: ClassVar[Mapping[str, FrozenModel]] = MappingProxyType({})
    """Models beside the trained one, by name; `values` finds their outputs as batch["frozen/NAME"]."""

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """The arguments of the model; by default the feature that the field `input` names.

        The base then casts floats to the parameters' precision, and scales uint8 to [0, 1]: a task whose
        bytes are indices casts them to int32.
        """
        name = getattr(self, "input", "")
        check(
            isinstance(name, str) and bool(name),
            f"task {type(self).__name__} does not say what its model reads: give it a field `input`, or a"
            " method inputs(batch)",
        )
        return (batches.feature(batch, name),)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """{term: [B, ...]}: how much each loss value counts; read from the batch alone.

        The base multiplies by the example's weight. By default one loss for each example.
        """
        weight_B = batches.feature(batch, "weight")
        return {"loss": jnp.ones(weight_B.shape, weight_B.dtype)}

    def values(self, outputs: Any, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
        """The loss of each element.

        Args:
            outputs: of the model.
            batch: the features; the outputs of frozen models as `frozen/NAME`, variables as `task/NAME`.
            train: whether a training step asks, not an evaluation.

        Returns:
            {term: [B, ...]}, of the shape of its weights.
        """
        raise NotImplementedError(f"task {type(self).__name__} has no method values")

    def coefficients(self, model: Any) -> dict[str, float]:
        """The factor of each loss term, those that the model notes (balance) included."""
        return {"loss": 1.0, **getattr(model, "losses", {})}

    def variables(self, rngs: nnx.Rngs) -> dict[str, jax.Array]:
        """Trained parameters of the task itself (a temperature, uncertainty weights), replicated."""
        return {}

    def read_frozen(self, name: str, model: Any, batch: Batch) -> Any:
        """The outputs of a frozen model, in `values` as batch["frozen/NAME"]; by default of `inputs`.

        Args:
            name: of the model.
            model: called with inputs.
            batch: the features.
        """
        return model(*self.inputs(batch))

    def ranges(self, batch: Any, outputs: Any, model: Any) -> dict[str, Ids]:
        """The range of each feature that holds indices; ValueError for shapes that the task does not take.

        batch, outputs: arrays, or their shapes. model: its config.
        """
        return {}

    def sums(
        self, model: Any, batch: Batch, *, hidden: jax.Array | None = None, train: bool
    ) -> tuple[dict[str, jax.Array], MetricSums]:
        """The sums of a batch.

        Overridden by a task that cannot hold all its outputs, or that calls its model twice; the latter
        cannot be pipelined.

        Args:
            model: called with the inputs.
            batch: as `values` takes it.
            hidden: [B, ...] the input of model.logits, where a pipeline has computed it already.
            train: as `values` takes it.

        Returns:
            {term: []} the sum of each loss term, and the sums of each metric.
        """
        outputs = model(*self.inputs(batch)) if hidden is None else model.logits(hidden)
        return self.sums_of(outputs, batch, self.counted(batch), train=train)

    def predict(self, model: Any, batch: Batch) -> Any:
        """The outputs for a batch, each [B, ...]."""
        return model(*self.inputs(batch))

    def picture(self, batch: Mapping[str, np.ndarray], outputs: Any) -> Picture | None:
        """Predictions beside their truth, drawn at evaluations (log.pictures); None draws nothing.

        By default those of `label` or `target`. batch, outputs: numpy arrays [N, ...], the features and what
        `predict` gave for them.
        """
        return beside_truth(self, batch, outputs)

    # ---- what the base does

    def build(self, model: Any, param_dtype: str = "float32") -> Objective:
        """The objective of training `model` (a config with build(rngs), or an NNX module class)."""
        return Tracer(self, model, param_dtype).objective()

    def counted(self, batch: Batch) -> dict[str, jax.Array]:
        """{term: [B, ...]}: the weights, times the example's weight."""
        example_B = batches.feature(batch, "weight")

        def times_example(term: str, weight: jax.Array) -> jax.Array:
            check(
                weight.ndim > 0 and weight.shape[0] == example_B.shape[0],
                f"task {type(self).__name__}: the weights of term {term!r} are of shape"
                f" {list(weight.shape)}; their first dim must be the batch, {example_B.shape[0]}",
            )
            by_row = example_B.reshape(-1, *(1,) * (weight.ndim - 1))
            return weight * by_row.astype(weight.dtype)

        return {term: times_example(term, w) for term, w in self.weights(batch).items()}

    def sums_of(
        self, outputs: Any, batch: Batch, counted: Mapping[str, jax.Array], *, train: bool
    ) -> tuple[dict[str, jax.Array], MetricSums]:
        """As `sums`, from the outputs of some elements.

        Args:
            outputs: of the model.
            batch: as `values` takes it.
            counted: {term: [B, ...]} the weights of these elements, times the example's weight.
            train: as `values` takes it.

        Returns:
            As `sums`.
        """
        values = self.values(outputs, batch, train=train)
        self._check_values(values, counted)
        totals = {term: jnp.sum(v * counted[term].astype(v.dtype)) for term, v in values.items()}
        measured = [m for m in self.metrics if not train or m.name in self.train_metrics]
        return totals, {m.name: measure(m, outputs, batch, counted) for m in measured}

    def _check_values(self, values: Mapping[str, Any], counted: Mapping[str, Any]) -> None:
        """ValueError unless each term has a value and a weight, of one shape."""
        name = type(self).__name__
        check(
            values.keys() == counted.keys(),
            f"task {name}: values() has the terms {', '.join(values)}, and weights() {', '.join(counted)}:"
            " they must be the same",
        )
        for term, value in values.items():
            check(
                value.shape == counted[term].shape,
                f"task {name}: the values of term {term!r} are of shape {list(value.shape)} and its weights"
                f" of {list(counted[term].shape)}: they must be the same",
            )
