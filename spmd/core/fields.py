"""Helpers of the configuration dataclasses: free fields, flat views, closest names. Standard library only."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def free(default: Any) -> Any:
    """A field that is not part of a run's identity: a run may be resumed with another value."""
    return dataclasses.field(default=default, metadata={"free": True})


def located(default: Any) -> Any:
    """An identity field that only says where content lies, and may differ where the content is known."""
    return dataclasses.field(default=default, metadata={"located": True})


def multiples(number: int, of: int) -> str:
    """`64 or 128`: the positive multiples of `of` next to a number that is none."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)


def closest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` when a known name is near, else the empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def plain(value: Any) -> Any:
    """A configuration value as JSON types; dataclasses carry their class under `class`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [f for f in dataclasses.fields(value) if f.repr]
        return {"class": type(value).__name__} | {
            _shown(f): plain(getattr(value, f.name)) for f in shown
        }
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value):  # a module class or a function from the experiment file
        return f"{getattr(value, '__qualname__', type(value).__qualname__)}"
    return str(value)


def restored(base: Any, given: Any, classes: Mapping[str, type] | None = None) -> Any:
    """The value of which `plain` made `given`, from another (`base`) of the same experiment file.

    classes: by name, those that may stand in the place of another. ValueError for any other change of class.
    """
    if plain(base) == given:
        return base  # modules and functions too, which have no other way back
    if dataclasses.is_dataclass(base) and not isinstance(base, type):
        cls: Any = type(base)
        if given["class"] != cls.__name__:
            check(
                given["class"] in (classes or {}),
                f"{cls.__name__} is {given['class']} here; the experiment's file must say so",
            )
            base = (classes or {})[given["class"]]()
        changed = {
            f.name: restored(getattr(base, f.name), given[_shown(f)], classes)
            for f in dataclasses.fields(base)
            if f.repr and f.init
        }
        return dataclasses.replace(base, **changed)
    if isinstance(base, list | tuple) and len(base) == len(given):
        return type(base)(restored(b, g, classes) for b, g in zip(base, given, strict=True))
    check(
        not callable(base),
        f"{plain(base)} is {given} here; the experiment's file must say so",
    )
    return tuple(given) if isinstance(given, list) else given


def _shown(field: dataclasses.Field[Any]) -> str:
    """The name of a field as it is typed: `from`, which Python has for itself, is `from_` in a class."""
    return field.name.rstrip("_")


def identity(config: Any) -> dict[str, Any]:
    """The identity fields of a (nested) dataclass, flat: `{'optimizer.learning_rate': 0.1}`."""
    return flatten(config, lambda f: not f.metadata.get("free"))


def located_in(config: Any) -> set[str]:
    """The names, flat as in `identity`, of the fields that only say where content lies."""
    kept = flatten(config, lambda f: not f.metadata.get("free") and not f.metadata.get("located"))
    return identity(config).keys() - kept.keys()


def flatten(
    config: Any, keep: Callable[[dataclasses.Field[Any]], bool] = lambda f: True
) -> dict[str, Any]:
    """The fields of a (nested) dataclass as a flat dict of JSON types; `keep` says which."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            flat[f"{prefix}class" if prefix else "class"] = type(value).__name__
            for f in dataclasses.fields(value):
                if f.repr and keep(f):
                    walk(f"{prefix}{_shown(f)}.", getattr(value, f.name))
        elif isinstance(value, list | tuple) and any(map(dataclasses.is_dataclass, value)):
            for i, item in enumerate(value):
                walk(f"{prefix}{i}.", item)
        else:
            flat[prefix[:-1]] = plain(value)

    walk("", config)
    return flat


def defaults(config: Any) -> dict[str, Any]:
    """The identity fields that have a default in their class, flat as `identity`, with that default.

    A run that was recorded before a field existed ran with what is now its default.
    """
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if not f.repr or f.metadata.get("free"):
            continue
        name = _shown(f)
        if dataclasses.is_dataclass(value):
            flat |= {f"{name}.{k}": v for k, v in defaults(value).items()}
        default = f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        if dataclasses.is_dataclass(default) and type(default) is type(value):
            flat |= {f"{name}.{k}": v for k, v in identity(default).items()}
        elif default is not dataclasses.MISSING and not dataclasses.is_dataclass(value):
            flat[name] = plain(default)
    return flat


def check(condition: bool, message: str) -> None:
    """Raises ValueError(message) for a user's mistake."""
    if not condition:
        raise ValueError(message)
