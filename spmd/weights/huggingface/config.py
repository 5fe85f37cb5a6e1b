"""config.json of Hugging Face: written from a model, compared with it, and a model from it.

A field is compared with the model, or has a supported value, or changes no output. Any other is refused by
name, since it may belong to a model with another function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spmd.core.fields import closest
from spmd.models.transformer import Transformer
from spmd.weights.huggingface import others, rope
from spmd.weights.huggingface.families import DEFAULTS, FAMILIES, Family, value_of
from spmd.weights.huggingface.fields import HARMLESS, NULLABLE, SAME, SUPPORTED

APART = {"architectures", "sliding_window", "layer_types", *rope.FIELDS}  # compared separately


def build_config(model: Any, family: str, dtype: str) -> dict[str, Any]:
    """The fields of config.json that determine the output of the model, as transformers reads them."""
    if family in others.FAMILIES:
        return others.FAMILIES[family].build_config(model, dtype)
    row = FAMILIES[family]
    fields = {
        "model_type": family,
        "architectures": [row.architecture],
        "dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        "attention_dropout": 0.0,
    }
    fields |= {name: value_of(model, field) for name, field in row.sizes.items()}
    fields |= {**row.fixed, **rope.build(model, row)}
    if row.windows != "none":
        fields["sliding_window"] = max(model.windows) or None
    if row.windows == "layers":
        kinds = {True: "sliding_attention", False: "full_attention"}
        fields["layer_types"] = [kinds[model.window_of(i) > 0] for i in range(model.layers)]
    return fields


def find_differences(model: Any, family: str, foreign: Mapping[str, Any]) -> list[str]:
    """Fields of a config.json that the model contradicts, or whose meaning is unknown.

    Returns a line for each field. A field that is null is one that is absent, as in transformers, but for
    those of NULLABLE.
    """
    if foreign.get("model_type", family) != family:
        return [f"model_type: {foreign['model_type']} in config.json, {family} in the model"]
    fields = {name: value for name, value in foreign.items() if value is not None}
    nulls = dict.fromkeys(NULLABLE & foreign.keys() - fields.keys())
    if family in others.FAMILIES:
        fields = getattr(others.FAMILIES[family], "normalised", dict)(fields)
        values = {**others.FAMILIES[family].DEFAULTS[family], **fields}
        return [
            *_compare_sizes(build_config(model, family, ""), fields, values),
            *(
                f"{name}: {fields[name]} in config.json, which {family} does not have"
                for name in rope.FIELDS
                if name in fields
            ),
            *_compare_others(model, family, fields),
        ]
    row = FAMILIES[family]
    return [
        *_compare_sizes(build_config(model, family, ""), fields, with_defaults(row, fields, nulls)),
        *_compare_aliases(row, fields),
        *_compare_rope(model, family, fields),
        *_compare_windows(model, row, fields | nulls),
        *_compare_others(model, family, fields),
    ]


def with_defaults(
    row: Family, fields: Mapping[str, Any], nulls: Mapping[str, None] | None = None
) -> dict[str, Any]:
    """Fields of a config.json with the defaults of its class."""
    aliases = {name: fields[alias] for name, alias in row.aliases.items() if alias in fields}
    values = {**DEFAULTS, **row.defaults, **aliases, **fields, **(nulls or {})}
    if "n_embd" in values:
        return {"n_inner": 4 * values["n_embd"], **values}
    heads = values["num_attention_heads"]
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if "head_dim" not in values and isinstance(heads, int) and heads > 0:
        values["head_dim"] = values["hidden_size"] // heads
    return values


def windows(row: Family, fields: Mapping[str, Any], layers: int) -> list[int]:
    """The window of each layer; 0 is none."""
    size = fields.get("sliding_window", row.defaults.get("sliding_window")) or 0
    kinds = fields.get("layer_types")
    if row.windows == "none":
        size = 0
    if row.windows != "layers":
        return [size] * layers
    if kinds is None:
        period = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern"))
        period = period or row.window_period
        kinds = ["sliding_attention" if (i + 1) % period else "full" for i in range(layers)]
    return [size if kind == "sliding_attention" else 0 for kind in kinds]


def _compare_sizes(
    model_fields: Mapping[str, Any], fields: Mapping[str, Any], values: Mapping[str, Any]
) -> Iterator[str]:
    """Lines about fields that the model has too; missing ones have the defaults of the class."""
    for name in sorted(model_fields.keys() & values.keys() - HARMLESS - APART):
        expected, value = model_fields[name], values[name]
        if SAME.get(str(expected), expected) != SAME.get(str(value), value):
            default = "" if name in fields else " (the default)"
            yield f"{name}: {value}{default} in config.json, {expected} in the model"


def _compare_aliases(row: Family, fields: Mapping[str, Any]) -> Iterator[str]:
    for name, alias in row.aliases.items():
        if name in fields and fields.get(alias, fields[name]) != fields[name]:
            yield f"{name}: {fields[name]} in config.json, but {alias}: {fields[alias]}, which means the same"


def _compare_rope(model: Transformer, family: str, fields: Mapping[str, Any]) -> Iterator[str]:
    """Lines about rotary angles."""
    row, names = FAMILIES[family], [name for name in rope.FIELDS if name in fields]
    if not row.theta:
        yield from (
            f"{name}: {fields[name]} in config.json, which {family} does not have" for name in names
        )
        return
    theirs, lines = rope.parse(row, fields)
    yield from lines
    ours = rope.rope_of(model)
    if lines:
        return
    if theirs.theta != ours.theta:
        default = "" if names else " (the default)"
        yield f"rope_theta: {theirs.theta}{default} in config.json, {ours.theta} in the model"
    if any(model.window) and theirs.window_theta != ours.window_theta:
        yield (
            f"{rope.LOCAL}: {theirs.window_theta} in config.json,"
            f" model.rope_theta_window={model.rope_theta_window} in the model"
        )
    if theirs.scaling != ours.scaling:
        yield f"rope_scaling: {theirs.scaling} in config.json, {ours.scaling} in the model"


def _compare_windows(model: Transformer, row: Family, fields: Mapping[str, Any]) -> Iterator[str]:
    """Lines about windows; one as long as the model's sequences is none."""
    size, kinds = fields.get("sliding_window"), fields.get("layer_types")
    whole = isinstance(size, int) and size >= model.length
    if row.windows == "none":
        if size is not None and not whole and "sliding_window" not in row.ignored:
            yield (
                f"sliding_window: {size} in config.json, but the model attends to all of"
                f" model.length={model.length}"
            )
        if kinds is not None and {*kinds} != {"full_attention"}:
            yield f"layer_types: {kinds} in config.json, but every layer of the model is full_attention"
        return
    if kinds is not None and row.windows == "all" and {*kinds} != {"full_attention"}:
        yield f"layer_types: {kinds} in config.json, which {row.architecture} does not have"
        return
    if kinds is not None and not {*kinds} <= {"sliding_attention", "full_attention"}:
        yield f"layer_types: {kinds} in config.json, of which some are unknown"
        return
    clip = lambda sizes: [each if each < model.length else 0 for each in sizes]
    ours = clip([model.window_of(i) for i in range(model.layers)])
    theirs = clip(windows(row, fields, model.layers))
    if ours != theirs:
        yield f"sliding_window: {theirs} in the layers of config.json, {ours} in those of the model"


