"""Gradient functions: the first of a step's three parts (grads_of -> reduce -> update)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spmd import scope

PyTree = Any
# (params, model_state, batch, step_key, scale) -> (gradient sum, metric sums, model_state)
GradsOf = Callable[..., tuple[PyTree, PyTree, PyTree]]


def plain(loss: Callable[..., Any]) -> GradsOf:
    """One backward pass over the batch. `loss` as in tasks.Task."""

    def grads_of(params, model_state, batch, step_key, scale):
        grad = jax.grad(loss, has_aux=True)
        grads, (metrics, model_state) = grad(
            scope.varying(params), model_state, batch, step_key, scale
        )
        return grads, metrics, model_state

    return grads_of


def microbatches(batch: PyTree, num: int) -> PyTree:
    """[B, ...] -> [M, B/M, ...] for each leaf.

    Microbatch m takes rows m, m + M, m + 2M, ... so that each device keeps its own rows (no resharding)
    and the microbatches are the same sets of examples on every mesh.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, num, *x.shape[1:]), 1, 0), batch)


def accumulated(grads_of: GradsOf, num_microbatches: int) -> GradsOf:
    """Sums gradients over microbatches in a scan: the memory of one, the gradient of all."""
    if num_microbatches == 1:
        return grads_of

    def summed(params, model_state, batch, step_key, scale):
        batches = microbatches(batch, num_microbatches)
        first = jax.tree.map(lambda x: x[0], batches)
        shapes = jax.eval_shape(grads_of, params, model_state, first, step_key, scale)
        zeros = scope.varying(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[:2]))

        def body(carry, microbatch):
            sums, model_state = carry
            *new, model_state = grads_of(params, model_state, microbatch, step_key, scale)
            return (jax.tree.map(jnp.add, sums, tuple(new)), model_state), None

        ((grads, metrics), model_state), _ = jax.lax.scan(body, (zeros, model_state), batches)
        return grads, metrics, model_state

    return summed
