"""TrainState, Strategy, and what strategies are built from: shardings, gradient function, jitted step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import narrow, tree
from spmd.core.fields import check
from spmd.optim import RowWise
from spmd.optim import knobs as optim_knobs
from spmd.parallel import sharding
from spmd.strategies import tables
from spmd.strategies.grads import direct
from spmd.strategies.grads.pipeline import execute, schedules
from spmd.strategies.privacy import Mechanism
from spmd.tasks import is_frozen

PyTree = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
WEIGHTS = (
    "weights"  # the metric that holds the weights of the others, in the order of weighed_names
)
WATCHED_GRADIENTS = (
    "grads/"  # prefix of the gradients among the metrics of a step that verify watches
)

LAYERS = "layers"  # the metric that holds norms by layer, [kinds, layers]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes, and all that a checkpoint holds of it."""

    step: Any  # int32 []: updates done
    params: Any
    model_state: Any  # batch statistics
    opt_state: Any
    key: Any  # uint32 [2]: key data of the run's seed, folded with step, never advanced
    strategy_state: Any  # residuals, queues, outer parameters
    ema: Any  # moving average of the parameters, float32 at least; {} when off
    # Sparse tables, with their optimizer's state.
    tables: Any = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted step (state, batch, knobs) -> (state, metrics), with the values of its knobs."""

    jitted: Any
    knobs: Mapping[str, float]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self.jitted(state, batch, self.knobs)

    def lower(self, state: Any, batch: Any) -> jax.stages.Lowered:
        """The step lowered for a state and a batch, abstract ones included."""
        return self.jitted.lower(state, batch, self.knobs)


class Strategy(NamedTuple):
    """How the devices agree: pure functions, in the way optax's GradientTransformation is."""

    init: Callable[[jax.Array], TrainState]
    step: Step
    with_params: Callable[[TrainState, PyTree], TrainState]
    eval_variables: Callable[[TrainState], tuple[PyTree, PyTree]]
    state_shardings: TrainState
    batch_shardings: Any


class Parts(NamedTuple):
    """Inputs of a strategy's build; nothing here depends on models or data.

    task: spmd.tasks.Objective. batch: abstract global batch. rate: learning rate by step.
    pipeline, virtual_stages: the schedule, where mesh.stage cuts the layers.
    ema: decay of the moving average of the parameters; 0 is off.
    skip: a step with a non-finite loss or gradient changes nothing; without it the run must end there.
    privacy: clips the gradient of each example, and adds noise to their sum; None is off.
    noise_scale: measures what the gradient noise scale is told from.
    layers: steps between two measurements of the norms of each layer; 0 is off.
    knobs: scalars of the optimizer that are arguments of the step. rows: optimizer of sparse tables.
    row_rates: factors of their learning rate, by table; absent is 1.
    """

    task: Any
    tx: optax.GradientTransformation
    rate: optax.Schedule
    mesh: Mesh
    batch: Any
    accumulate: int = 1
    pipeline: schedules.Kind = "1f1b"
    virtual_stages: int = 2
    ema: float = 0.0
    skip: bool = False
    privacy: Mechanism | None = None
    noise_scale: bool = False
    layers: int = 0
    knobs: Mapping[str, float] = MappingProxyType({})
    rows: RowWise = RowWise()
    row_rates: Mapping[str, float] = MappingProxyType({})


def weighed_names(metrics: Iterable[str]) -> list[str]:
    """Names of the metrics that metrics[WEIGHTS] weighs, in its order: all scalars, sorted."""
    apart = (WEIGHTS, LAYERS)
    return sorted(n for n in metrics if n not in apart and not n.startswith(WATCHED_GRADIENTS))


def widen(params: PyTree) -> PyTree:
    """Copy the parameters in float32 at least: bf16 would swallow the steps of an average."""
    return jax.tree.map(lambda p: jnp.array(p, tree.at_least_float32(p.dtype), copy=True), params)


def abstract_params(parts: Parts) -> tuple[PyTree, PyTree]:
    """Shapes of (params, model_state)."""
    return jax.eval_shape(parts.task.init, jax.random.key(0))


