"""Docstrings of public functions: arguments and results that are arrays, and all of many parameters."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

ROOMS = ("api", "metrics", "models", "optim", "parallel", "strategies", "tasks")
# Functions of an Objective, whose docstring has their arguments; the parts of a pipeline's executor.
APART = ("spmd.tasks.tracing", "spmd.strategies.grads.pipeline")
MANY = 3  # parameters, from which on each is named


def modules(room: str) -> Iterator[Any]:
    """The module or the modules of a room."""
    module = importlib.import_module(f"spmd.{room}")
    yield module
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"spmd.{room}."):
        yield importlib.import_module(found.name)


def functions(module: Any) -> Iterator[tuple[str, Any]]:
    """Public functions and methods by name; a method that overrides another has the docstring of that."""
    own = {n: x for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__}
    for name, value in own.items():
        if name.startswith("_"):
            continue
        if inspect.isfunction(value):
            yield f"{module.__name__}.{name}", value
        for method, fn in vars(value).items() if inspect.isclass(value) else ():
            inherited = any(method in vars(base) for base in value.__mro__[1:])
            if inspect.isfunction(fn) and not method.startswith("_") and not inherited:
                yield f"{module.__name__}.{name}.{method}", fn


def is_array(annotation: Any) -> bool:
    """Whether an annotation, as text, is of arrays, or a collection of them."""
    return "jax.Array" in str(annotation) and not str(annotation).startswith(
        ("Callable", "Iterator")
    )


def missing(fn: Callable[..., Any]) -> str:
    """What a docstring should say and does not, else ""."""
    signature, doc = inspect.signature(fn), fn.__doc__ or ""
    # `parts` is what every function of a strategy is built from.
    params = [p for p in signature.parameters.values() if p.name not in ("self", "cls", "parts")]
    arrays = [p.name for p in params if is_array(p.annotation)]
    _, _, described = doc.partition("Args:")
    if not arrays:
        return "" if len(params) < MANY else _unnamed(params, doc)
    if not described:
        return f"Args: with the shape of {', '.join(arrays)}"
    if signature.return_annotation not in ("None", None) and "Returns:" not in doc:
        return "Returns:"
    return _unnamed(params, described)


def _unnamed(params: list[inspect.Parameter], doc: str) -> str:
    """The parameters that are not described as `name:`, or in a list of names before the colon."""
    return ", ".join(p.name for p in params if not re.search(rf"\b{p.name}\b[^.\n]*:", doc))


def test_public_functions_describe_their_arrays_and_parameters():
    lacking = [
        f"{name}: {text}"
        for room in ROOMS
        for module in modules(room)
        if not module.__name__.startswith(APART)
        for name, fn in functions(module)
        if (text := missing(fn))
    ]
    assert not lacking, "\n".join(lacking)


def bare(x: jax.Array, y: int) -> jax.Array:
    """Add."""
    return x + y


def described(x: jax.Array, y: int) -> jax.Array:
    """Add.

    Args:
        x: [n].
        y: a summand.

    Returns:
        [n].
    """
    return x + y


def test_the_rule_finds_what_is_missing():
    assert missing(bare) == "Args: with the shape of x" and not missing(described)
    described.__doc__ = described.__doc__.replace("y: a", "a")
    assert missing(described) == "y"
    described.__doc__ = described.__doc__.replace("Returns:", "")
    assert missing(described) == "Returns:"
    assert len([*functions(importlib.import_module("spmd.parallel.collectives"))]) > 10
