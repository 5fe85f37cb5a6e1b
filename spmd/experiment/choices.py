"""Choices of an experiment file: parameters of its config(), which `--NAME VALUE` sets.

`def config(model: Literal["resnet", "vit"] = "resnet")` makes one file of several experiments, whose fields
differ together. The default is taken without the word. A parameter `init_from: str` has the value of the
field `--init.from`: the file builds its experiment from what that directory says. So has `task_teacher_from`
that of `--task.teacher.from`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from spmd.core.fields import check, closest

STARTS = ("init.from", "task.teacher.from")  # fields too, so their words stay among the others


def choices_of(config: Callable[..., Any]) -> dict[str, tuple[str, ...]]:
    """The values of each parameter of a config() that is a Literal of words, the default first; none for
    those of STARTS, which take any.
    """
    hints = typing.get_type_hints(config)
    found = {}
    for name, parameter in inspect.signature(config).parameters.items():
        values = typing.get_args(hints.get(name))
        is_literal = typing.get_origin(hints.get(name)) is Literal and parameter.default in values
        if is_literal and all(isinstance(value, str) for value in values):
            found[name] = (parameter.default, *(v for v in values if v != parameter.default))
        for start in STARTS:
            if name == argument(start) and hints.get(name) is str:
                found[start] = ()
    return found


def argument(name: str) -> str:
    """The parameter of config() of a choice."""
    return name.replace(".", "_")


def split(
    choices: Mapping[str, tuple[str, ...]], words: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """(the chosen value of each parameter that is set, the other words); ValueError for another value."""
    chosen, others = {}, []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in choices:
            others.append(word)
            continue
        value = value if equals else next(rest, "")
        known = choices[name]
        if name in STARTS:
            others += [flag, value]
        check(
            name in STARTS or value in known,
            f"{flag} {value}: choose one of {', '.join(known)}.{closest(value, known)}",
        )
        chosen[name] = value
    return chosen, others
