"""The fields that every experiment shares, read from the sources so that help needs no jax."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

from spmd import mesh, optim, strategies
from spmd.data import TFDS, Augment
from spmd.data.text import Text
from spmd.init import InitConfig
from spmd.plan.budget import CommsBudget
from spmd.runtime import RuntimeConfig
from spmd.train import CheckpointConfig, EvalConfig, LogConfig, RunConfig, TrainConfig

SHARED: dict[str, tuple[type, ...]] = {
    "mesh": (mesh.MeshConfig,),
    "train": (TrainConfig,),
    "eval": (EvalConfig,),
    "checkpoint": (CheckpointConfig,),
    "log": (LogConfig,),
    "run": (RunConfig,),
    "runtime": (RuntimeConfig,),
    "init": (InitConfig,),
    "budget": (CommsBudget,),
    "data": (TFDS, Text),
    "data.augment": (Augment,),
    "optimizer": tuple(optim.OPTIMIZERS.values()),
    "strategy": tuple(strategies.STRATEGIES.values()),
}


def field_help(cls: type) -> dict[str, str]:
    """Field name -> its attribute docstring, base classes included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body: Any = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for item, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[item.target.id] = after.value.value  # type: ignore[union-attr]
    return found


def shared_fields() -> str:
    """One line for each field: flag, type, default, help."""
    lines = [
        ("--seed", "int", "0", "Seed of parameters, data order and dropout."),
        ("--simulate", "int", "0", "Simulated CPU devices of each process; 0 uses the real ones."),
        (
            "--param-dtype",
            "float32|float64|bfloat16",
            "float32",
            "Type of parameters; those of bfloat16 have float32 gradients and optimizer state.",
        ),
    ]
    for prefix, classes in SHARED.items():
        if len(classes) > 1 and prefix != "data":
            names = "|".join(cls.name for cls in classes)  # type: ignore[attr-defined]
            lines.append((f"--{prefix}", names, "", "Changes the class."))
        seen: set[str] = set()
        for cls in classes:
            texts = field_help(cls)
            for f in dataclasses.fields(cls):
                nested = dataclasses.is_dataclass(f.default_factory)  # has its own row in SHARED
                if f.name in seen or nested or "Suppress" in str(f.type):
                    continue
                seen.add(f.name)
                default = "" if f.default is dataclasses.MISSING else repr(f.default)
                kind = (
                    re.sub(r"Annotated\[(\w+), .*", r"\1", str(f.type))
                    .replace("Literal[", "")
                    .replace("]", "")
                    .replace('"', "")
                    .replace(", ", "|")
                )
                lines.append(
                    (
                        f"--{prefix}.{f.name.rstrip('_').replace('_', '-')}",
                        kind,
                        default,
                        texts.get(f.name, "").replace("%%", "%"),
                    )
                )
    width = max(len(flag) for flag, *_ in lines)
    return "\n".join(
        f"  {flag:{width}}  {kind}  ({default})\n      {text}"
        if default
        else f"  {flag:{width}}  {kind}\n      {text}"
        for flag, kind, default, text in lines
    )
