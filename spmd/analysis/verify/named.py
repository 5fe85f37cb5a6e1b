"""Extract the tensors that a step names (`scope.tap`) from its jaxpr, in forward order."""

# n: devices, b: batch rows per device

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from spmd.strategies import base

Lead = Literal["loop", "devices"]


class Named(NamedTuple):
    """A named tensor. lead: the kinds of its leading dims. place: its position in the program, as nested
    equation indices, with None for the iteration of a loop.
    """

    name: str
    place: tuple[int | None, ...]
    lead: tuple[Lead, ...]
    value: Any

    def within(self, index: int, lead: Lead | None = None) -> Named:
        """The tensor as an output of the equation `index` that contains it. lead: the dim added in front."""
        inner = (index, None) if lead == "loop" else (index,)
        return self._replace(place=inner + self.place, lead=((lead,) if lead else ()) + self.lead)


def tensors(strategy: base.Strategy, state: Any, batch: Any) -> list[Named]:
    """Runs a step and returns its named tensors as numpy arrays.

    The equations are those of strategy.step, traced with scope.bind(watched=True) around it.
    """
    shardings = (strategy.state_shardings, strategy.batch_shardings)
    jaxpr = jax.make_jaxpr(strategy.step)(state, batch)
    labels: list[Named] = []

    def run(state: Any, batch: Any) -> list[jax.Array]:
        labels.clear()
        args = jax.tree.leaves((state, batch))
        _run(jaxpr.jaxpr, jaxpr.consts, args, labels)
        return [tensor.value for tensor in labels]

    values = jax.jit(run, in_shardings=shardings)(state, batch)
    return [
        tensor._replace(value=np.array(value)) for tensor, value in zip(labels, values, strict=True)
    ]


def _run(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], collected: list[Named]
) -> list[Any]:
    """Evaluates a jaxpr and appends its named tensors, those inside loops, shard_map and calls included."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)
    read = lambda atom: atom.val if hasattr(atom, "val") else values[atom]
    for index, eqn in enumerate(jaxpr.eqns):
        inputs = [read(atom) for atom in eqn.invars]
        with eqn.ctx.manager:
            outputs = _equation(eqn, index, inputs, collected)
        values |= zip(eqn.outvars, outputs, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


# Equations that only wrap a jaxpr: without differentiation, evaluating that jaxpr is the same.
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"}
CALLS |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
LEADS: dict[str, Lead] = {"scan": "loop", "shard_map": "devices"}


def _equation(eqn: Any, index: int, inputs: list[Any], collected: list[Named]) -> list[Any]:
    kind, params = eqn.primitive.name, eqn.params
    if kind not in CALLS and kind not in LEADS:
        out = eqn.primitive.bind(*inputs, **params)
        outputs = list(out) if eqn.primitive.multiple_results else [out]
        if kind == "name":
            collected.append(Named(params["name"], (index,), (), outputs[0]))
        return outputs
    closed = params["call_jaxpr" if "call_jaxpr" in params else "jaxpr"]
    labels: list[Named] = []

    def body(*args: Any) -> list[Any]:
        labels.clear()
        inner = getattr(closed, "jaxpr", closed)  # a ClosedJaxpr wraps a Jaxpr
        return _run(inner, getattr(closed, "consts", ()), args, labels)

    lead = LEADS.get(kind)
    if lead == "loop":
        outputs, values = _scan(params, body, labels, inputs)
    elif lead == "devices":
        outputs, values = _shard_map(params, body, labels, inputs)
    else:
        outputs, values = body(*inputs), [label.value for label in labels]
    # Leave out the second computation of a rematerialised block, in the backward pass.
    if not params.get("differentiated"):
        collected += [
            label._replace(value=value).within(index, lead)
            for label, value in zip(labels, values, strict=True)
        ]
    return outputs


def _scan(
    params: Any, body: Callable[..., list[Any]], labels: list[Named], inputs: list[Any]
) -> tuple[list[Any], list[Any]]:
    """(outputs, named values stacked over the iterations)."""
    if "ft_in" in params:  # JAX 0.12
        consts, carry, xs = (list(part) for part in params["ft_in"].update(inputs).unpack())
    else:
        first, num = params["num_consts"], params["num_carry"]
        consts, carry, xs = inputs[:first], inputs[first : first + num], inputs[first + num :]
    num_carry = len(carry)

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
        out = body(*consts, *carry, *x)
        return out[:num_carry], (out[num_carry:], [label.value for label in labels])

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, values) = jax.lax.scan(step, carry, xs, **options)
    return [*carry, *ys], values


def _shard_map(
    params: Any, body: Callable[..., list[Any]], labels: list[Named], inputs: list[Any]
) -> tuple[list[Any], list[Any]]:
    """(outputs, named values stacked over the devices)."""
    mesh, manual = params["mesh"], params["newly_manual_axes"]
    axes = tuple(axis for axis in mesh.axis_names if axis in manual)

    def local(*args: Any) -> tuple[list[Any], list[Any]]:
        out = body(*args)
        return out, [label.value[None] for label in labels]

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(params["in_specs"]),
        out_specs=(list(params["out_specs"]), P(axes)),
        check_vma=params["check_vma"],
        axis_names=set(manual),
    )
    return mapped(*inputs)


def align(want: Named, got: Named) -> tuple[np.ndarray, np.ndarray] | None:
    """Both values in one shape: loop dims first, then the rows of all devices concatenated. Where each device
    holds the complete tensor, `got` keeps a leading device dim. None where the shapes cannot be matched.
    """
    loops = want.lead.count("loop")
    if want.lead != ("loop",) * loops or got.lead.count("loop") != loops:
        return None
    value = got.value
    if "devices" not in got.lead:
        return (want.value, value) if value.shape == want.value.shape else None
    if got.lead.count("devices") > 1:
        return None
    value = np.moveaxis(value, got.lead.index("devices"), loops)  # [loops, n, b, ...]
    if value.shape[:loops] + value.shape[loops + 1 :] == want.value.shape:
        return want.value, np.moveaxis(value, loops, 0)
    if value.ndim < loops + 2:
        return None
    rows = value.reshape(*value.shape[:loops], -1, *value.shape[loops + 2 :])
    return (want.value, rows) if rows.shape == want.value.shape else None
