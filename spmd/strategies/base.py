"""TrainState, Strategy, and the update that every strategy shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import narrow, tree
from spmd.core.fields import check
from spmd.parallel import scope, sharding
from spmd.strategies.grads import direct as grad
from spmd.strategies.grads.pipeline import execute, schedules
from spmd.strategies.privacy import Mechanism
from spmd.tasks import FROZEN

PyTree = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
WEIGHTS = "weights"  # the metric that holds the weights of the others: see `weighed`


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


class Strategy(NamedTuple):
    """How the devices agree: pure functions, in the way optax's GradientTransformation is."""

    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    with_params: Callable[[TrainState, PyTree], TrainState]
    eval_variables: Callable[[TrainState], tuple[PyTree, PyTree]]
    state_shardings: TrainState
    batch_shardings: Any


class Parts(NamedTuple):
    """Inputs of a strategy's build; nothing here depends on models or data.

    task: spmd.tasks.Task. batch: abstract global batch. rate: learning rate by step.
    pipeline, virtual_stages: the schedule, where mesh.stage cuts the layers.
    ema: decay of the moving average of the parameters; 0 is off.
    skip: a step with a non-finite loss or gradient changes nothing; without it the run must end there.
    privacy: clips the gradient of each example, and adds noise to their sum; None is off.
    noise_scale: measures what the gradient noise scale is told from.
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


def widened(params: PyTree) -> PyTree:
    """A copy of the parameters in float32 at least: bf16 would swallow the steps of an average."""
    return jax.tree.map(lambda p: jnp.array(p, tree.at_least_float32(p.dtype), copy=True), params)


def abstract_params(parts: Parts) -> tuple[PyTree, PyTree]:
    """Shapes of (params, model_state)."""
    return jax.eval_shape(parts.task.init, jax.random.key(0))


Carry = Callable[[PyTree], PyTree]  # params -> the strategy state to begin with
Begin = Callable[[TrainState], TrainState]  # plain state -> the one that the strategy keeps


def nothing(params: PyTree) -> PyTree:
    """The strategy state of a strategy that carries nothing."""
    return {}


def as_it_is(state: TrainState) -> TrainState:
    """The plain state, kept so."""
    return state


def initial(
    parts: Parts, shardings: TrainState, carry: Carry = nothing, begin: Begin = as_it_is
) -> Callable[[jax.Array], TrainState]:
    """Strategy.init: jitted, every leaf born with its sharding."""

    def init(key: jax.Array) -> TrainState:
        params, model_state = parts.task.init(jax.random.fold_in(key, 0))
        plain = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=model_state,
            opt_state=parts.tx.init(params),
            key=jax.random.key_data(key),
            strategy_state=carry(params),
            ema=widened(params) if parts.ema else {},
        )
        return begin(plain)

    return jax.jit(init, out_shardings=shardings)


def shardings_of(
    parts: Parts, params: PyTree, moments: PyTree, *, fsdp: bool = False
) -> TrainState:
    """State shardings from those of the parameters and of parameter-shaped optimizer leaves.

    fsdp: whether mesh.fsdp cuts what in the model state is placed as parameters are.
    The moving average lies as the moments do: it is read only by the update, so ZeRO-1 cuts it too.
    """
    mesh = parts.mesh
    shapes, model_state = abstract_params(parts)
    opt_state = jax.eval_shape(parts.tx.init, shapes)
    whole = NamedSharding(mesh, P())
    dims = parts.task.state_dims

    def beside(name: str, leaf: Any) -> NamedSharding:
        if name not in dims:
            return whole
        spec = sharding.spec_of(name, leaf.shape, dims[name], mesh, fsdp=fsdp)
        return NamedSharding(mesh, spec)

    return TrainState(
        step=whole,
        params=params,
        model_state=tree.map_named(beside, model_state),
        opt_state=sharding.opt_shardings(parts.tx, opt_state, shapes, moments, mesh),
        key=whole,
        strategy_state={},
        ema=moments if parts.ema else {},
    )


def batch_shardings(parts: Parts) -> Any:
    """Every leaf of the batch split along its first dim."""
    placed = NamedSharding(parts.mesh, sharding.batch_spec())
    return jax.tree.map(lambda _: placed, parts.batch)


def grads_of(parts: Parts) -> grad.GradsOf:
    """The first part of a step: the gradient function that these parts ask for; float32 gradients of narrow
    parameters too.

    ValueError for a model that cannot be private.
    """
    if parts.mesh.shape["stage"] > 1:
        return narrow.wide_gradients(pipelined(parts))
    plain = grad.plain(parts.task.loss)
    if parts.privacy is not None:
        check_private(parts)
        plain = grad.per_example(parts.task, parts.privacy.clip_norm, parts.privacy.expected)
    if parts.noise_scale:
        plain = grad.with_parts(plain)
    return narrow.wide_gradients(grad.accumulated(plain, parts.accumulate))


def check_private(parts: Parts) -> None:
    """ValueError, with their names, for layers in which examples meet: one would show in all gradients."""
    _, model_state = abstract_params(parts)
    names = [name for name in tree.named_leaves(model_state) if not name.startswith(f"{FROZEN}/")]
    layers = dict.fromkeys([*parts.task.whole_batch, *(name.rpartition("/")[0] for name in names)])
    check(
        not layers,
        f"privacy clips the gradient of each example by itself, and {', '.join(layers)} would mix them:"
        " statistics over the batch (batch norm). Use a model with another norm, or none",
    )


def pipelined(parts: Parts) -> grad.GradsOf:
    """The gradient function of a pipeline; ValueError for what it cannot cut."""
    stages = parts.mesh.shape["stage"]
    for asked, name in ((parts.privacy, "privacy"), (parts.noise_scale, "train.noise_scale")):
        check(
            not asked,
            f"{name} needs gradients of parts of the batch, which a pipeline (mesh.stage={stages}) sums up as"
            " it goes; use mesh.stage=1",
        )
    staged = parts.task.staged()
    table = schedules.make(parts.pipeline, stages, parts.accumulate, parts.virtual_stages)
    params, _ = abstract_params(parts)
    execute.check_layers(execute.num_layers(params, parts.task.dims), stages, table.virtual)
    return execute.grads_of(staged, parts.task.dims, parts.mesh, table)


def step_key(state: TrainState) -> jax.Array:
    """The key of this step: fold_in(seed, step)."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)


