"""Transforms by name, as the command line gives them: `crop:1,flip,mixup:0.2`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from spmd.core.fields import check, closest
from spmd.core.values import number
from spmd.data.augment import Crop, Flip, Mixup
from spmd.data.color import ColorJitter, Normalize
from spmd.data.erasing import CutMix, RandomErasing
from spmd.data.hiding import DropTokens, MaskTokens
from spmd.data.randaugment import RandAugment
from spmd.data.resizing import CentralCrop, CropOrPad, Decode, RandomCrop, RandomResizedCrop, Resize
from spmd.data.transform import Transform

_CLASSES = (
    *(Decode, Resize, CropOrPad, CentralCrop, RandomCrop, RandomResizedCrop),
    *(Crop, Flip, ColorJitter, RandAugment, RandomErasing, Normalize, Mixup, CutMix),
    *(MaskTokens, DropTokens),
)
TRANSFORMS: dict[str, type[Transform]] = {cls.name: cls for cls in _CLASSES}


def parse(text: str) -> tuple[Transform, ...]:
    """The transforms of `NAME[:VALUE...],...`; the empty text is none.

    The values are those of the class's fields in their order, names of features joined by `+`:
    `crop:1:image+mask`. ValueError for an unknown name or a value that does not fit.
    """
    return tuple(_parse_one(word.strip()) for word in text.split(",")) if text.strip() else ()


def _parse_one(word: str) -> Transform:
    name, *values = word.split(":")
    check(
        name in TRANSFORMS,
        f"unknown transform {name!r}.{closest(name, TRANSFORMS)} Known: {', '.join(map(_usage, TRANSFORMS))}",
    )
    cls: Any = TRANSFORMS[name]
    fields = dataclasses.fields(cls)
    required = [f for f in fields if f.default is dataclasses.MISSING]
    check(
        len(required) <= len(values) <= len(fields) and all(values),
        f"{word!r} is not understood: {name} is given as {_usage(name)}",
    )
    kinds = typing.get_type_hints(cls)
    return cls(
        **{
            f.name: _value(word, f.name, kinds[f.name], text)
            for f, text in zip(fields, values, strict=False)
        }
    )


def _value(word: str, field: str, kind: Any, text: str) -> Any:
    """A word's value of a field, of its type."""
    if kind is str:
        return text
    if kind not in (int, float):
        inner = typing.get_args(kind)[0]
        return tuple(_value(word, field, inner, part) for part in text.split("+"))
    try:
        return int(text) if kind is int else number(text)
    except ValueError:
        takes = "a whole number" if kind is int else "a number"
        raise ValueError(f"{word!r}: {field} takes {takes}, not {text!r}") from None


def _usage(name: str) -> str:
    """`crop:PIXELS[:IMAGES]`."""
    fields = dataclasses.fields(TRANSFORMS[name])
    return name + "".join(
        f":{f.name.upper()}" if f.default is dataclasses.MISSING else f"[:{f.name.upper()}]"
        for f in fields
    )


def text_of(transforms: Sequence[Transform]) -> str:
    """The words that `parse` reads as these transforms; one of an experiment file as Python writes it."""
    return ",".join(map(_text_of_one, transforms))


def _text_of_one(transform: Transform) -> str:
    if TRANSFORMS.get(transform.name) is not type(transform):
        return repr(transform)
    fields = dataclasses.fields(transform)
    given = [getattr(transform, f.name) for f in fields]
    values = ["+".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in given]
    while values and given[len(values) - 1] == fields[len(values) - 1].default:
        values.pop()
    return ":".join([transform.name, *values])
