"""Tracing: a task and a model become the pure functions of an Objective."""

# B batch

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from spmd import metrics as metric_kinds
from spmd.core import tree
from spmd.core.fields import check
from spmd.metrics import Mean
from spmd.models.functional import functionalize
from spmd.parallel import scope
from spmd.parallel.tables import id_ranges
from spmd.tasks.bound import BoundModel, sum_notes, training, without
from spmd.tasks.objective import (
    FROZEN,
    VARIABLES,
    Batch,
    MetricSums,
    Notes,
    Objective,
    PyTree,
    Staged,
    Sums,
    scaled_loss,
    total_loss,
)
from spmd.tasks.staged import stages_of

if TYPE_CHECKING:
    from spmd.tasks.base import Task


class Tracer:
    """The pure functions of an Objective, while a task and a model are traced."""

    def __init__(self, task: Task, model: Any, param_dtype: str) -> None:
        self.task, self.model = task, model
        self.net = functionalize(model, param_dtype)
        self.real = tree.at_least_float32(jnp.dtype(param_dtype))
        self.param_dtype = param_dtype
        self.coefficients = task.coefficients(model)
        self.tables = getattr(model, "tables", {})
        models = {name: f.model or model for name, f in task.frozen.items()}
        self.frozen = {name: functionalize(m, param_dtype) for name, m in models.items()}
        self.initial = tuple(name for name, f in task.frozen.items() if f.model is None)
        check(
            bool(self.coefficients),
            f"task {type(task).__name__}: coefficients() names no loss term: {{'loss': 1.0}} is the default",
        )
        metric_kinds.check_metrics(task.metrics, {"loss", *self.coefficients})
        logged = {m.name: m for m in task.metrics if isinstance(m, Mean)}
        unknown = [name for name in task.train_metrics if name not in logged]
        check(
            not unknown,
            f"task {type(task).__name__}: train_metrics names {', '.join(unknown)}; training can log the"
            f" means among its metrics: {', '.join(logged) or 'there are none'}",
        )

    def objective(self) -> Objective:
        """The functions together."""
        state_dims = {}
        for name, net in self.frozen.items():
            state_dims |= {f"{FROZEN}/{name}/params/{n}": dims for n, dims in net.dims.items()}
        variables = jax.eval_shape(lambda: self.task.variables(nnx.Rngs(0)))
        return Objective(
            init=self.init,
            dims=self.net.dims | {f"{VARIABLES}/{name}": None for name in variables},
            coefficients=self.coefficients,
            weigh=self.weigh,
            loss=self.loss,
            evaluate=self.evaluate,
            measured=self.measured,
            predict=self.predict,
            picture=self.task.picture,
            call=lambda params, state, fn: self.net.evaluate(*self.plain(params, state), fn),
            whole_batch=self.net.whole_batch,
            state_dims=state_dims,
            ranges=lambda batch, outputs: {
                **id_ranges(self.tables),
                **self.task.ranges(batch, outputs, self.model),
            },
            plain=self.plain,
            staged=self.staged,
            combine=self.task.combine,
            initial=self.initial,
            tables=self.tables,
            row_dtype=self.real,
        )

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        params, state = self.net.init(key)
        start = {"params": params, "model_state": state}
        fresh = lambda name: jax.random.fold_in(key, zlib.crc32(name.encode()))
        variables = self.task.variables(nnx.Rngs(fresh(VARIABLES)))
        if variables:
            check(VARIABLES not in params, f"the model has a part named {VARIABLES!r}; rename it")
            params |= {VARIABLES: {k: v.astype(self.param_dtype) for k, v in variables.items()}}
        for name, net in self.frozen.items():
            both = dict(zip(("params", "model_state"), net.init(fresh(name)), strict=True))
            state = state | {f"{FROZEN}/{name}": start if name in self.initial else both}
        return params, state

    def plain(self, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        """The parameters and state of the model itself."""
        return without(params, VARIABLES), without(state, *self.frozen_keys)

    @property
    def frozen_keys(self) -> list[str]:
        return [f"{FROZEN}/{name}" for name in self.frozen]

    def weigh(self, batch: Batch) -> dict[str, jax.Array]:
        weights = {term: w.astype(self.real).sum() for term, w in self.task.counted(batch).items()}
        noted = getattr(self.model, "losses", {})
        check(
            weights.keys() == self.coefficients.keys() - noted,
            f"task {type(self.task).__name__}: weights() has the terms {', '.join(weights)}, and"
            f" coefficients() {', '.join(self.coefficients)}: they must be the same, but for those that"
            f" the model notes ({', '.join(noted) or 'none'})",
        )
        return weights | dict.fromkeys(noted, batch["weight"].astype(self.real).sum())

    def loss(
        self, params: PyTree, state: PyTree, batch: Batch, step_key: jax.Array, scale: Any
    ) -> tuple[jax.Array, tuple[Sums, PyTree]]:
        batch = self.with_extras(params, state, batch)
        plain_params, plain_state = self.plain(params, state)
        with training(batch, step_key):
            sums, new = self.net.call(
                plain_params, plain_state, lambda m: self.sums(m, batch, train=True), train=True
            )
        kept = {key: state[key] for key in self.frozen_keys}
        return scaled_loss(sums, scale), (sums, new | kept)

    def evaluate(self, params: PyTree, state: PyTree, batch: Batch) -> MetricSums:
        batch = self.with_extras(params, state, batch)

        def run(module: Any) -> MetricSums:
            notes: Notes = {}
            with scope.bind(notes=notes):
                totals, metrics = self.task.sums(self._bound(module), batch, train=False)
            pairs = self._weighed(totals, batch) | sum_notes(notes, batch)
            return {n: {"sum": s, "weight": w} for n, (s, w) in pairs.items()} | metrics

        return self.net.evaluate(*self.plain(params, state), run)

    def measured(self, totals: Mapping[str, Any]) -> dict[str, float | None]:
        values = metric_kinds.compute_values(self.task.metrics, totals)
        return values | ({"loss": total_loss(self.coefficients, values)} if totals else {})

    def predict(self, params: PyTree, state: PyTree, batch: Batch) -> Any:
        batch = self.with_extras(params, state, batch)
        run = lambda module: self.task.predict(self._bound(module), batch)
        return self.net.evaluate(*self.plain(params, state), run)

    def staged(self) -> Staged:
        """The loss in parts; ValueError, by name, for what a pipeline cannot carry."""
        return stages_of(self)

    def with_extras(self, params: PyTree, state: PyTree, batch: Batch) -> Batch:
        """The batch with the task's variables, and the outputs of frozen models."""
        variables = {f"{VARIABLES}/{k}": v for k, v in params.get(VARIABLES, {}).items()}
        return {**batch, **variables, **self.frozen_outputs(state, batch)}

    def frozen_outputs(self, state: PyTree, batch: Batch) -> dict[str, Any]:
        """The outputs of the frozen models that `state` has, by their name in the batch."""
        outputs = {}
        for name, net in self.frozen.items():
            if f"{FROZEN}/{name}" in state:
                part = scope.mark_varying(state[f"{FROZEN}/{name}"])  # as the trained ones are
                run = lambda module, name=name: self.task.read_frozen(
                    name, self._bound(module), batch
                )
                output = net.evaluate(part["params"], part["model_state"], run)
                outputs[f"{FROZEN}/{name}"] = jax.lax.stop_gradient(output)
        return outputs

    def _bound(self, module: Any, is_head: bool = False) -> BoundModel:
        return BoundModel(module, self.real, type(self.task).__name__, is_head)

    def sums(
        self, module: Any, batch: Batch, *, train: bool, hidden: jax.Array | None = None
    ) -> Sums:
        """(sum, weight) of each loss term and training metric, and of what layers noted."""
        notes: Notes = {}
        with scope.bind(notes=notes):
            totals, metrics = self.task.sums(
                self._bound(module, is_head=hidden is not None), batch, hidden=hidden, train=train
            )
        pairs = {name: (sums["sum"], sums["weight"]) for name, sums in metrics.items()}
        return self._weighed(totals, batch) | pairs | sum_notes(notes, batch)

    def _weighed(self, totals: Mapping[str, jax.Array], batch: Batch) -> Sums:
        weights = self.task.counted(batch)
        return {term: (x, weights[term].astype(x.dtype).sum()) for term, x in totals.items()}
