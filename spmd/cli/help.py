"""The fields that every experiment shares, read from the sources: help imports no class, and so no jax."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1]

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
    "data.augment": ("data:Augment",),
    "optimizer": ("optim.registry:OPTIMIZERS",),
    "strategy": ("strategies:STRATEGIES",),
}
SINGLE = ("seed", "simulate", "param_dtype")  # fields of an experiment that hold no class


class FieldSource(NamedTuple):
    """A field of a configuration class, as its source says.

    kind: the annotation. default: as repr writes it; "" where a value must be given. nested: a default made
    by a function, of a class that has rows of its own in SHARED.
    """

    name: str
    kind: str
    default: str
    help: str
    nested: bool = False


def fields_of(place: str) -> list[FieldSource]:
    """The fields of `module:Class`, inherited ones first, in the order of dataclasses.fields."""
    module, _, name = place.partition(":")
    found: dict[str, FieldSource] = {}
    node = _class(module, name)
    for base in node.bases:
        where = _defined(module, ast.unparse(base))
        if where:
            found |= {f.name: f for f in fields_of(where)}
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        kind = ast.unparse(item.annotation)
        if kind.startswith("ClassVar"):
            continue
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = str(after.value.value)
        default, nested = _default(item.value)
        field = FieldSource(item.target.id, kind, default, text, nested)
        found[field.name] = field
    return list(found.values())


def classes_of(place: str) -> dict[str, str]:
    """Name -> `module:Class` of each class in a table `{cls.name: cls for cls in (...)}`; {} for a class."""
    module, _, name = place.partition(":")
    for node in _tree(module).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            assert isinstance(node.value, ast.DictComp)
            listed = node.value.generators[0].iter
            assert isinstance(listed, ast.Tuple)
            places = [_defined(module, ast.unparse(item)) for item in listed.elts]
            return {_name_of(place): place for place in places}
    return {}


def shared_fields() -> str:
    """A table of all fields that experiments share: flag, type, default, help."""
    own = {f.name: f for f in fields_of("experiment.base:Experiment")}
    lines = [_line(f"--{name}", own[name]) for name in SINGLE]
    for prefix, places in SHARED.items():
        table = classes_of(places[0])
        if table:
            lines.append((f"--{prefix}", "|".join(table), "", "Changes the class."))
        seen: set[str] = set()
        for place in table.values() if table else places:
            for f in fields_of(place):
                if f.name in seen or f.nested or "Suppress" in f.kind:
                    continue
                seen.add(f.name)
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


def _default(value: ast.expr | None) -> tuple[str, bool]:
    """(the default as repr writes it, whether a function makes it), of what stands behind `=`."""
    if value is None:
        return "", False
    if isinstance(value, ast.Call):
        called = ast.unparse(value.func)
        if called.endswith(("free", "located")):
            return _default(value.args[0])
        if called == "dataclasses.field":
            given = {k.arg: k.value for k in value.keywords}
            if "default_factory" in given:
                return "", ast.unparse(given["default_factory"]) not in ("dict", "list", "tuple")
            return _default(given.get("default"))
    try:
        return repr(ast.literal_eval(value)), False
    except ValueError:
        return ast.unparse(value), False


@functools.cache
def _tree(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text("utf-8"))


def _class(module: str, name: str) -> ast.ClassDef:
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"spmd.{module} has no class {name}")


def _defined(module: str, name: str) -> str:
    """`module:Class` where the class lies that `module` calls `name`; "" for one of another package."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return f"{module}:{name}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spmd."):
            assert node.module
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _defined(node.module.removeprefix("spmd."), alias.name)
    return ""


def _name_of(place: str) -> str:
    """The value of a class's `name`."""
    module, _, name = place.partition(":")
    for item in _class(module, name).body:
        if isinstance(item, ast.AnnAssign) and ast.unparse(item.target) == "name" and item.value:
            return str(ast.literal_eval(item.value))
    raise LookupError(f"{place} has no name")
