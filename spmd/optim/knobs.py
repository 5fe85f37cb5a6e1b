"""Knobs: scalars of an optimizer that are arguments of the compiled step, not constants in it.

Runs that differ in them alone share one compiled step. A schedule asks for the argument while the step is
traced; outside of a step it has its configured value.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optax

Knobs = Mapping[str, Any]  # name -> float, or its tracer inside a step
_arguments: contextvars.ContextVar[Knobs] = contextvars.ContextVar("knobs")
_prefix: contextvars.ContextVar[str] = contextvars.ContextVar("knob_prefix", default="")


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


@contextlib.contextmanager
def within(prefix: str) -> Iterator[None]:
    """Begin the names of the knobs of all that is built within the block with `prefix`."""
    token = _prefix.set(prefix)
    try:
        yield
    finally:
        _prefix.reset(token)


def namer() -> Callable[[str], str]:
    """A function from the name of a knob to that with the prefix of this block."""
    prefix = _prefix.get()
    return lambda name: prefix + name


def decayed_weights(decay: float, name: str = "decay") -> optax.GradientTransformation:
    """optax.add_decayed_weights, by the knob `name` within a step that has it."""
    import optax

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return optax.add_decayed_weights(value(name, decay)).update(updates, state, params)

    return optax.GradientTransformation(optax.add_decayed_weights(decay).init, update)
