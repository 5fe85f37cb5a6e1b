"""Tracing: a task and a model become the pure functions of an Objective, and the parts of a pipeline."""

# B batch

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from spmd import metrics as metric_kinds
from spmd.core import tree
from spmd.core.fields import check
from spmd.metrics import Mean
from spmd.models.functional import FunctionalModel, network
from spmd.parallel import scope
from spmd.parallel.follows import resolve_dims
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

if TYPE_CHECKING:
    from spmd.tasks.base import Task


class BoundModel:
    """A model as a task calls it: its inputs in the parameters' precision.

    is_head: a pipeline's last stage, which holds the head alone.
    """

    def __init__(self, module: Any, real: Any, task: str, is_head: bool = False) -> None:
        self._module, self._real, self._task, self._is_head = module, real, task, is_head

    def __call__(self, *inputs: Any) -> Any:
        return self._whole("the model")(*as_inputs(inputs, self._real))

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._module, name)
        if name != "hidden":
            return method
        return lambda *inputs: self._whole("its layers", method)(*as_inputs(inputs, self._real))

    def _whole(self, what: str, function: Any = None) -> Any:
        check(
            not self._is_head,
            f"mesh.stage: task {self._task} calls {what} in its `sums` with the pipeline's result at hand; a"
            " task that calls its model twice cannot be pipelined: use --mesh.stage 1",
        )
        return function or self._module


def as_inputs(inputs: tuple[Any, ...], real: Any) -> tuple[Any, ...]:
    """Inputs with floats as precise as `real` at least, and uint8 scaled to [0, 1]."""

    def cast(x: Any) -> Any:
        if x.dtype == jnp.uint8:
            return x.astype(real) / 255
        narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < real.itemsize
        return x.astype(real) if narrow else x

    return jax.tree.map(cast, inputs)


