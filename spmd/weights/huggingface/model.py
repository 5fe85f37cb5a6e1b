"""The model that a config.json of Hugging Face describes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spmd.core.explain import InputError
from spmd.models.moe import Experts
from spmd.models.transformer import Transformer
from spmd.weights.huggingface import config, files, others, rope
from spmd.weights.huggingface.families import FAMILIES, FREE


def from_directory(directory: str) -> Transformer:
    """The decoder of a directory's config.json.

    Raises:
        ValueError: there is none, or no model computes what it says; with the fields that are in the way.
    """
    path = Path(os.path.abspath(os.path.expanduser(directory)))
    file = path / "config.json"
    if not file.is_file():
        raise InputError(
            f"init.from={directory!r} has no config.json, which says what the model is: give a directory as"
            " save_pretrained of transformers writes it"
        )
    try:
        foreign = files.read_json(file)
    except ValueError as error:
        raise InputError(str(error)) from None
    family = foreign.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"init.from: {file}: {_unknown_family(foreign)}")
    model, lines = from_fields(family, foreign)
    if model is None or lines:
        head = f"init.from: {file}: no model here computes what it says: "
        raise InputError(head + "; ".join(lines))
    return model


def from_fields(family: str, foreign: Mapping[str, Any]) -> tuple[Transformer | None, list[str]]:
    """(the model of a family with these fields of config.json, lines about those that it has not).

    Args:
        family: one of FAMILIES.
        foreign: the fields.

    Returns:
        None in place of the model where the fields are no model at all.
    """
    row = FAMILIES[family]
    fields = {name: value for name, value in foreign.items() if value is not None}
    nulls = dict.fromkeys(config.NULLABLE & foreign.keys() - fields.keys())
    values = config.with_defaults(row, fields, nulls)
    absent = [name for name in row.sizes if name not in values and name != "router_aux_loss_coef"]
    absent = [
        name for name in absent if row.sizes[name] not in ("score_cap", "logit_cap", "dropout")
    ]
    if absent:
        return None, [f"{', '.join(absent)}: absent"]
    options: dict[str, Any] = {
        name: value
        for name, value in row.model.items()
        if value is not FREE and "." not in name and name != "kv_heads"
    }
    experts: dict[str, Any] = {}
    for name, field in row.sizes.items():
        value = values.get(name)
        if value is not None and field.startswith("experts."):
            experts[field.removeprefix("experts.")] = value
        elif value is not None:
            options[field] = value
    lines: list[str] = []
    if row.theta:
        angles, lines = rope.parse(row, fields)
        options |= {"rope_theta": float(angles.theta), "rope_scaling": angles.scaling}
        if row.window_theta:
            options["rope_theta_window"] = float(angles.window_theta)
    try:
        sizes = config.windows(row, {**fields, **nulls}, options["layers"])
        model = Transformer(**_plain(options), experts=Experts(**experts), window=_period(sizes))
    except (TypeError, ValueError) as error:
        return None, [*lines, str(error)]
    return model, lines or config.find_differences(model, family, foreign)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Without sizes that are those which 0 stands for, and numbers of the fields' types."""
    options = {n: float(x) if n in ("score_cap", "logit_cap") else x for n, x in options.items()}
    if options.get("kv_heads") == options["heads"]:
        del options["kv_heads"]
    if options["heads"] and options.get("head_dim") == options["embed"] // options["heads"]:
        del options["head_dim"]
    return options


def _period(sizes: list[int]) -> tuple[int, ...]:
    """The shortest pattern that the windows of the layers repeat; () without windows."""
    if not any(sizes):
        return ()
    repeats = lambda n: all(size == sizes[i % n] for i, size in enumerate(sizes))
    return tuple(sizes[: next(n for n in range(1, len(sizes) + 1) if repeats(n))])


def _unknown_family(foreign: Mapping[str, Any]) -> str:
    """Message about a family that is not known: the closest one, and what it would lack."""
    name = str(foreign.get("model_type") or "")
    known = f"known are {', '.join(FAMILIES)}"
    if not name:
        return f"it has no model_type; {known}"
    if name in others.FAMILIES:
        return (
            f"the family {name!r} is read into the model that an experiment names"
            f" ({' or '.join(others.models_of(name))}), and this one builds decoders; {known}"
        )
    if foreign.get("auto_map"):
        return f"model_type {name!r} comes with code of its own (auto_map), which is not executed; {known}"
    (closest,) = difflib.get_close_matches(name, FAMILIES, 1, 0.0)
    fields = {n: x for n, x in foreign.items() if n not in ("model_type", "architectures")}
    _, lines = from_fields(closest, fields)
    lacks = [line.partition(":")[0] for line in lines]
    text = f"the family {name!r} is not known. The closest is {closest}"
    text += f", which lacks: {', '.join(lacks[:6])}" if lacks else ""
    return f"{text}{f' and {len(lacks) - 6} more' if len(lacks) > 6 else ''}; {known}"
