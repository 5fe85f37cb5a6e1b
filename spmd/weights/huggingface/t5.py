"""T5 at Hugging Face: names and layouts of its tensors, and the fields of config.json."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

from spmd.core.fields import check
from spmd.models.encoder_decoder import EncoderDecoder
from spmd.weights.huggingface.layout import COLUMNS, ROWS, VECTOR, Axes, Part, Tensor, single

# Fields of a model with the values that the class at Hugging Face computes.
FAMILIES: dict[str, dict[str, Any]] = {
    "t5": {
        "norm": "rms",
        "norm_at": "input",
        "norm_offset": 0.0,
        "bias": False,
        "qkv_bias": False,
        "qk_norm": False,
        "position": "relative",
        "score_width": 1,
        "score_cap": 0.0,
        "mask": "causal",
        "experts.num": 0,
    }
}
# Defaults of the class for fields that config.json does not have: those of t5-small.
DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
    }
}
IGNORED = ("n_positions", "dropout_rate", "initializer_factor", "dense_act_fn", "is_gated_act")
ACTIVATIONS = {"relu": "relu", "geglu": "gated-gelu"}


def family_of(model: EncoderDecoder) -> str:
    """`t5`; ValueError with the fields that do not fit."""
    wrong = [
        f"model.{name}={operator.attrgetter(name)(model)}"
        for name, value in FAMILIES["t5"].items()
        if operator.attrgetter(name)(model) != value
    ]
    wrong += [f"model.activation={model.activation}"] * (model.activation not in ACTIVATIONS)
    wrong += [f"model.head_scale={model.head_scale}"] * (model.head_scale != model.tied)
    wrong += [f"model.kv_heads={model.kv_heads}"] * (model.num_kv_heads != model.heads)
    check(
        not wrong,
        f"T5 at Hugging Face has no EncoderDecoder with {', '.join(wrong)}: its weights can be neither read"
        " nor exported",
    )
    return "t5"


def normalised(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.json of any version as of version 4 of transformers, with the depth of the decoder.

    Version 4 divides the input of the head where it is tied; version 5 says so by `scale_decoder_outputs`,
    and always says that the head is tied, whether or not the files have one of its own.

    Args:
        fields: of config.json.
    """
    fields = {name: x for name, x in fields.items() if x is not None}
    scaled = fields.pop("scale_decoder_outputs", None)
    if scaled is not None:
        fields["tie_word_embeddings"] = scaled
    layers = fields.get("num_layers", DEFAULTS["t5"]["num_layers"])
    return {"num_decoder_layers": layers, **fields}


def is_aside(model: EncoderDecoder, name: str) -> bool:
    """Whether a tensor is a copy of the table, or the bias of cross-attention in old files."""
    copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    copies += ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"]
    return name in copies or (model.tied and name == "lm_head.weight")


def tensors(model: EncoderDecoder) -> Iterator[Tensor]:
    """All tensors of a model."""
    yield single("shared.weight", "embed/table", ROWS)
    for stack, layers in (("encoder", model.encoder_layers), ("decoder", model.layers)):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield single(bias, f"{stack}_bias", ROWS)
        for layer in range(layers):
            for name, array, axes in _block(model, stack):
                part = Part(f"{stack}/{array}", axes)
                yield Tensor(f"{stack}.block.{layer}.layer.{name}.weight", (layer,), (part,))
        yield single(f"{stack}.final_layer_norm.weight", f"{stack}_norm/scale", VECTOR)
    if not model.tied:
        yield single("lm_head.weight", "head/kernel", COLUMNS)


def _block(model: EncoderDecoder, stack: str) -> Iterator[tuple[str, str, Axes]]:
    """(name, array, axes) of a layer."""
    attentions = {"SelfAttention": "attention"}
    if stack == "decoder":
        attentions["EncDecAttention"] = "cross"
    for number, (foreign_name, name) in enumerate(attentions.items()):
        for letter, matrix in (("q", "query"), ("k", "key"), ("v", "value")):
            yield f"{number}.{foreign_name}.{letter}", f"{name}/{matrix}/kernel", ((1, 2), (0,))
        yield f"{number}.{foreign_name}.o", f"{name}/out/kernel", ((2,), (0, 1))
        yield f"{number}.layer_norm", f"{name}_norm/scale", VECTOR
    number, matrices = len(attentions), {"wi": "up", "wo": "down"}
    if model.gated:
        matrices = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
    for foreign_name, name in matrices.items():
        yield f"{number}.DenseReluDense.{foreign_name}", f"mlp/{name}/kernel", COLUMNS
    yield f"{number}.layer_norm", "mlp_norm/scale", VECTOR


def build_config(model: EncoderDecoder, dtype: str) -> dict[str, Any]:
    """The fields of config.json that determine the output of the model, as transformers reads them."""
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "dtype": dtype,
        "is_encoder_decoder": True,
        "vocab_size": model.vocab,
        "d_model": model.embed,
        "d_kv": model.width,
        "d_ff": model.mlp_width,
        "num_layers": model.encoder_layers,
        "num_decoder_layers": model.layers,
        "num_heads": model.heads,
        "relative_attention_num_buckets": model.buckets,
        "relative_attention_max_distance": model.distance,
        "layer_norm_epsilon": model.norm_epsilon,
        "feed_forward_proj": ACTIVATIONS[model.activation],
        "tie_word_embeddings": model.tied,
        "dropout_rate": model.dropout,
        "decoder_start_token_id": 0,
    }


def from_fields(fields: Mapping[str, Any]) -> EncoderDecoder:
    """The encoder-decoder that a config.json describes.

    Args:
        fields: of config.json.

    Returns:
        Its config; the caller compares it with the fields (config.find_differences).

    Raises:
        ValueError: a feed-forward layer that is not known.
    """
    values = {**DEFAULTS["t5"], **normalised(fields)}
    activations = {foreign: name for name, foreign in ACTIVATIONS.items()}
    activation: Any = activations.get(values["feed_forward_proj"])
    check(
        activation is not None,
        f"feed_forward_proj: {values['feed_forward_proj']} in config.json; what is computed:"
        f" {', '.join(activations)}",
    )
    return EncoderDecoder(
        vocab=values["vocab_size"],
        embed=values["d_model"],
        head_dim=values["d_kv"],
        mlp=values["d_ff"],
        encoder_layers=values["num_layers"],
        layers=values["num_decoder_layers"],
        heads=values["num_heads"],
        position="relative",
        buckets=values["relative_attention_num_buckets"],
        distance=values["relative_attention_max_distance"],
        score_width=1,
        norm_epsilon=values["layer_norm_epsilon"],
        activation=activation,
        tied=values["tie_word_embeddings"],
        head_scale=values["tie_word_embeddings"],
        dropout=float(values.get("dropout_rate", 0.1)),
    )