class Tracer:
    """The pure functions of an Objective, while a task and a model are traced."""

    def __init__(self, task: Task, model: Any, param_dtype: str) -> None:
        self.task, self.model = task, model
        self.net = network(model, param_dtype)
        self.real = tree.at_least_float32(jnp.dtype(param_dtype))
        self.param_dtype = param_dtype
        self.coefficients = task.coefficients(model)
        self.frozen = {name: network(f.model, param_dtype) for name, f in task.frozen.items()}
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
            call=lambda params, state, fn: self.net.evaluated(*self.plain(params, state), fn),
            whole_batch=self.net.whole_batch,
            state_dims=state_dims,
            ranges=lambda batch, outputs: self.task.ranges(batch, outputs, self.model),
            plain=self.plain,
            staged=self.staged,
            combine=self.task.combine,
        )

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        params, state = self.net.init(key)
        fresh = lambda name: jax.random.fold_in(key, zlib.crc32(name.encode()))
        variables = self.task.variables(nnx.Rngs(fresh(VARIABLES)))
        if variables:
            check(VARIABLES not in params, f"the model has a part named {VARIABLES!r}; rename it")
            params |= {VARIABLES: {k: v.astype(self.param_dtype) for k, v in variables.items()}}
        for name, net in self.frozen.items():
            both = dict(zip(("params", "model_state"), net.init(fresh(name)), strict=True))
            state |= {f"{FROZEN}/{name}": both}
        return params, state

    def plain(self, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        """The parameters and state of the model itself."""
        return _without(params, VARIABLES), _without(state, *self._frozen_keys)

    @property
    def _frozen_keys(self) -> list[str]:
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
        batch = self._with_extras(params, state, batch)
        plain_params, plain_state = self.plain(params, state)
        with training(batch, step_key):
            sums, new = self.net.call(
                plain_params, plain_state, lambda m: self._sums(m, batch, train=True), train=True
            )
        kept = {key: state[key] for key in self._frozen_keys}
        return scaled_loss(sums, scale), (sums, new | kept)

    def evaluate(self, params: PyTree, state: PyTree, batch: Batch) -> MetricSums:
        batch = self._with_extras(params, state, batch)

        def run(module: Any) -> MetricSums:
            notes: Notes = {}
            with scope.bind(notes=notes):
                totals, metrics = self.task.sums(self._bound(module), batch, train=False)
            pairs = self._weighed(totals, batch) | noted_sums(notes, batch)
            return {n: {"sum": s, "weight": w} for n, (s, w) in pairs.items()} | metrics

        return self.net.evaluated(*self.plain(params, state), run)

    def measured(self, totals: Mapping[str, Any]) -> dict[str, float | None]:
        values = metric_kinds.computed(self.task.metrics, totals)
        return values | ({"loss": total_loss(self.coefficients, values)} if totals else {})

    def predict(self, params: PyTree, state: PyTree, batch: Batch) -> Any:
        batch = self._with_extras(params, state, batch)
        run = lambda module: self.task.predict(self._bound(module), batch)
        return self.net.evaluated(*self.plain(params, state), run)

    def staged(self) -> Staged:
        """The loss in parts; ValueError, by name, for what a pipeline cannot carry."""
        check(
            not self.frozen,
            f"mesh.stage: a pipeline does not carry frozen models ({', '.join(self.frozen)}); use"
            " --mesh.stage 1",
        )
        return stages_of(self)

    def _with_extras(self, params: PyTree, state: PyTree, batch: Batch) -> Batch:
        """The batch with the task's variables, and the outputs of frozen models."""
        extras = {f"{VARIABLES}/{k}": v for k, v in params.get(VARIABLES, {}).items()}
        for name, net in self.frozen.items():
            part = scope.varying(state[f"{FROZEN}/{name}"])  # as the trained ones are
            inputs = as_inputs(self.task.inputs(batch), self.real)
            outputs = net.evaluated(part["params"], part["model_state"], lambda m, x=inputs: m(*x))
            extras[f"{FROZEN}/{name}"] = jax.lax.stop_gradient(outputs)
        return {**batch, **extras}

    def _bound(self, module: Any, is_head: bool = False) -> BoundModel:
        return BoundModel(module, self.real, type(self.task).__name__, is_head)

    def _sums(
        self, module: Any, batch: Batch, *, train: bool, hidden: jax.Array | None = None
    ) -> Sums:
        """(sum, weight) of each loss term and training metric, and of what layers noted."""
        notes: Notes = {}
        with scope.bind(notes=notes):
            totals, metrics = self.task.sums(
                self._bound(module, is_head=hidden is not None), batch, hidden=hidden, train=train
            )
        pairs = {name: (sums["sum"], sums["weight"]) for name, sums in metrics.items()}
        return self._weighed(totals, batch) | pairs | noted_sums(notes, batch)

    def _weighed(self, totals: Mapping[str, jax.Array], batch: Batch) -> Sums:
        weights = self.task.counted(batch)
        return {term: (x, weights[term].astype(x.dtype).sum()) for term, x in totals.items()}


def _without(nested: PyTree, *keys: str) -> PyTree:
    return {k: v for k, v in nested.items() if k not in keys}


# ---- pipelines

PARTS = ("enter", "through", "leave", "logits", "stream")


def stages_of(tracer: Tracer) -> Staged:
    """The loss in parts, of a module with PARTS: methods, and stream, the logical dims of what flows between
    them.
    """
    net: FunctionalModel = tracer.net
    kind = f"{net.kind.__module__}.{net.kind.__qualname__}"
    missing = [name for name in PARTS if not hasattr(net.kind, name)]
    check(
        not missing,
        f"mesh.stage splits a stack of equal layers, and {kind} is none: it has no"
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
    inputs = lambda batch: as_inputs(tracer.task.inputs(batch), tracer.real)

    def call(params: PyTree, state: PyTree, run: Callable[[Any], Any]) -> tuple[Any, PyTree]:
        return net.call(_without(params, VARIABLES), state, run, train=True)

    def enter(params, batch, step_key):
        with training(batch, step_key):
            return call(params, unread, lambda m: m.enter(*inputs(batch)))[0]

    def through(params, state, x, batch, step_key, first, scale):
        notes: Notes = {}
        run = lambda module: module.through(x, *inputs(batch), first=first)
        with training(batch, step_key), scope.bind(notes=notes):
            x, state = call(params, state, run)
        sums = noted_sums(notes, batch)
        return x, scaled_loss(sums, scale), sums, state

    def leave(params, x, batch, step_key, scale):
        batch = tracer._with_extras(params, {}, batch)

        def run(module: Any) -> Sums:
            return tracer._sums(module, batch, train=True, hidden=module.leave(x))

        with training(batch, step_key):
            sums = call(params, unread, run)[0]
        return scaled_loss(sums, scale), sums

    stream = resolve_dims("stream", net.kind.stream, net.follows) or ()
    return Staged(enter, through, leave, stream, getattr(tracer.model, "period", 1))


def training(batch: Batch, step_key: jax.Array) -> contextlib.AbstractContextManager[Any]:
    """The scope of a training step's forward pass: a key and a weight for each example."""
    keys_B = scope.example_keys(step_key, batch["example_id"])
    return scope.bind(keys=keys_B, weight=batch["weight"], calls=0)


def noted_sums(notes: Notes, batch: Batch) -> Sums:
    """Sums over the examples of the values that layers noted."""
    precise = lambda x_B: x_B.astype(tree.at_least_float32(x_B.dtype))
    total = lambda x_B: jnp.sum(precise(x_B) * batch["weight"].astype(precise(x_B).dtype))
    return {name: (total(value_B), total(weight_B)) for name, (value_B, weight_B) in notes.items()}
