"""Rotary angles in a config.json, which has them in two forms: by version, and by kind of layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from spmd.models.attention import RopeScaling
from spmd.models.transformer import Transformer
from spmd.weights.huggingface.families import Family

DICTS = ("rope_parameters", "rope_scaling")
LOCAL = "rope_local_base_freq"
FIELDS = (*DICTS, "rope_theta", LOCAL)
# Kind there -> its fields, each with the field of RopeScaling.
KINDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency",
        "high_freq_factor": "high_frequency",
        "original_max_position_embeddings": "length",
    },
}
SILENT = {"rope_type", "type", "rope_theta", "original_max_position_embeddings"}
NONE = RopeScaling()


class Rope(NamedTuple):
    """Bases of the angles, of layers with a window too, and the scaling of the others."""

    theta: float
    window_theta: float
    scaling: RopeScaling


def build(model: Transformer, family: Family) -> dict[str, Any]:
    """The fields of config.json, as transformers reads them."""
    if not family.theta:
        return {}
    scaling = model.rope_scaling
    scaled = {name: getattr(scaling, to) for name, to in KINDS[_kind(scaling)].items()}
    angles = {"rope_type": _kind(scaling), **scaled}
    fields = {"rope_theta": model.rope_theta}  # where older versions look for it
    fields |= {"rope_scaling": angles} if scaled else {}
    full = {**angles, "rope_theta": model.rope_theta}
    if not family.window_theta:
        return fields | {"rope_parameters": full}
    theta = model.rope_theta_window or model.rope_theta
    local = {"rope_type": "default", "rope_theta": theta}
    both = {"full_attention": full, "sliding_attention": local}
    return fields | {LOCAL: theta, "rope_parameters": both}


def rope_of(model: Transformer) -> Rope:
    """The angles of a model."""
    theta = model.rope_theta
    scaling = NONE if model.rope_scaling.kind == "none" else model.rope_scaling
    if scaling.kind == "linear":
        scaling = RopeScaling(kind="linear", factor=scaling.factor)
    return Rope(theta, model.rope_theta_window or theta, scaling)


def parse(family: Family, fields: Mapping[str, Any]) -> tuple[Rope, list[str]]:
    """(the angles of a config.json, lines about what is unknown or contradicts itself)."""
    lines = [
        f"{name}: {fields[name]} in config.json, which is no object"
        for name in DICTS
        if name in fields and not isinstance(fields[name], Mapping)
    ]
    dicts, local = _split(family, fields)
    bases, scalings = {}, []
    if "rope_theta" in fields:
        bases["rope_theta"] = fields["rope_theta"]
    for name, value in dicts.items():
        if "rope_theta" in value:
            bases[f"{name}.rope_theta"] = value["rope_theta"]
        scaling, unknown = _scaling(name, value)
        lines += unknown
        scalings += [scaling] if scaling is not None else []
    _, unknown = _scaling("sliding_attention", local)
    lines += unknown
    if local.get("rope_type", "default") != "default":
        lines.append(f"rope_type: {local['rope_type']} in config.json for layers with a window")
    if len({*bases.values()}) > 1:
        pairs = "; ".join(f"{name}: {base}" for name, base in bases.items())
        lines.append(f"{pairs} in config.json, which disagree")
    if len({*scalings}) > 1:
        lines.append(f"{' and '.join(DICTS)} in config.json, which disagree")
    theta = next(iter(reversed(bases.values())), family.theta)
    window_theta = theta
    if family.window_theta:
        window_theta = local.get("rope_theta", fields.get(LOCAL, family.window_theta))
    scaling = next((each for each in scalings if each != NONE), NONE)
    return Rope(theta, window_theta, scaling), lines


def _split(family: Family, fields: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """(objects about the angles of layers without a window, that of those with one)."""
    dicts = {name: fields[name] for name in DICTS if isinstance(fields.get(name), Mapping)}
    nested = dicts.get("rope_parameters", {})
    if not family.window_theta or "full_attention" not in nested:
        return dicts, {}
    return dicts | {"rope_parameters": nested["full_attention"]}, nested.get(
        "sliding_attention", {}
    )


def _scaling(name: str, value: Mapping[str, Any]) -> tuple[RopeScaling | None, list[str]]:
    """(scaling that an object says, None for one that is unknown; lines about it)."""
    kind = value.get("rope_type", value.get("type", "default"))
    if kind not in KINDS:
        known = ", ".join(KINDS)
        return None, [f"rope_type: {kind} in config.json, which the model does not have ({known})"]
    wanted = KINDS[kind]
    lines = [
        f"{name}.{inner}: {value[inner]} in config.json, which the model does not have"
        for inner in sorted(value.keys() - SILENT - wanted.keys())
        if value[inner] is not None and (inner, value[inner]) != ("partial_rotary_factor", 1.0)
    ]
    absent = [inner for inner in wanted if value.get(inner) is None]
    if absent:
        return None, [*lines, f"{name}: {kind} in config.json lacks {', '.join(absent)}"]
    if kind == "default":
        return NONE, lines
    try:
        options = {to: value[inner] for inner, to in wanted.items()}
        return RopeScaling(kind=kind, **options), lines
    except (TypeError, ValueError) as error:
        return None, [*lines, f"{name}: {error}"]


def _kind(scaling: RopeScaling) -> str:
    return "default" if scaling.kind == "none" else scaling.kind
