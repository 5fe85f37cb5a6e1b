"""BERT at Hugging Face: names and layouts of its tensors, and the fields of config.json."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

from spmd.core.fields import check
from spmd.models.encoder import Encoder
from spmd.weights.huggingface.layout import COLUMNS, ROWS, VECTOR, Axes, Part, Tensor, single

# Fields of a model with the values that the classes at Hugging Face compute.
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {
        "norm": "layer",
        "norm_at": "sum",
        "norm_offset": 0.0,
        "bias": True,
        "qk_norm": False,
        "score_width": 0,
        "score_cap": 0.0,
        "mask": "full",
        "bigrams": 0,
        "experts.num": 0,
    }
}
# Defaults of the classes for fields that config.json does not have.
DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    }
}
ACTIVATIONS = {"gelu_exact": "gelu", "gelu": "gelu_new"}
CLASSES = {
    "text": "BertForSequenceClassification",
    "tokens": "BertForTokenClassification",
    "vocab": "BertForMaskedLM",
}
# Heads of pretraining, and buffers: tensors that a model without the head leaves aside.
PREDICTIONS, NEXT, POOLER = "cls.predictions.", "cls.seq_relationship.", "bert.pooler."
COPIES = (f"{PREDICTIONS}decoder.weight", f"{PREDICTIONS}decoder.bias")


def family_of(model: Encoder) -> str:
    """`bert`; ValueError with the fields that do not fit."""
    wrong = [
        f"model.{name}={operator.attrgetter(name)(model)}"
        for name, value in FAMILIES["bert"].items()
        if operator.attrgetter(name)(model) != value
    ]
    wrong += [f"model.activation={model.activation}"] * (model.activation not in ACTIVATIONS)
    wrong += ["model.types=0"] * (not model.types)
    wrong += [f"model.pool={model.pool}"] * (model.output == "text" and model.pool != "tanh")
    wrong += [f"model.window={model.window}"] * any(model.window)
    wrong += [f"model.kv_heads={model.kv_heads}"] * (model.num_kv_heads != model.heads)
    wrong += [f"model.head_dim={model.head_dim}"] * (model.width * model.heads != model.embed)
    check(
        not wrong,
        f"BERT at Hugging Face has no Encoder with {', '.join(wrong)}: its weights can be neither read nor"
        " exported",
    )
    return "bert"


def full_name(name: str) -> str:
    """The name of a tensor as today's classes write it; those of 2018 have gamma and beta in their norms."""
    prefix = "" if name.startswith(("bert.", "cls.", "classifier.")) else "bert."
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(f"LayerNorm{old}"):
            name = name.removesuffix(old) + new
    return prefix + name


def is_aside(model: Encoder, name: str) -> bool:
    """Whether a tensor, by its full name, is of a head that the model does not have, or a copy of another."""
    others = [NEXT, *([] if model.output == "vocab" else [PREDICTIONS])]
    others += [] if model.pool == "tanh" else [POOLER]
    return name.endswith(".position_ids") or name in COPIES or name.startswith(tuple(others))


def tensors(model: Encoder) -> Iterator[Tensor]:
    """All tensors of a model."""
    start = "bert.embeddings"
    tables = {"word": "embed", "position": "position", "token_type": "types"}
    for foreign_name, name in tables.items():
        yield single(f"{start}.{foreign_name}_embeddings.weight", f"{name}/table", ROWS)
    yield from _norm(f"{start}.LayerNorm", "norm")
    for layer in range(model.layers):
        for name, array, axes in _block():
            part = Part(f"blocks/{array}", axes)
            yield Tensor(f"bert.encoder.layer.{layer}.{name}", (layer,), (part,))
    if model.pool == "tanh":
        yield from _dense(f"{POOLER}dense", "pooler")
    if model.output == "vocab":
        yield from _dense(f"{PREDICTIONS}transform.dense", "transform")
        yield from _norm(f"{PREDICTIONS}transform.LayerNorm", "transform_norm")
        yield single(f"{PREDICTIONS}bias", "vocab_bias", VECTOR)
    else:
        yield from _dense("classifier", "head")


