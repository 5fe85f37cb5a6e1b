"""The base of metrics: sums on the devices, values on the host.

A metric is a frozen dataclass, compared by value. `sums` is traced; what it returns is added over the batches
of an evaluation, integers in int64 and floats in float64, and `compute` makes values of the totals. So a
metric is equal on every mesh, evaluation batch size and process count.
"""

# B batch

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spmd.core import tree
from spmd.core.fields import check

Batch = Mapping[str, jax.Array]
Weights = Mapping[str, jax.Array]  # loss term -> [B, ...]: how much each of its elements counts
Sums = dict[str, jax.Array]
Values = dict[str, float | None]
ARRAYS = jax.Array | np.ndarray | np.generic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A measure of a task's outputs against its batch.

    An element counts by the weight that the task gives it in the loss; padding weighs 0.
    """

    name: str
    term: str = "loss"
    """Loss term whose weights say what counts."""
    output: str = ""
    """Entry of the outputs to read, where they are a dict."""

    def sums(self, outputs: Any, batch: Batch, weights: Weights) -> Sums:
        """The sums of one batch, plain arrays whose shapes do not depend on the batch.

        Args:
          outputs: the array that `select` picked.
          batch: the features, each [B, ...].
          weights: {term: [B, ...]}, the example's weight included.
        """
        raise NotImplementedError

    def select(self, outputs: Any) -> Any:
        """The outputs that this metric reads; ValueError for an entry that there is not."""
        if not self.output:
            return outputs
        check(
            isinstance(outputs, Mapping) and self.output in outputs,
            f"metric {self.name!r} reads output {self.output!r}; the model's outputs are"
            f" {', '.join(outputs) if isinstance(outputs, Mapping) else 'no dict'}",
        )
        return outputs[self.output]

    def compute(self, sums: Mapping[str, np.ndarray]) -> float | Values | None:
        """The value of the totals, or several by name; None where nothing counted."""
        raise NotImplementedError

    def counted(self, weights: Weights, shape: tuple[int, ...]) -> jax.Array:
        """The elements that have a weight.

        Args:
            weights: {term: [B, ...]}, as `sums` takes them.
            shape: of the values.

        Returns:
            int32 of `shape`: 1 where an element has a weight, else 0.
        """
        return (self.weight(weights, shape) > 0).astype(jnp.int32)

    def weight(self, weights: Weights, shape: tuple[int, ...]) -> jax.Array:
        """The weights of this metric's term.

        Args:
            weights: {term: [B, ...]}, as `sums` takes them.
            shape: of the values.

        Returns:
            [B, ...] of `shape`.

        Raises:
            ValueError: the task has no such term, or its weights are of another shape.
        """
        check(
            self.term in weights,
            f"metric {self.name!r} reads the weights of term {self.term!r}; the task has:"
            f" {', '.join(weights)}",
        )
        weight = weights[self.term]
        check(
            weight.shape == shape,
            f"metric {self.name!r} has values of shape {list(shape)} and its weights (term"
            f" {self.term!r}) are {list(weight.shape)}: they must be the same",
        )
        return weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean(Metric):
    """The mean of a value that each element has; a subclass says which.

    Only such metrics can be logged in training, where a step's sums stay on the devices.
    """

    def values(self, outputs: Any, batch: Batch) -> jax.Array:
        """The value of each element.

        Args:
            outputs: the array that `select` picked.
            batch: the features, each [B, ...].

        Returns:
            [B, ...] of the shape of the weights.
        """
        raise NotImplementedError

    def sums(self, outputs: Any, batch: Batch, weights: Weights) -> Sums:
        """Sum and weight of the values."""
        values = self.values(outputs, batch)
        values = values.astype(tree.at_least_float32(values.dtype))
        weight = self.weight(weights, values.shape).astype(values.dtype)
        return {"sum": jnp.sum(values * weight), "weight": weight.sum()}

    def compute(self, sums: Mapping[str, np.ndarray]) -> float | None:
        """Sum / weight."""
        return ratio(sums["sum"], sums["weight"])


def ratio(total: Any, weight: Any) -> float | None:
    """total / weight; None where nothing has a weight."""
    return float(total) / float(weight) if float(weight) > 0 else None


# ---- over the batches of an evaluation


def measure(metric: Metric, outputs: Any, batch: Batch, weights: Weights) -> Sums:
    """The sums of one batch.

    Args:
        metric: whose sums.
        outputs: of the model.
        batch: the features, each [B, ...].
        weights: {term: [B, ...]}, the example's weight included.

    Returns:
        {name: array}.

    Raises:
        ValueError: `sums` returned something else.
    """
    sums = metric.sums(metric.select(outputs), batch, weights)
    right = isinstance(sums, Mapping) and all(isinstance(x, ARRAYS) for x in sums.values())
    check(
        right,
        f"metric {metric.name!r}: sums() returned {_described(sums)}; it returns {{name: array}}, which are"
        " added over batches",
    )
    return {**sums}


def _described(sums: Any) -> str:
    if not isinstance(sums, Mapping):
        return type(sums).__name__
    return ", ".join(f"{name}: {type(x).__name__}" for name, x in sums.items())


def add_sums(total: Any, sums: Any) -> Any:
    """Add two trees of host arrays, integers in int64, floats in float64.

    Args:
        total: the sums of the batches before, {metric: {name: array}}.
        sums: those of a batch.

    Returns:
        Their sum.

    Raises:
        ValueError: the sums of a metric have other names or shapes than those before.
    """
    for name in sums:
        before, now = (
            {k: list(np.shape(x)) for k, x in jax.tree_util.tree_leaves_with_path(part[name])}
            for part in (total, sums)
        )
        check(
            before == now,
            f"metric {name!r}: sums() returned arrays of shapes {[*now.values()]}, and of"
            f" {[*before.values()]} for the batch before: they must not depend on the batch",
        )

    def add(x: Any, y: Any) -> np.ndarray:
        kind = np.int64 if np.issubdtype(np.asarray(y).dtype, np.integer) else np.float64
        return np.asarray(x, kind) + np.asarray(y, kind)

    return jax.tree.map(add, total, sums)


def check_metrics(metrics: Iterable[Metric], terms: Iterable[str]) -> None:
    """ValueError for two metrics of one name, or one of a term's. terms: names of loss terms."""
    names = [m.name for m in metrics]
    twice = {name for name in names if names.count(name) > 1} | {n for n in names if n in [*terms]}
    check(not twice, f"two metrics or loss terms are called {', '.join(sorted(twice))}: rename one")


def compute_values(
    metrics: Iterable[Metric], totals: Mapping[str, Mapping[str, np.ndarray]]
) -> Values:
    """The values of all totals: of each metric its own, of other names the mean of `sum` over `weight`.

    Args:
        metrics: those that compute their values.
        totals: {metric or loss term: {name: array}}.

    Returns:
        {name: value}, None where nothing counted.
    """
    by_name = {metric.name: metric for metric in metrics}
    values: Values = {}
    for name, sums in totals.items():
        metric = by_name.get(name)
        value = metric.compute(sums) if metric else ratio(sums["sum"], sums["weight"])
        new = value if isinstance(value, dict) else {name: value}
        twice = sorted(new.keys() & values.keys())
        check(not twice, f"two metrics give a value named {', '.join(twice)}: rename one")
        values |= new
    return values
