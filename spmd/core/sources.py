"""Configuration classes as their sources define them: fields, types, defaults, docstrings; imports none."""

from __future__ import annotations

import ast
import functools
from typing import NamedTuple

from spmd.core.explain import PACKAGE


class FieldSource(NamedTuple):
    """A field of a configuration class, as its source says.

    kind: the annotation. default: as repr writes it; "" where a value must be given. nested: the default is
    an instance of another configuration class.
    """

    name: str
    kind: str
    default: str
    help: str
    nested: bool = False


def fields_of(place: str) -> list[FieldSource]:
    """The fields of `module:Class`, inherited ones first, in the order of dataclasses.fields."""
    module, _, name = place.partition(":")
    fields: dict[str, FieldSource] = {}
    node = _class(module, name)
    for base in node.bases:
        definition = _resolve(module, ast.unparse(base))
        if definition:
            fields |= {f.name: f for f in fields_of(definition)}
    for item, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        kind = ast.unparse(item.annotation)
        if kind.startswith("ClassVar"):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = str(following.value.value)
        default, nested = _default(item.value)
        field = FieldSource(item.target.id, kind, default, text, nested)
        fields[field.name] = field
    return list(fields.values())


def classes_of(place: str) -> dict[str, str]:
    """Name -> `module:Class` of each class in a table `{cls.name: cls for cls in (...)}`; {} for a class."""
    module, _, name = place.partition(":")
    for node in _parse(module).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            assert isinstance(node.value, ast.DictComp)
            classes = node.value.generators[0].iter
            assert isinstance(classes, ast.Tuple)
            places = [_resolve(module, ast.unparse(item)) for item in classes.elts]
            return {_name(place): place for place in places}
    return {}


def _default(value: ast.expr | None) -> tuple[str, bool]:
    """(the default as repr writes it, whether it is an instance of a configuration class)."""
    if value is None:
        return "", False
    if isinstance(value, ast.Call):
        function = ast.unparse(value.func)
        if function.endswith(("free", "located")):
            return _default(value.args[0])
        if function == "dataclasses.field":
            options = {k.arg: k.value for k in value.keywords}
            if "default_factory" in options:
                return "", ast.unparse(options["default_factory"]) not in ("dict", "list", "tuple")
            return _default(options.get("default"))
    try:
        return repr(ast.literal_eval(value)), False
    except ValueError:
        return ast.unparse(value), False


@functools.cache
def _parse(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text("utf-8"))


def _class(module: str, name: str) -> ast.ClassDef:
    for node in _parse(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"spmd.{module} has no class {name}")


def _resolve(module: str, name: str) -> str:
    """The `module:Class` that `name` means inside `module`; "" for a class of another package."""
    for node in _parse(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return f"{module}:{name}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spmd."):
            assert node.module
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _resolve(node.module.removeprefix("spmd."), alias.name)
    return ""


def _name(place: str) -> str:
    """The value of a class's `name`."""
    module, _, name = place.partition(":")
    for item in _class(module, name).body:
        if isinstance(item, ast.AnnAssign) and ast.unparse(item.target) == "name" and item.value:
            return str(ast.literal_eval(item.value))
    raise LookupError(f"{place} has no name")
