"""Check every value of a configuration: of its declared type, finite, no wider than 32 bits.

Standard library only. Bounds of a single field are checked by its class; these hold for all fields.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Iterator
from typing import Any

MOST = 2**31 - 1  # steps, sizes and ids are int32 on the devices
LARGEST = 3.4e38  # so are fractions float32
SHOWN = 60  # characters of a value that a message shows


def problems(config: Any, prefix: str = "") -> Iterator[str]:
    """Messages about the values of a (nested) dataclass, each with the name of its field.

    A field may allow more: `metadata={"most": N}` for a whole number, `{"infinite": True}` for a float.
    """
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name.rstrip('_')}"
        hint = hints.get(field.name, Any)
        if not fits(value, hint):
            yield f"{name}={shorten(value)} must be {describe_type(hint)}, not {_kind(value)}"
        else:
            yield from _problems_of_value(
                value, name, field.metadata, of_floats=_mentions(hint, float)
            )


def check(config: Any, prefix: str = "") -> None:
    """ValueError with the first of `problems`."""
    for message in problems(config, prefix):
        raise ValueError(message)


def _problems_of_value(
    value: Any, name: str, metadata: typing.Mapping[str, Any], *, of_floats: bool
) -> Iterator[str]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from problems(value, f"{name}.")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _problems_of_value(item, f"{name}[{i}]", metadata, of_floats=of_floats)
    elif isinstance(value, numbers.Integral) and not of_floats:
        if abs(int(value)) > (limit := metadata.get("most", MOST)):
            yield f"{name}={shorten(value)} is too large: its magnitude is at most {limit}"
    elif isinstance(value, numbers.Real) and not _in_range(value) and not metadata.get("infinite"):
        yield f"{name}={shorten(value)} must be a finite number of float32"


def _in_range(value: Any) -> bool:
    return abs(value) <= LARGEST  # nan is in no range


def number(text: str) -> float:
    """The float of a word of the command line; ValueError unless it is finite."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not _in_range(value):
        raise ValueError(f"{text!r} must be a finite number of float32")
    return value


def shorten(value: Any) -> str:
    """`repr`, shortened; the name of a class; also an integer that is too long for `repr`."""
    if isinstance(value, type):
        return value.__qualname__
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except Exception:  # a class of the user's, or a name that is imported for type checkers only
        return {}


def _mentions(hint: Any, kind: type) -> bool:
    return hint is kind or any(_mentions(arg, kind) for arg in typing.get_args(hint))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the annotated type; True where that cannot be decided."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Annotated:
        return fits(value, args[0])
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if hint is None or hint is types.NoneType:
        return value is None
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if origin in (tuple, list, collections.abc.Sequence):
        return isinstance(value, list | tuple) and _items_fit(value, args, fixed=origin is tuple)
    if origin is collections.abc.Callable or hint is collections.abc.Callable:
        return callable(value)
    kind = origin or hint
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    return isinstance(value, kind)


def _items_fit(value: Any, args: tuple[Any, ...], *, fixed: bool) -> bool:
    if not args:
        return True
    if fixed and args[-1] is not Ellipsis:
        same = len(value) == len(args)
        return same and all(fits(item, arg) for item, arg in zip(value, args, strict=True))
    return all(fits(item, args[0]) for item in value)


def describe_type(hint: Any) -> str:
    """An annotation in words: `a whole number`, `one of 'rms', 'layer'`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return describe_type(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args)
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, args))}"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "a string",
        types.NoneType: "None",
    }
    if origin in (tuple, list) and args:
        inner = [arg for arg in args if arg is not Ellipsis]
        separator = ", each " if args[-1] is Ellipsis or origin is list else " of "
        return f"a {origin.__name__}{separator}{', '.join(map(describe_type, inner))}"
    return words.get(hint, f"of type {getattr(hint, '__name__', str(hint))}")


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
