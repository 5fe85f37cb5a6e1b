"""Command-line overrides of an experiment: fields by their name, and the classes of two of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from spmd import optim, strategies
from spmd.core import sources
from spmd.core.fields import check
from spmd.core.parsing import parse
from spmd.core.values import check as check_values
from spmd.core.values import number

if TYPE_CHECKING:
    import tyro

E = TypeVar("E", bound=Any)


def _swap_classes(experiment: E, args: list[str]) -> tuple[E, list[str]]:
    """Apply `--strategy NAME` and `--optimizer NAME`: another class, with its default fields."""
    remaining: list[str] = []
    words = iter(args)
    for word in words:
        flag, _, value = word.partition("=")
        if flag in ("--strategy", "--optimizer"):
            value = value or next(words, "")
            field = flag[2:]
            module = strategies if field == "strategy" else optim
            names = strategies.STRATEGIES if field == "strategy" else optim.OPTIMIZERS
            check(
                bool(value) and not value.startswith("--"),
                f"{flag} needs a value, one of {', '.join(names)}",
            )
            cls = module.named(value)
            if type(getattr(experiment, field)) is not cls:
                experiment = dataclasses.replace(experiment, **{field: cls()})
        else:
            remaining.append(word)
    return experiment, remaining


def override(
    experiment: E,
    args: Sequence[str],
    extra: type | None = None,
    prog: str = "run.py",
    choices: Mapping[str, Sequence[str]] | None = None,
) -> tuple[E, Any]:
    """Apply command-line words to an experiment: (the experiment, the command's options).

    Args:
        experiment: an spmd.Experiment.
        args: the words.
        extra: a dataclass of the options of a command; None: there are none.
        prog: name of the program, for the help.
        choices: of the experiment's file, for the help.

    Raises:
        ValueError: a word is not understood; a single line.
    """
    import tyro

    experiment, words = _swap_classes(experiment, list(args))
    texts = _help()
    arguments: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(experiment):
        value = getattr(experiment, f.name)
        if f.name in ("name", "evaluations") or (
            not dataclasses.is_dataclass(value) and f.name in ("model", "task")
        ):
            continue
        kind = type(value) if dataclasses.is_dataclass(value) else _TYPES[f.name]
        arguments.append(
            (
                f.name,
                Annotated[kind, tyro.conf.arg(help=texts[f.name])],
                dataclasses.field(default=value),
            )
        )
    if extra is not None:
        arguments.append(
            (
                "options",
                Annotated[extra, tyro.conf.arg(name="")],
                dataclasses.field(default_factory=extra),
            )
        )
    fields_class = dataclasses.make_dataclass("Fields", arguments, frozen=True, kw_only=True)
    chosen = [f"--{name} {{{','.join(names)}}}" for name, names in (choices or {}).items() if names]
    description = f"Experiment {experiment.name}{' '.join(['', *chosen])}. Fields and their values:"
    parsed = parse(fields_class, words, prog, description=description, registry=_finite_numbers())
    values = {name: getattr(parsed, name) for name, *_ in arguments if name != "options"}
    for name, value in values.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            # tyro keeps derived fields of the default: __post_init__ derives them again
            values[name] = dataclasses.replace(value)
    options = getattr(parsed, "options", None)
    if options is not None:
        check_values(options)
    return dataclasses.replace(experiment, **values), options


def _finite_numbers() -> tyro.constructors.ConstructorRegistry:
    """A rule for tyro that accepts finite floats only: no `inf`, `nan` or `1e400`."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: Any) -> Any:
        if info.type is not float:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="FLOAT",
            instance_from_str=lambda words: number(words[0]),
            is_instance=lambda x: isinstance(x, int | float),
            str_from_instance=lambda x: [str(x)],
        )

    return registry


_TYPES: dict[str, Any] = {
    "seed": int,
    "simulate": int,
    "param_dtype": Literal["float32", "float64", "bfloat16"],
}


def _help() -> dict[str, str]:
    """Field of an experiment -> its docstring, with the names of the classes that it may hold."""
    texts = {f.name: f.help for f in sources.fields_of("experiment.base:Experiment")}
    for field, names in (("optimizer", optim.OPTIMIZERS), ("strategy", strategies.STRATEGIES)):
        texts[field] = f"{texts[field].rstrip('.')} ({', '.join(names)})."
    return texts
