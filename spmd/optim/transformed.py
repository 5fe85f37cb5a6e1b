"""Any optax transformation as an optimizer."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import tyro

from spmd.core import fields
from spmd.core.fields import check
from spmd.core.storage import json_text
from spmd.optim.base import Optimizer

if TYPE_CHECKING:
    import optax

    from spmd.optim.base import Dims


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optax(Optimizer):
    """Any optax transformation, as `Optax(build=lambda rate: optax.adabelief(rate))` in an experiment's file.

    Clipping and the moving average are those of every optimizer, before and after the transformation; weight
    decay is its own.
    """

    name: ClassVar[str] = "optax"
    build: tyro.conf.Suppress[Callable[..., Any]]
    """Function of the learning-rate schedule that returns an optax.GradientTransformation."""
    digest: tyro.conf.Suppress[str] = dataclasses.field(init=False)
    """Digest of the function's source, by which a run directory recognises it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if callable(self.build):  # else the experiment's check names the field and its type
            object.__setattr__(self, "digest", source_digest(self.build))

    def rule(
        self, rate: optax.Schedule, decay: float, matrices: Any, dims: Dims
    ) -> list[optax.GradientTransformation]:
        import optax

        check(
            not decay,
            f"weight decay {decay} has no effect on an Optax optimizer: give it within build, as"
            " optax.adamw(rate, weight_decay=...)",
        )
        built = self.build(rate)
        check(
            isinstance(built, optax.GradientTransformation),
            f"optimizer.build must return an optax.GradientTransformation, not {type(built).__name__}",
        )
        return [built]


def source_digest(fn: Any) -> str:
    """Twelve hex digits of what a function computes: its source without comments and layout, the constants
    that it closes over, the arguments of a functools.partial. A function of optax is its name.

    Raises:
        ValueError: the source cannot be read.
    """
    described = json_text(_describe(fn), sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def _describe(fn: Any) -> Any:
    """JSON of a function, as `source_digest` takes it; of another value that of a configuration."""
    if isinstance(fn, functools.partial):
        return [_describe(x) for x in (fn.func, *fn.args, *fn.keywords, *fn.keywords.values())]
    if dataclasses.is_dataclass(fn) and not isinstance(fn, type):
        return fields.plain(fn)
    if not callable(fn):
        return fields.plain(fn) if isinstance(fn, bool | int | float | str | tuple) else ""
    if str(getattr(fn, "__module__", "")).partition(".")[0] in ("optax", "jax", "numpy"):
        return fields.plain(fn)
    function: Any = fn if inspect.isfunction(fn) else type(fn).__call__
    try:
        lines, _ = inspect.findsource(function)
        first = function.__code__.co_firstlineno
    except (OSError, TypeError, AttributeError):
        raise ValueError(
            f"optimizer.build={fields.plain(fn)} has no source that a run could be recognised by: use a"
            " function or a lambda of a file"
        ) from None
    kinds = (ast.FunctionDef, ast.Lambda)
    sources = [
        ast.unparse(node)
        for node in ast.walk(ast.parse("".join(lines)))
        if isinstance(node, kinds) and _first_line(node) == first
    ]
    closed = inspect.getclosurevars(function).nonlocals if inspect.isfunction(fn) else {}
    return [sources, {name: _describe(value) for name, value in closed.items()}]


def _first_line(node: ast.FunctionDef | ast.Lambda) -> int:
    """The line at which the code of a function begins: that of its first decorator."""
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])