def _compare_others(model: Any, family: str, fields: Mapping[str, Any]) -> Iterator[str]:
    """Lines about fields without a counterpart in the model, unless their value is supported."""
    model_fields = build_config(model, family, "").keys()
    row = FAMILIES.get(family)
    aside = {
        *HARMLESS,
        *APART,
        *(row.aliases.values() if row else ()),
        *(row.ignored if row else ()),
        *getattr(others.FAMILIES.get(family), "IGNORED", ()),
    }
    for name, value in sorted(fields.items()):
        if name == "architectures":
            yield from _compare_architectures(family, value)
        elif name == "auto_map":
            custom = [k for k in value if "Tokenizer" not in k and "Processor" not in k]
            if custom:
                yield f"auto_map: {', '.join(custom)} in config.json: code of its own, which is not executed"
        elif name in aside or name in model_fields:
            continue  # changes nothing, or is compared with the model
        elif name in SUPPORTED:
            if value not in SUPPORTED[name]:
                supported = " or ".join(map(str, SUPPORTED[name]))
                yield f"{name}: {value} in config.json, but the model computes that of {supported}"
        else:
            names = {*HARMLESS, *model_fields, *SUPPORTED}
            yield (
                f"{name}: {value} in config.json, a field that is unknown.{closest(name, names)} Take it out"
                " if the model computes the same without it"
            )


def _compare_architectures(family: str, value: Any) -> Iterator[str]:
    names = value if isinstance(value, list) else [value]
    start = family.split("_")[0]
    foreign = [name for name in names if not str(name).lower().startswith(start)]
    if foreign:
        yield f"architectures: {', '.join(map(str, foreign))} in config.json, which is not of {family}"