# Parameters -> the strategy state to begin with.
StrategyInit = Callable[[PyTree], PyTree]
# The state that all strategies share -> the state that this one keeps.
StateInit = Callable[[TrainState], TrainState]


def build_init(
    parts: Parts,
    shardings: TrainState,
    init_strategy: StrategyInit | None = None,
    extend: StateInit | None = None,
) -> Callable[[jax.Array], TrainState]:
    """Strategy.init: jitted, so that every leaf is created with its sharding.

    shardings, init_strategy, extend: as `build_strategy` takes them.
    """

    def init(key: jax.Array) -> TrainState:
        params, model_state = parts.task.init(jax.random.fold_in(key, 0))
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=model_state,
            opt_state=parts.tx.init(params),
            key=jax.random.key_data(key),
            strategy_state=init_strategy(params) if init_strategy else {},
            ema=widen(params) if parts.ema else {},
            tables=tables.init(parts, jax.random.fold_in(key, 0)),
        )
        return extend(state) if extend else state

    return jax.jit(init, out_shardings=shardings)


def shardings_of(
    parts: Parts, params: PyTree, moments: PyTree, *, fsdp: bool = False
) -> TrainState:
    """State shardings from those of the parameters and of parameter-shaped optimizer leaves.

    The moving average is sharded as the moments are: it is read only by the update, so ZeRO-1 shards it too.

    params, moments: shardings. fsdp: whether mesh.fsdp shards what in the state is placed as parameters.
    """
    mesh = parts.mesh
    shapes, model_state = abstract_params(parts)
    opt_state = jax.eval_shape(parts.tx.init, shapes)
    replicated = NamedSharding(mesh, P())
    dims = parts.task.state_dims

    def beside(name: str, leaf: Any) -> NamedSharding:
        if name not in dims:
            return replicated
        spec = sharding.spec_of(name, leaf.shape, dims[name], mesh, fsdp=fsdp)
        return NamedSharding(mesh, spec)

    return TrainState(
        step=replicated,
        params=params,
        model_state=tree.map_named(beside, model_state),
        opt_state=sharding.opt_shardings(parts.tx, opt_state, shapes, moments, mesh),
        key=replicated,
        strategy_state={},
        ema=moments if parts.ema else {},
        tables=tables.shardings(parts),
    )


def batch_shardings(parts: Parts) -> Any:
    """Every leaf of the batch split along its first dim."""
    placed = NamedSharding(parts.mesh, sharding.batch_spec())
    return jax.tree.map(lambda _: placed, parts.batch)


def grads_of(parts: Parts) -> direct.GradsOf:
    """The first part of a step: the gradient function that these parts ask for; float32 gradients of narrow
    parameters too.

    ValueError for a model that cannot be private.
    """
    if parts.mesh.shape["stage"] > 1:
        return narrow.widen_gradients(direct.of_parameters(pipelined(parts)))
    plain = direct.single_pass(parts.task.loss)
    if parts.task.combine is not None:
        plain = direct.by_term(parts.task)
    if parts.privacy is not None:
        check_private(parts)
        plain = direct.per_example(parts.task, parts.privacy.clip_norm, parts.privacy.expected)
    if parts.noise_scale:
        plain = direct.measure_parts(plain)
    return narrow.widen_gradients(direct.accumulate(plain, parts.accumulate))


def check_private(parts: Parts) -> None:
    """ValueError, with their names, for layers in which examples meet: one would show in all gradients."""
    _, model_state = abstract_params(parts)
    names = [name for name in tree.named_leaves(model_state) if not is_frozen(name)]
    layers = dict.fromkeys([*parts.task.whole_batch, *(name.rpartition("/")[0] for name in names)])
    check(
        not layers,
        f"privacy clips the gradient of each example by itself, and {', '.join(layers)} would mix them:"
        " statistics over the batch (batch norm). Use a model with another norm, or none",
    )


