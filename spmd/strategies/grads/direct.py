"""Gradient functions: the first of a step's three parts (grads_of -> reduce -> update)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd.core import tree
from spmd.parallel import scope

PyTree = Any


class Trained(NamedTuple):
    """The arrays that a step differentiates; its gradients are structured alike.

    params: the parameters, whose gradients are sums over examples. rows: rows that were looked up in sparse
    tables, {"rows/LOOKUP": [B, ...]}, whose gradients each example has by itself; {} without tables.
    """

    params: PyTree
    rows: PyTree


# (Trained, model_state, batch, step_key, scale) -> (gradients as Trained, metric sums, model_state)
GradsOf = Callable[..., tuple[Trained, PyTree, PyTree]]


def single_pass(loss: Callable[..., Any]) -> GradsOf:
    """A gradient function: a single backward pass over the batch. `loss` as in tasks.Objective."""

    def grads_of(trained, model_state, batch, step_key, scale):
        def total(trained):
            with_rows = {**batch, **trained.rows}
            return loss(trained.params, model_state, with_rows, step_key, scale)

        trained = Trained(scope.mark_varying(trained.params), trained.rows)
        grads, (metrics, new_state) = jax.grad(total, has_aux=True)(trained)
        return grads, metrics, new_state

    return grads_of


def by_term(objective: Any) -> GradsOf:
    """A gradient function with one backward pass for each loss term: gradients [K, ...], K the terms in the
    order of objective.coefficients. The forward pass is shared.
    """

    def grads_of(params, model_state, batch, step_key, scale):
        terms = [*objective.coefficients]

        def losses(params):
            _, (sums, new_state) = objective.loss(params, model_state, batch, step_key, scale)
            parts = [sums[term][0] * scale[term].astype(sums[term][0].dtype) for term in terms]
            return jnp.stack(parts), (sums, new_state)

        loss_K, pull_back, (metrics, new_state) = jax.vjp(
            losses, scope.mark_varying(params), has_aux=True
        )
        unit_KK = scope.mark_varying(jnp.eye(len(terms), dtype=loss_K.dtype))
        grads = jax.lax.map(lambda unit_K: pull_back(unit_K)[0], unit_KK)
        return grads, metrics, new_state

    return of_parameters(grads_of)


def of_parameters(grads_of: Callable[..., tuple[PyTree, PyTree, PyTree]]) -> GradsOf:
    """A gradient function that differentiates parameters only, as one of Trained."""

    def without_rows(trained, *rest):
        grads, metrics, model_state = grads_of(trained.params, *rest)
        return Trained(grads, {}), metrics, model_state

    return without_rows


def per_example(task: Any, clip_norm: float, expected: float) -> GradsOf:
    """Each example's gradient, scaled down, summed and divided by the number of examples in a batch on
    average (Abadi et al. 2016, arXiv 1607.00133).

    The loss of an example has its own weight below it, never that of the batch. Holds one gradient for each
    row that a device sees at once: accumulate to have fewer.

    Args:
        task: the objective.
        clip_norm: largest norm of an example's gradient.
        expected: number of examples in a batch, on average.
    """

    def grads_of(params, model_state, batch, step_key, scale):
        del scale  # of the whole batch
        params = scope.mark_varying(params)

        def example_gradient(example):
            row = jax.tree.map(lambda x: x[None], example)
            grads, (metrics, _) = jax.grad(task.loss, has_aux=True)(
                params, model_state, row, step_key, task.scale(task.weigh(row))
            )
            norm = tree.global_norm(grads)
            factor = jnp.minimum(1, clip_norm / jnp.where(norm > 0, norm, 1)) / expected
            weight = row["weight"].sum().astype(norm.dtype)
            metrics["clipped"] = ((norm > clip_norm).astype(norm.dtype) * weight, weight)
            return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), metrics

        # The batch is the dim that vmap adds: a placement inside speaks of the others only.
        bound = scope.current()
        axes = bound.sharding_axes("batch") if bound.sharding_axes is not None else ()
        axes = tuple(axis for axis in axes if axis not in bound.axes)
        inside = {"constrain": _inside(bound.constrain), "blockwise": None, "sharding_axes": None}
        with scope.bind(**inside, by_example=True):
            grads, metrics = jax.vmap(example_gradient, spmd_axis_name=axes or None)(batch)
        return *jax.tree.map(lambda x: x.sum(0), (grads, metrics)), model_state

    return of_parameters(grads_of)


PARTS = "parts"  # the sums that measure_parts adds; no metric


def measure_parts(grads_of: GradsOf) -> GradsOf:
    """Adds what the noise scale is told from: the squared norm of the gradient of each part of the batch that
    is taken by itself (a microbatch, a device's rows), and how many examples the part has.
    """

    def measured(trained, model_state, batch, step_key, scale):
        grads, metrics, model_state = grads_of(trained, model_state, batch, step_key, scale)
        square = jnp.square(tree.global_norm(grads.params))
        num = batch["weight"].sum().astype(square.dtype)
        parts = {PARTS: (square, num**2), f"{PARTS}/examples": (num, num**0)}
        return grads, metrics | parts, model_state

    return measured


def signal_and_noise(sums: PyTree, norm: jax.Array) -> dict[str, jax.Array]:
    """The parts of the gradient noise scale, without bias (McCandlish et al. 2018, arXiv 1812.06162,
    appendix A.1). Their ratio, once both are averaged, is the scale, in examples.

    For a sum over b of W examples the square expected is b^2 signal + b variance, over W^2: two equations,
    for the parts together and for the whole, however unevenly the examples are spread.

    Args:
        sums: metrics of `measure_parts` among others.
        norm: [] of the whole gradient.

    Returns:
        [] gradient_signal, the squared norm of the true gradient, and gradient_variance, the trace of the
        covariance of one example's.
    """
    (squares, nums), (num_examples, _) = sums[PARTS], sums[f"{PARTS}/examples"]
    num_examples = jnp.maximum(num_examples, 1)
    share = nums / num_examples**2
    several = share < 1
    signal = jnp.where(several, (jnp.square(norm) - squares) / jnp.where(several, 1 - share, 1), 0)
    return {
        "gradient_signal": signal,
        "gradient_variance": num_examples * (squares - share * signal),
    }


def _inside(constrain: Callable[..., jax.Array] | None) -> Callable[..., jax.Array] | None:
    """A placement rule for one example, whose batch dim of 1 cannot be cut."""
    if constrain is None:
        return None
    return lambda x, dims: constrain(x, tuple(None if dim == "batch" else dim for dim in dims))


# Folded into the step's key; no example has this id, so that no dropout mask shares the noise's bits.
NOISE = -2


def add_noise(
    grads: PyTree, step_key: jax.Array, deviation: float, part: jax.Array | None = None
) -> PyTree:
    """Add a normal deviate to each element; once a step, to logical arrays: no sharding shows.

    Args:
        grads: [...] for each leaf.
        step_key: [] of this step.
        deviation: standard deviation.
        part: [] number of this sum, where a step has several.

    Returns:
        The tree with noise.
    """
    leaves, structure = jax.tree.flatten(grads)
    key = jax.random.fold_in(step_key, jnp.int32(NOISE))
    key = key if part is None else jax.random.fold_in(key, part)
    keys = jax.random.split(key, len(leaves))
    noise = [
        deviation * jax.random.normal(k, g.shape, g.dtype)
        for k, g in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, [g + n for g, n in zip(leaves, noise, strict=True)])


def microbatches(batch: PyTree, num: int) -> PyTree:
    """[B, ...] -> [M, B/M, ...] for each leaf.

    Microbatch m takes rows m, m + M, m + 2M, ... so that each device keeps its own rows (no resharding)
    and the microbatches are the same sets of examples on every mesh.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, num, *x.shape[1:]), 1, 0), batch)