def update(
    parts: Parts,
    state: TrainState,
    grads: PyTree,
    sums: PyTree,
    model_state: PyTree,
    strategy_state: PyTree = None,
) -> tuple[TrainState, Metrics]:
    """The third part of a step, on whole logical arrays: global-norm clipping, LAMB, Adafactor are wrong
    on shards. With parts.skip a step with a non-finite loss or gradient changes nothing but the step count.

    strategy_state: what the strategy carries on; None: as it was.
    """
    if parts.privacy is not None:  # here, since every strategy's sum is whole and comes by once
        grads = grad.noised(grads, step_key(state), parts.privacy.deviation)
    metrics = {
        name: total / jnp.where(weight > 0, weight, jnp.ones_like(weight))
        for name, (total, weight) in sums.items()
        if not name.startswith(grad.PARTS)
    }
    metrics["grad_norm"] = tree.global_norm(grads)
    if parts.noise_scale:
        metrics |= grad.signal_and_noise(sums, metrics["grad_norm"])
    metrics["learning_rate"] = jnp.asarray(parts.rate(state.step))
    if scope.current().watched:
        metrics |= {f"grads/{name}": grad for name, grad in tree.named_leaves(grads).items()}
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    metrics["finite"] = finite.astype(jnp.float32)
    metrics = weighed(metrics, sums, finite)
    params, opt_state = applied(
        parts.tx, grads, state.opt_state, state.params, lambda: step_key(state)
    )
    new = dataclasses.replace(
        state,
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        strategy_state=state.strategy_state if strategy_state is None else strategy_state,
        ema=averaged(parts, state, params),
    )
    if parts.skip:
        # Donation makes a host-side skip impossible. To choose costs a pass over the state.
        new = tree.select(finite, new, state)
    return dataclasses.replace(new, step=state.step + 1), metrics


