"""Helpers of the configuration dataclasses: free fields, flat views, closest names. Standard library only."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def free(default: Any) -> Any:
    """A field that is not part of a run's identity: a run may be resumed with another value."""
    return dataclasses.field(default=default, metadata={"free": True})


def located(default: Any) -> Any:
    """An identity field that names the location of content: it may differ while the content is the same."""
    return dataclasses.field(default=default, metadata={"located": True})


def multiples(number: int, divisor: int) -> str:
    """`64 or 128`: the positive multiples of `divisor` next to a number that is none."""
    lower = number // divisor * divisor
    return f"{lower} or {lower + divisor}" if lower else str(divisor)


def closest(name: str, names: Iterable[str]) -> str:
    """` Did you mean 'x'?` when one of `names` is similar, else the empty string."""
    match = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def match_names(names: Iterable[str], patterns: Iterable[str], field: str) -> set[str]:
    """The names that a pattern matches, with or without the prefix `params/`; ValueError for a pattern that
    matches none. field: the field of the patterns, for messages.
    """
    names, matches = list(names), set[str]()
    for pattern in patterns:
        bare = pattern.removeprefix("params/")
        hits = {name for name in names if fnmatch.fnmatchcase(name, bare)}
        check(
            bool(hits),
            f"{field}: no array matches {pattern!r}.{closest(bare, names)} There are:"
            f" {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}",
        )
        matches |= hits
    return matches


def plain(value: Any) -> Any:
    """A configuration value as JSON types; dataclasses carry their class under `class`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        visible = [f for f in dataclasses.fields(value) if f.repr]
        return {"class": type(value).__name__} | {
            _typed_name(f): plain(getattr(value, f.name)) for f in visible
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


def restore(base: Any, recorded: Any, classes: Mapping[str, type] | None = None) -> Any:
    """The value that `plain` wrote as `recorded`, from another (`base`) of the same experiment file.

    classes: name -> class that may replace another one. ValueError for any other change of class.
    """
    if plain(base) == recorded:
        return base  # modules and functions too, which have no other way back
    if dataclasses.is_dataclass(base) and not isinstance(base, type):
        cls: Any = type(base)
        if recorded["class"] != cls.__name__:
            check(
                recorded["class"] in (classes or {}),
                f"{cls.__name__} is {recorded['class']} here; the experiment's file must say so",
            )
            base = (classes or {})[recorded["class"]]()
        changed = {
            f.name: restore(getattr(base, f.name), recorded[_typed_name(f)], classes)
            for f in dataclasses.fields(base)
            if f.repr and f.init
        }
        return dataclasses.replace(base, **changed)
    if isinstance(base, list | tuple) and _classes(plain(base)) != _classes(recorded):
        return type(base)(_rebuild(item, classes or {}) for item in recorded)
    if isinstance(base, list | tuple) and len(base) == len(recorded):
        return type(base)(restore(b, g, classes) for b, g in zip(base, recorded, strict=True))
    check(
        not callable(base),
        f"{plain(base)} is {recorded} here; the experiment's file must say so",
    )
    return tuple(recorded) if isinstance(recorded, list) else recorded


def _classes(recorded: list[Any]) -> list[Any]:
    """The classes of the dataclasses in a list that `plain` wrote."""
    return [item.get("class") for item in recorded if isinstance(item, dict)]


def _rebuild(recorded: Mapping[str, Any], classes: Mapping[str, type]) -> Any:
    """An instance of one of `classes` from its values as `plain` wrote them; ValueError for another class."""
    check(
        recorded["class"] in classes,
        f"{recorded['class']} is not in this list here; the experiment's file must say so",
    )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items()}
    values.pop("class")
    return classes[recorded["class"]](**values)


def _typed_name(field: dataclasses.Field[Any]) -> str:
    """The name of a field as users type it: `from`, a keyword of Python, is `from_` in a class."""
    return field.name.rstrip("_")


def identity(config: Any) -> dict[str, Any]:
    """The identity fields of a (nested) dataclass, flat: `{'optimizer.learning_rate': 0.1}`."""
    return flatten(config, lambda f: not f.metadata.get("free"))


def located_names(config: Any) -> set[str]:
    """Flat names, as in `identity`, of the fields that name the location of content."""
    unlocated = flatten(
        config, lambda f: not f.metadata.get("free") and not f.metadata.get("located")
    )
    return identity(config).keys() - unlocated.keys()


def flatten(
    config: Any, keep: Callable[[dataclasses.Field[Any]], bool] = lambda f: True
) -> dict[str, Any]:
    """The fields of a (nested) dataclass that `keep` accepts, as a flat dict of JSON types."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            flat[f"{prefix}class" if prefix else "class"] = type(value).__name__
            for f in dataclasses.fields(value):
                if f.repr and keep(f):
                    walk(f"{prefix}{_typed_name(f)}.", getattr(value, f.name))
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
        name = _typed_name(f)
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