def _dense(prefix: str, place: str) -> Iterator[Tensor]:
    yield single(f"{prefix}.weight", f"{place}/kernel", COLUMNS)
    yield single(f"{prefix}.bias", f"{place}/bias", VECTOR)


def _norm(prefix: str, place: str) -> Iterator[Tensor]:
    yield single(f"{prefix}.weight", f"{place}/scale", VECTOR)
    yield single(f"{prefix}.bias", f"{place}/bias", VECTOR)


def _block() -> Iterator[tuple[str, str, Axes]]:
    """(name, array, axes) of a layer."""
    layers: dict[str, tuple[str, Axes, Axes]] = {
        f"attention.self.{name}": (f"attention/{name}", ((1, 2), (0,)), ((0, 1),))
        for name in ("query", "key", "value")
    }
    layers["attention.output.dense"] = ("attention/out", ((2,), (0, 1)), VECTOR)
    layers["intermediate.dense"] = ("mlp/up", COLUMNS, VECTOR)
    layers["output.dense"] = ("mlp/down", COLUMNS, VECTOR)
    for foreign_name, (name, axes, of_bias) in layers.items():
        yield f"{foreign_name}.weight", f"{name}/kernel", axes
        yield f"{foreign_name}.bias", f"{name}/bias", of_bias
    norms = {"attention.output": "attention_out_norm", "output": "mlp_out_norm"}
    for foreign_name, norm in norms.items():
        yield f"{foreign_name}.LayerNorm.weight", f"{norm}/scale", VECTOR
        yield f"{foreign_name}.LayerNorm.bias", f"{norm}/bias", VECTOR


def build_config(model: Encoder, dtype: str) -> dict[str, Any]:
    """The fields of config.json that determine the output of the model, as transformers reads them."""
    fields: dict[str, Any] = {
        "model_type": "bert",
        "architectures": [CLASSES[model.output]],
        "dtype": dtype,
        "vocab_size": model.vocab,
        "hidden_size": model.embed,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp_width,
        "hidden_act": ACTIVATIONS[model.activation],
        "layer_norm_eps": model.norm_epsilon,
        "max_position_embeddings": model.length,
        "type_vocab_size": model.types,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": 0.0,
    }
    if model.output == "vocab":
        return fields
    classes = {str(i): f"LABEL_{i}" for i in range(model.classes)}
    return fields | {"id2label": classes, "label2id": {name: int(i) for i, name in classes.items()}}


def from_fields(fields: Mapping[str, Any], **options: Any) -> Encoder:
    """The encoder that a config.json describes.

    Args:
        fields: of config.json.
        options: further fields of the encoder: `output`, `classes`, `pool`.

    Returns:
        Its config; the caller compares it with the fields (config.find_differences).

    Raises:
        ValueError: an activation that is not known.
    """
    values = {**DEFAULTS["bert"], **{name: x for name, x in fields.items() if x is not None}}
    activations = {foreign: name for name, foreign in ACTIVATIONS.items()}
    activation: Any = activations.get(values["hidden_act"])
    known = ", ".join(activations)
    check(
        activation is not None,
        f"hidden_act: {values['hidden_act']} in config.json, and an encoder's activation is one of {known}",
    )
    return Encoder(
        vocab=values["vocab_size"],
        length=values["max_position_embeddings"],
        types=values["type_vocab_size"],
        layers=values["num_hidden_layers"],
        embed=values["hidden_size"],
        heads=values["num_attention_heads"],
        mlp=values["intermediate_size"],
        activation=activation,
        norm_epsilon=values["layer_norm_eps"],
        dropout=float(values.get("hidden_dropout_prob", 0.1)),
        **options,
    )
