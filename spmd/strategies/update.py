"""Third part of a step: the optimizer, the moving average and the metrics, on whole logical arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spmd.core import narrow, tree
from spmd.parallel import scope
from spmd.parallel.sparse import Pulled
from spmd.strategies import base, layers, tables
from spmd.strategies.grads import direct

PyTree = Any
# Folded into the step's key; no example has this id (direct.NOISE is -2, narrow.ROUNDING -3).
COMBINE = -4


def update_state(
    parts: base.Parts,
    state: base.TrainState,
    gradients: direct.Trained,
    sums: PyTree,
    model_state: PyTree,
    pulled: Pulled,
    strategy_state: PyTree = None,
) -> tuple[base.TrainState, base.Metrics]:
    """The third part of a step, on logical arrays: global-norm clipping, LAMB, Adafactor are wrong on shards.

    With parts.skip a step with a non-finite loss or gradient changes nothing but the step count.

    Args:
        parts: as of every strategy.
        state: before the step.
        gradients: sums over all devices; where the task combines those of its loss terms, [K, ...] for each
            parameter, and they are combined first.
        sums: (sum, weight) of each metric, [] each.
        model_state: the new one.
        pulled: the rows of the batch; their tables are updated here, row by row.
        strategy_state: the strategy's new state; None: unchanged.
    """
    grads = gradients.params
    if parts.privacy is not None:  # once per step, on the whole sum of any strategy
        grads = direct.add_noise(grads, base.step_key(state), parts.privacy.deviation)
    grads, of_terms = combine_terms(parts, state, grads)
    metrics = mean_metrics(parts, sums) | of_terms
    metrics["grad_norm"] = tree.global_norm(grads)
    if parts.noise_scale:
        metrics |= direct.signal_and_noise(sums, metrics["grad_norm"])
    metrics["learning_rate"] = jnp.asarray(parts.rate(state.step))
    if scope.current().watched:
        metrics |= {
            base.WATCHED_GRADIENTS + name: grad for name, grad in tree.named_leaves(grads).items()
        }
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    if pulled.rows:
        finite &= tables.all_finite(gradients.rows)
        metrics["lookup_rounds"] = pulled.rounds.astype(jnp.float32)
    metrics["finite"] = finite.astype(jnp.float32)
    params, opt_state = apply_gradients(
        parts.tx, grads, state.opt_state, state.params, lambda: base.step_key(state)
    )
    metrics = add_weights(metrics, sums, finite) | measure_layers(parts, state, grads, params)
    new = dataclasses.replace(
        state,
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        strategy_state=state.strategy_state if strategy_state is None else strategy_state,
        ema=update_average(parts, state, params),
    )
    if parts.skip:
        # Donation makes a host-side skip impossible. The selection costs a pass over the state.
        # Tables apart: a pass over all rows would cost more than the step.
        without = [dataclasses.replace(each, tables={}) for each in (new, state)]
        new = tree.select(finite, *without)
    pushed = tables.push(parts, state, pulled, gradients.rows, finite)
    return dataclasses.replace(new, step=state.step + 1, tables=pushed), metrics


def mean_metrics(parts: base.Parts, sums: PyTree) -> base.Metrics:
    """The means of the loss terms and training metrics, and the loss."""
    means = {
        name: total / jnp.where(weight > 0, weight, jnp.ones_like(weight))
        for name, (total, weight) in sums.items()
        if not name.startswith(direct.PARTS)
    }
    return means | {"loss": parts.task.loss_of(means)}


def combine_terms(
    parts: base.Parts, state: base.TrainState, grads: PyTree
) -> tuple[PyTree, base.Metrics]:
    """(one gradient, norms and cosines of those of the loss terms), where the task combines them."""
    if parts.task.combine is None:
        return grads, {}
    key = jax.random.fold_in(base.step_key(state), jnp.int32(COMBINE))
    return parts.task.combine.join(grads, [*parts.task.coefficients], key)


def add_weights(metrics: base.Metrics, sums: PyTree, counts: jax.Array) -> base.Metrics:
    """`metrics` and, under WEIGHTS, the weight of each in a mean over several steps.

    Args:
      metrics: of one step, each a scalar.
      sums: {name: (sum, weight)} of the metrics that are means; they weigh as their weight, others 1.
      counts: bool [], whether the step counts; else every weight is 0.

    Returns:
      The metrics, and weights [number of metrics], in the order of their sorted names.
    """
    dtype = tree.at_least_float32(metrics["loss"].dtype)
    unit = jnp.ones((), dtype)
    weights = [
        sums[name][1].astype(dtype) if name in sums else unit
        for name in base.weighed_names(metrics)
    ]
    return metrics | {base.WEIGHTS: jnp.where(counts, jnp.stack(weights), 0)}


def measure_layers(
    parts: base.Parts, state: base.TrainState, grads: PyTree, params: PyTree
) -> base.Metrics:
    """Norms of each layer [kinds, layers], of gradient, new parameters and update, in a step that is logged.

    Others give UNMEASURED, without a pass over the arrays. {} where they are off.

    Args:
        parts: as of every strategy.
        state: before the step.
        grads: the gradient of all examples, before clipping.
        params: after the step.
    """
    if not parts.layers:
        return {}
    dims = parts.task.dims

    def measure() -> jax.Array:
        subtract = lambda new, old: (
            new.astype(tree.at_least_float32(new.dtype))
            - old.astype(tree.at_least_float32(old.dtype))
        )
        return layers.layer_norms(
            (grads, params, jax.tree.map(subtract, params, state.params)), dims
        )

    shape = jax.eval_shape(measure)
    due = (state.step + 1) % jnp.int32(parts.layers) == 0
    skip = lambda: jnp.full(shape.shape, layers.UNMEASURED, shape.dtype)
    return {base.LAYERS: jax.lax.cond(due, measure, skip)}


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
    key: Callable[[], jax.Array],
    part: Any = None,
) -> tuple[PyTree, PyTree]:
    """Apply the optimizer. Narrow parameters are updated in float32 and rounded once.

    Args:
        tx: the optimizer.
        grads, opt_state, params: its arguments.
        key: returns the step's key, for the random bits of the rounding.
        part: folded into that key where a step makes several updates, as narrow.round_like takes it.

    Returns:
        (new parameters, new optimizer state).
    """
    params32 = narrow.at_least_float32(params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts with floats
        updates, opt_state = tx.update(grads, opt_state, params32)
    new = optax.apply_updates(params32, updates)
    if narrow.any_narrow(params):
        new = narrow.round_like(new, params, key(), part)
    return new, opt_state


def update_average(parts: base.Parts, state: base.TrainState, params: PyTree) -> PyTree:
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
