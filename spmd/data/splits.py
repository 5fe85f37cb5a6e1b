"""Slices of named splits: `train`, `train[:90%]`, `train[55000:]`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from spmd.core.fields import check, closest

_SPLIT = re.compile(r"(?P<split>\w+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def check_form(split: str) -> str:
    """The name in `NAME` or `NAME[start:stop]`; ValueError for another form."""
    match = _SPLIT.fullmatch(split)
    check(
        match is not None,
        f"split {split!r} is not NAME or NAME[start:stop] (numbers or percent)",
    )
    assert match is not None
    return match["split"]


def locate(split: str, sizes: Mapping[str, int], data_set: str) -> tuple[str, int, int]:
    """(name, first example, one past the last) of a split.

    Args:
      split: NAME or NAME[start:stop], numbers or percent.
      sizes: number of examples of each split that there is.
      data_set: its name, for messages.
    """
    name = check_form(split)
    check(
        name in sizes,
        f"data set {data_set!r} has no split {name!r}.{closest(name, sizes)}"
        f" It has: {', '.join(f'{k} ({v} examples)' for k, v in sizes.items())}",
    )
    match = _SPLIT.fullmatch(split)
    assert match is not None
    total = sizes[name]
    bounds = {"start": 0, "stop": total}
    for side, default in bounds.items():
        text = match[side]
        bounds[side] = default if text is None else _bound(text, total, split)
    return name, bounds["start"], bounds["stop"]


def _bound(text: str, total: int, split: str) -> int:
    """Index of one side of a slice; ValueError beyond the split."""
    percent = text.endswith("%")
    number, limit = int(text.removesuffix("%")), 100 if percent else total
    size_text = "100%" if percent else f"{total} examples"
    check(
        abs(number) <= limit, f"split {split!r}: {text} is beyond the split, which has {size_text}"
    )
    value = round(number * total / 100) if percent else number
    return value + total if number < 0 else value
