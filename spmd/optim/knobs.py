"""Knobs: scalars of an optimizer that are arguments of the compiled step, not constants in it.

Runs that differ in them alone share one compiled step. A schedule asks for the argument while the step is
traced; outside of a step it has its configured value.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optax

Knobs = Mapping[str, Any]  # name -> float, or its tracer inside a step
_arguments: contextvars.ContextVar[Knobs] = contextvars.ContextVar("knobs")


@contextlib.contextmanager
def bind(knobs: Knobs) -> Iterator[None]:
    """The values of the knobs within the block."""
    token = _arguments.set(knobs)
    try:
        yield
    finally:
        _arguments.reset(token)


def value(name: str, default: float) -> Any:
    """The argument of a knob within a step that has it, else `default`."""
    return _arguments.get({}).get(name, default)


def decayed_weights(decay: float) -> optax.GradientTransformation:
    """optax.add_decayed_weights, by the knob `decay` within a step that has it."""
    import optax

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return optax.add_decayed_weights(value("decay", decay)).update(updates, state, params)

    return optax.GradientTransformation(optax.add_decayed_weights(decay).init, update)
