"""Long lists of a run, a vocabulary say, in a file beside config.json, which stays readable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from spmd.core.fields import check
from spmd.core.storage import json_text, write_atomically

FILE = "lists.json"
LONG = 2000  # characters of a list as JSON, from which on it is kept there


def separate(value: Any, lists: dict[str, Any], name: str = "") -> Any:
    """JSON types with a reference in place of each long list.

    Args:
        value: JSON types; lists may be tuples.
        lists: receives the long lists, by the names of their fields.
        name: of the field.

    Returns:
        The same, where long lists are {"file", "values": their number, "digest"}.
    """
    if isinstance(value, Mapping):
        return {k: separate(x, lists, f"{name}.{k}" if name else k) for k, x in value.items()}
    if not isinstance(value, list | tuple) or len(text := json_text(value)) < LONG:
        return value
    lists[name] = value
    return {"file": FILE, "values": len(value), "digest": _digest(text)}


def write(path: epath.Path, lists: Mapping[str, Any]) -> None:
    """Write the long lists, one in a line; nothing where there are none."""
    if lists:
        lines = [f"{json_text(name)}: {json_text(value)}" for name, value in lists.items()]
        write_atomically(path / FILE, "{\n" + ",\n".join(lines) + "\n}\n")


def restore(path: epath.Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Flat fields with the long lists in place of their references.

    Args:
        path: the run directory.
        fields: of config.json, as `separate` leaves them.

    Raises:
        ValueError, KeyError: the file of lists is missing, or damaged.
    """
    names = [name for name, x in fields.items() if _is_reference(x)]
    if not names:
        return dict(fields)
    try:
        lists = json.loads((path / FILE).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path / FILE} is missing") from None
    for name in names:
        same = _digest(json_text(lists[name])) == fields[name]["digest"]
        check(same, f"{path / FILE}: {name} is not what config.json says")
    return {**fields, **{name: lists[name] for name in names}}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_reference(value: Any) -> bool:
    keys = {"file", "values", "digest"}
    return isinstance(value, dict) and value.keys() == keys and value["file"] == FILE