def pipelined(parts: Parts) -> Callable[..., tuple[PyTree, PyTree, PyTree]]:
    """The gradient function of a pipeline, of the parameters alone; ValueError for what it cannot cut."""
    stages = parts.mesh.shape["stage"]
    check(
        parts.task.combine is None,
        f"the task combines the gradients of its loss terms ({', '.join(parts.task.coefficients)}), and a"
        f" pipeline (mesh.stage={stages}) adds the terms up as it goes; use mesh.stage=1",
    )
    for enabled, name in ((parts.privacy, "privacy"), (parts.noise_scale, "train.noise_scale")):
        check(
            not enabled,
            f"{name} needs gradients of parts of the batch, which a pipeline (mesh.stage={stages}) sums up as"
            " it goes; use mesh.stage=1",
        )
    staged = parts.task.staged()
    stacks = len(staged.stacks)
    table = schedules.make(
        parts.pipeline, stages, parts.accumulate, parts.virtual_stages, stacks=stacks
    )
    execute.check_layers(staged.stacks, stages, table.virtual // stacks)
    return execute.grads_of(staged, parts.task.dims, parts.mesh, table)


def gradient_shardings(parts: Parts, shardings: PyTree) -> PyTree:
    """Shardings of the gradients of arrays with these shardings: [K, ...] where they are taken by term."""
    if parts.task.combine is None:
        return shardings
    return jax.tree.map(lambda s: NamedSharding(s.mesh, P(None, *s.spec)), shardings)


def step_key(state: TrainState) -> jax.Array:
    """The key of this step: fold_in(seed, step)."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)


def build_strategy(
    parts: Parts,
    shardings: TrainState,
    step: Callable[..., Any],
    init_strategy: StrategyInit | None = None,
    extend: StateInit | None = None,
) -> Strategy:
    """A Strategy around an unjitted step function.

    shardings: of the state. step: (state, batch) -> (state, metrics). init_strategy: the strategy state of
    the first parameters, and of others that replace them; None: it has none, or none that depends on the
    parameters. extend: makes the state that the strategy keeps.
    """
    batches = batch_shardings(parts)
    reinit = None
    if init_strategy:
        reinit = jax.jit(init_strategy, out_shardings=shardings.strategy_state)

    def with_params(state: TrainState, params: PyTree) -> TrainState:
        ema = jax.device_put(widen(params), shardings.ema) if parts.ema else {}
        params = jax.device_put(params, shardings.params)
        strategy_state = reinit(params) if reinit else state.strategy_state
        return dataclasses.replace(state, params=params, strategy_state=strategy_state, ema=ema)

    def eval_variables(state: TrainState) -> tuple[PyTree, PyTree]:
        if not parts.ema:
            return state.params, state.model_state
        cast = lambda average, p: average.astype(p.dtype)
        return jax.tree.map(cast, state.ema, state.params), state.model_state

    jitted = jax.jit(
        _with_knobs(step),
        in_shardings=(shardings, batches, None),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
    return Strategy(
        init=build_init(parts, shardings, init_strategy, extend),
        step=Step(jitted, {**parts.knobs}),
        with_params=with_params,
        eval_variables=eval_variables,
        state_shardings=shardings,
        batch_shardings=batches,
    )


def _with_knobs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The step function with the knobs as an argument; its name is that of the compiled program."""

    def step(
        state: TrainState, batch: Batch, knobs: Mapping[str, Any]
    ) -> tuple[TrainState, Metrics]:
        with optim_knobs.bind(knobs):
            return fn(state, batch)

    return step


def scanned(strategy: Strategy) -> Strategy:
    """Several steps per dispatch: step takes batches [S, B, ...], metrics come back as [S].

    Small models are bound by dispatch; the arithmetic is that of single steps.
    """
    lead = lambda s: NamedSharding(s.mesh, P(None, *s.spec))
    batches = jax.tree.map(lead, strategy.batch_shardings)
    jitted, knobs = strategy.step.jitted, strategy.step.knobs
    many = jax.jit(
        lambda state, batch, knobs: jax.lax.scan(lambda s, b: jitted(s, b, knobs), state, batch),
        in_shardings=(strategy.state_shardings, batches, None),
        out_shardings=(strategy.state_shardings, None),
        donate_argnums=0,
    )
    return strategy._replace(step=Step(many, knobs), batch_shardings=batches)