def weighed(metrics: Metrics, sums: PyTree, counts: jax.Array) -> Metrics:
    """`metrics` and, under WEIGHTS, the weight of each in a mean over several steps.

    Args:
      metrics: of one step, each a scalar.
      sums: {name: (sum, weight)} of the metrics that are means; they weigh as their weight, others 1.
      counts: bool [], whether the step counts; else every weight is 0.

    Returns:
      The metrics, and weights [number of metrics], in the order of their sorted names.
    """
    dtype = tree.at_least_float32(metrics["loss"].dtype)
    one = jnp.ones((), dtype)
    names = sorted(name for name in metrics if not name.startswith("grads/"))  # watched arrays
    weights = [sums[n][1].astype(dtype) if n in sums else one for n in names]
    return metrics | {WEIGHTS: jnp.where(counts, jnp.stack(weights), 0)}


def applied(
    tx: optax.GradientTransformation,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
    key: Callable[[], jax.Array],
    part: Any = None,
) -> tuple[PyTree, PyTree]:
    """(new parameters, new optimizer state). Narrow parameters are updated in float32 and rounded once, by
    random bits of the step's key() and of `part` (narrow.rounded_like).
    """
    widened_params = narrow.at_least_float32(params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts with floats
        updates, opt_state = tx.update(grads, opt_state, widened_params)
    new = optax.apply_updates(widened_params, updates)
    if narrow.any_narrow(params):
        new = narrow.rounded_like(new, params, key(), part)
    return new, opt_state


def averaged(parts: Parts, state: TrainState, params: PyTree) -> PyTree:
    """The moving average after the update to `params`; {} when off.

    The decay is at most (1 + t) / (10 + t) at step t, so that the initial parameters soon weigh nothing.
    """
    if not parts.ema:
        return {}
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(parts.ema, (1 + step) / (10 + step))

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        return old + (1 - decay).astype(old.dtype) * (new.astype(old.dtype) - old)

    return jax.tree.map(average, state.ema, params)


def finish(
    parts: Parts,
    shardings: TrainState,
    step: Callable[..., Any],
    carry: Carry = nothing,
    begin: Begin = as_it_is,
) -> Strategy:
    """A Strategy around an unjitted step function. Other parameters begin with a strategy state of theirs,
    where `carry` makes one.
    """
    batches = batch_shardings(parts)
    carried = None
    if carry is not nothing:
        carried = jax.jit(carry, out_shardings=shardings.strategy_state)

    def with_params(state: TrainState, params: PyTree) -> TrainState:
        ema = jax.device_put(widened(params), shardings.ema) if parts.ema else {}
        params = jax.device_put(params, shardings.params)
        own = carried(params) if carried else state.strategy_state
        return dataclasses.replace(state, params=params, strategy_state=own, ema=ema)

    def eval_variables(state: TrainState) -> tuple[PyTree, PyTree]:
        if not parts.ema:
            return state.params, state.model_state
        narrow = lambda average, p: average.astype(p.dtype)
        return jax.tree.map(narrow, state.ema, state.params), state.model_state

    return Strategy(
        init=initial(parts, shardings, carry, begin),
        step=jax.jit(
            step,
            in_shardings=(shardings, batches),
            out_shardings=(shardings, None),
            donate_argnums=0,
        ),
        with_params=with_params,
        eval_variables=eval_variables,
        state_shardings=shardings,
        batch_shardings=batches,
    )


def scanned(strategy: Strategy) -> Strategy:
    """Several steps per dispatch: step takes batches [S, B, ...], metrics come back as [S].

    Small models are bound by dispatch; the arithmetic is that of single steps.
    """
    lead = lambda s: NamedSharding(s.mesh, P(None, *s.spec))
    batches = jax.tree.map(lead, strategy.batch_shardings)
    many = jax.jit(
        lambda state, batch: jax.lax.scan(strategy.step, state, batch),
        in_shardings=(strategy.state_shardings, batches),
        out_shardings=(strategy.state_shardings, None),
        donate_argnums=0,
    )
    return strategy._replace(step=many, batch_shardings=batches)
