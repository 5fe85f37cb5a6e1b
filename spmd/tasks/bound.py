"""A model as a task calls it, and the scope of a step's forward pass."""

# B batch

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

from spmd.core import tree
from spmd.core.fields import check
from spmd.parallel import scope
from spmd.tasks.objective import Batch, Notes, PyTree, Sums


class BoundModel:
    """A model as a task calls it: its inputs in the parameters' precision.

    is_head: a pipeline's last stage, which holds the head alone.
    """

    def __init__(self, module: Any, real: Any, task: str, is_head: bool = False) -> None:
        self._module, self._real, self._task, self._is_head = module, real, task, is_head

    def __call__(self, *inputs: Any) -> Any:
        return self._whole("the model")(*cast_inputs(inputs, self._real))

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._module, name)
        if name != "hidden":
            return method
        return lambda *inputs: self._whole("its layers", method)(*cast_inputs(inputs, self._real))

    def _whole(self, what: str, function: Any = None) -> Any:
        check(
            not self._is_head,
            f"mesh.stage: task {self._task} calls {what} in its `sums` with the pipeline's result at hand; a"
            " task that calls its model twice cannot be pipelined: use --mesh.stage 1",
        )
        return function or self._module


def cast_inputs(inputs: tuple[Any, ...], real: Any) -> tuple[Any, ...]:
    """Inputs with floats as precise as `real` at least, and uint8 scaled to [0, 1]."""

    def cast(x: Any) -> Any:
        if x.dtype == jnp.uint8:
            return x.astype(real) / 255
        narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < real.itemsize
        return x.astype(real) if narrow else x

    return jax.tree.map(cast, inputs)


def without(nested: PyTree, *keys: str) -> PyTree:
    return {k: v for k, v in nested.items() if k not in keys}


def training(batch: Batch, step_key: jax.Array) -> contextlib.AbstractContextManager[Any]:
    """The scope of a training step's forward pass: a key and a weight for each example.

    Args:
        batch: the features.
        step_key: [] of this step.

    Returns:
        A context manager.
    """
    keys_B = scope.example_keys(step_key, batch["example_id"])
    return scope.bind(keys=keys_B, weight=batch["weight"], calls=0)


def sum_notes(notes: Notes, batch: Batch) -> Sums:
    """Sums over the examples of the values that layers noted."""
    precise = lambda x_B: x_B.astype(tree.at_least_float32(x_B.dtype))
    total = lambda x_B: jnp.sum(precise(x_B) * batch["weight"].astype(precise(x_B).dtype))
    return {name: (total(value_B), total(weight_B)) for name, (value_B, weight_B) in notes.items()}
