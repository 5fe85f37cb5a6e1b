"""Help of the fields that every experiment shares; read from the sources, so that no class is imported."""

from __future__ import annotations

import re

from spmd.core.sources import FieldSource, classes_of, fields_of

# Field of an experiment -> the classes that it may hold, as module:Class; module:TABLE is a table of classes
# by name, of which --field NAME takes one.
SHARED = {
    "mesh": ("parallel.mesh:MeshConfig",),
    "train": ("train:TrainConfig",),
    "eval": ("train:EvalConfig",),
    "checkpoint": ("train:CheckpointConfig",),
    "log": ("train:LogConfig",),
    "run": ("train:RunConfig",),
    "runtime": ("runtime:RuntimeConfig",),
    "init": ("weights.config:InitConfig",),
    "budget": ("experiment.budget:CommsBudget",),
    "data": ("data:TFDS", "data.text:Text"),
    "optimizer": ("optim.registry:OPTIMIZERS",),
    "strategy": ("strategies:STRATEGIES",),
}
SINGLE = ("seed", "simulate", "param_dtype")  # fields of an experiment that hold no class


def shared_fields() -> str:
    """A table of all fields that experiments share: flag, type, default, help."""
    experiment = {f.name: f for f in fields_of("experiment.base:Experiment")}
    lines = [_line(f"--{name}", experiment[name]) for name in SINGLE]
    for prefix, places in SHARED.items():
        table = classes_of(places[0])
        if table:
            lines.append((f"--{prefix}", "|".join(table), "", "Changes the class."))
        names: set[str] = set()
        for place in table.values() if table else places:
            for f in fields_of(place):
                if f.name in names or f.nested or "Suppress" in f.kind:
                    continue
                names.add(f.name)
                lines.append(_line(f"--{prefix}.{f.name.rstrip('_')}", f))
    width = max(len(flag) for flag, *_ in lines)
    return "\n".join(
        f"  {flag:{width}}  {kind}  ({default})\n      {text}"
        if default
        else f"  {flag:{width}}  {kind}\n      {text}"
        for flag, kind, default, text in lines
    )


def _line(flag: str, field: FieldSource) -> tuple[str, str, str, str]:
    """Flag, type, default and help of a field."""
    text = field.help.replace("%%", "%")
    return flag.replace("_", "-"), _shown(field.kind), field.default, text


def _shown(kind: str) -> str:
    """An annotation for a reader: the values of a Literal, the type of an Annotated."""
    kind = re.sub(r"Annotated\[(\w+), .*", r"\1", kind)
    for old, new in (("Literal[", ""), ("]", ""), ('"', ""), ("'", ""), (", ", "|")):
        kind = kind.replace(old, new)
    return kind
