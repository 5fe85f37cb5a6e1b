"""Model FLOPs of a training step, counted from the jaxpr of its loss.

The convention is that of PaLM's model FLOPs utilisation (appendix B of arXiv 2204.02311): matmuls and
convolutions only, 2 M N K each; the backward pass is twice the forward pass; rematerialisation is not
counted. Attention is counted with its masked half, and with what XLA's attention computes beyond a window; a
fused kernel, whose matmuls are not in the jaxpr, is not counted. XLA's own cost_analysis counts the body of a
loop once, whatever its length.
"""

from __future__ import annotations

import collections
import math
from typing import Any

import jax

Count = collections.Counter[str]  # dtype of the operands -> FLOPs


def count_step(task: Any, batch: Any) -> Count:
    """FLOPs of a step on the abstract global `batch`, by dtype of the operands; traces the loss once.

    A step with a gradient for each of K loss terms has one forward and K backward passes.
    """
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    scale = jax.eval_shape(lambda b: task.scale(task.weigh(b)), batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    passes = 1 + 2 * task.num_gradients
    batch = task.with_rows(batch)
    return multiply(count_call(task.loss, params, model_state, batch, key, scale), passes)


def count_call(function: Any, *args: Any) -> Count:
    """FLOPs of a call, forward only; args: arrays or shapes."""
    return _count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def multiply(count: Count, factor: int) -> Count:
    """The count multiplied by `factor`."""
    return Count({dtype: n * factor for dtype, n in count.items()})


def _count_jaxpr(jaxpr: Any) -> Count:
    total = Count()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ("dot_general", "ragged_dot_general"):
            total[_dtype(eqn)] += _dot_flops(eqn)
        elif name == "conv_general_dilated":
            total[_dtype(eqn)] += _conv_flops(eqn)
        elif name == "cond":  # count the most expensive branch
            total += max(map(_count_jaxpr, _bodies(eqn)), key=lambda count: count.total())
        else:  # scan, pjit, custom_vjp, remat ...; the body of a `while` once, as its length is not known
            for body in _bodies(eqn):
                total += multiply(_count_jaxpr(body), _repeats(eqn))
    return total


def _bodies(eqn: Any) -> list[Any]:
    """The jaxprs inside an equation."""
    bodies = []
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)  # a ClosedJaxpr wraps a Jaxpr
            if hasattr(inner, "eqns"):
                bodies.append(inner)
    return bodies


def _repeats(eqn: Any) -> int:
    """Number of runs of an equation's body: steps of a scan, devices of a shard_map."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        axes = eqn.params["newly_manual_axes"]
        return math.prod(eqn.params["mesh"].shape[axis] for axis in axes)
    return 1


def _dtype(eqn: Any) -> str:
    return str(eqn.invars[0].aval.dtype)


def _dot_flops(eqn: Any) -> int:
    numbers = eqn.params.get("dimension_numbers")
    if numbers is None:
        numbers = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (contracted, _), _ = numbers
    lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval
    return 2 * out.size * math.prod(lhs[dim] for dim in contracted)


def _conv_flops(eqn: Any) -> int:
    # rhs_spec: output features, input features of a group, spatial dims. Zeros that pad an image are counted,
    # zeros that dilate it (a transposed convolution) are not.
    rhs, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval
    _, features, *spatial = eqn.params["dimension_numbers"].rhs_spec
    taps = rhs[features] * math.prod(rhs[dim] for dim in spatial)
    return 2 * out.size * taps // math.prod(eqn.params["lhs_dilation"])