def join_microbatches(parts: PyTree) -> PyTree:
    """[M, B/M, ...] -> [B, ...] for each leaf: the inverse of `microbatches`."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), parts
    )


def accumulate(grads_of: GradsOf, num_microbatches: int) -> GradsOf:
    """Sums the gradients of parameters over microbatches in a scan: the memory of one, the gradient of all.

    The gradients of rows are put together again in the order of the batch.
    """
    if num_microbatches == 1:
        return grads_of

    def summed(trained, model_state, batch, step_key, scale):
        def grads_at(microbatch, model_state):
            batch, rows = microbatch
            part = Trained(trained.params, rows)
            grads, metrics, model_state = grads_of(part, model_state, batch, step_key, scale)
            return (grads.params, metrics), grads.rows, model_state

        batches = microbatches((batch, trained.rows), num_microbatches)
        first = jax.tree.map(lambda x: x[0], batches)
        shapes = jax.eval_shape(grads_at, first, model_state)[0]
        zeros = scope.mark_varying(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))

        def body(carry, microbatch):
            sums, model_state = carry
            new, row_grads, model_state = grads_at(microbatch, model_state)
            return (jax.tree.map(jnp.add, sums, new), model_state), row_grads

        (sums, model_state), row_grads = jax.lax.scan(body, (zeros, model_state), batches)
        grads, metrics = sums
        return Trained(grads, join_microbatches(row_grads)), metrics, model_state

    return summed
