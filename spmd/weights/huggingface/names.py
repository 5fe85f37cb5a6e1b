"""Names and layouts of a model's arrays in the files of Hugging Face."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

from spmd.core.fields import check
from spmd.models.resnet import ResNet
from spmd.models.transformer import Transformer
from spmd.models.vit import ViT
from spmd.weights.huggingface import vision
from spmd.weights.huggingface.layout import COLUMNS, ROWS, VECTOR, Part, Tensor, single

# Of language models; those of images are in vision.FAMILIES.
FAMILIES = {
    "gpt2": {
        "norm": "layer",
        "activation": "gelu",
        "position": "learned",
        "bias": True,
        "num_kv_heads": "heads",
    },
    "llama": {"norm": "rms", "activation": "swiglu", "position": "rope"},
    "mixtral": {"norm": "rms", "activation": "swiglu", "position": "rope", "bias": False},
}
# Their prefix may be absent (GPT-2 at OpenAI, encoders without a head); these hold no weights of the model.
PREFIX = {
    "gpt2": "transformer.",
    "llama": "model.",
    "mixtral": "model.",
    "resnet": "resnet.",
    "vit": "vit.",
}
HEADS = ("lm_head.", "classifier.")
UNREAD = (
    *(".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".num_batches_tracked"),
    *("pooler.dense.weight", "pooler.dense.bias"),
)


def tensors(model: Any, family: str) -> Iterator[Tensor]:
    """All tensors of a model, in the order of their layers."""
    if family in vision.FAMILIES:
        yield from vision.tensors(model)
    else:
        yield from _language(model, family)


def _language(model: Transformer, family: str) -> Iterator[Tensor]:
    if family == "gpt2":
        yield single("transformer.wte.weight", "embed/table", ROWS)
        yield single("transformer.wpe.weight", "position/table", ROWS)
    else:
        yield single("model.embed_tokens.weight", "embed/table", ROWS)
    for layer in range(model.layers):
        for name, expert, parts in _block(model, family):
            blocks = tuple(Part(f"blocks/{array}", axes) for array, axes in parts)
            prefix = "transformer.h" if family == "gpt2" else "model.layers"
            yield Tensor(f"{prefix}.{layer}.{name}", (layer, *expert), blocks)
    if family == "gpt2":
        yield single("transformer.ln_f.weight", "norm/scale", VECTOR)
        yield single("transformer.ln_f.bias", "norm/bias", VECTOR)
    else:
        yield single("model.norm.weight", "norm/scale", VECTOR)
    if not model.tied:
        yield single("lm_head.weight", "head/kernel", COLUMNS)


def _block(model: Transformer, family: str) -> Iterator[tuple[str, tuple[int, ...], list[Any]]]:
    """(name, expert, parts) of a layer."""
    for name, parts in _gpt2() if family == "gpt2" else _llama(model.bias, family == "llama"):
        yield name, (), parts
    if family == "mixtral":
        yield "block_sparse_moe.gate.weight", (), [("mlp/router/kernel", COLUMNS)]
        for i in range(model.experts.num):
            for foreign_name, layer_name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
                name = f"block_sparse_moe.experts.{i}.{foreign_name}.weight"
                yield name, (i,), [(f"mlp/{layer_name}/kernel", COLUMNS)]


def _gpt2() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Names of a GPT-2 layer: matrices [inputs, outputs]; queries, keys and values are side by side."""
    heads = ("query", "key", "value")
    yield "ln_1.weight", [("attention_norm/scale", VECTOR)]
    yield "ln_1.bias", [("attention_norm/bias", VECTOR)]
    yield "attn.c_attn.weight", [(f"attention/{n}/kernel", ((0,), (1, 2))) for n in heads]
    yield "attn.c_attn.bias", [(f"attention/{n}/bias", ((0, 1),)) for n in heads]
    yield "attn.c_proj.weight", [("attention/out/kernel", ((0, 1), (2,)))]
    yield "attn.c_proj.bias", [("attention/out/bias", VECTOR)]
    yield "ln_2.weight", [("mlp_norm/scale", VECTOR)]
    yield "ln_2.bias", [("mlp_norm/bias", VECTOR)]
    for foreign_name, layer_name in (("c_fc", "up"), ("c_proj", "down")):
        yield f"mlp.{foreign_name}.weight", [(f"mlp/{layer_name}/kernel", ROWS)]
        yield f"mlp.{foreign_name}.bias", [(f"mlp/{layer_name}/bias", VECTOR)]


def _llama(bias: bool, dense: bool) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Names of a Llama layer: matrices [outputs, inputs]; rotary pairs are the halves of a head, as ours."""
    yield "input_layernorm.weight", [("attention_norm/scale", VECTOR)]
    for letter, layer_name in (("q", "query"), ("k", "key"), ("v", "value")):
        yield (
            f"self_attn.{letter}_proj.weight",
            [(f"attention/{layer_name}/kernel", ((1, 2), (0,)))],
        )
        if bias:
            yield f"self_attn.{letter}_proj.bias", [(f"attention/{layer_name}/bias", ((0, 1),))]
    yield "self_attn.o_proj.weight", [("attention/out/kernel", ((2,), (0, 1)))]
    if bias:
        yield "self_attn.o_proj.bias", [("attention/out/bias", VECTOR)]
    yield "post_attention_layernorm.weight", [("mlp_norm/scale", VECTOR)]
    for layer_name in ("gate", "up", "down") if dense else ():
        yield f"mlp.{layer_name}_proj.weight", [(f"mlp/{layer_name}/kernel", COLUMNS)]
        if bias:
            yield f"mlp.{layer_name}_proj.bias", [(f"mlp/{layer_name}/bias", VECTOR)]


def family_of(model: Any) -> str:
    """The family that a model belongs to; ValueError with the fields that fit none."""
    check(
        isinstance(model, Transformer | ResNet | ViT),
        "Hugging Face weights are those of the models Transformer, ResNet and ViT, not of"
        f" {type(model).__name__}",
    )
    if not isinstance(model, Transformer):
        return vision.family_of(model)
    differ: dict[str, list[str]] = {}
    for family, fields in FAMILIES.items():
        expected = fields | {"qk_norm": False, "logit_cap": 0.0, "mask": "causal"}
        if family == "mixtral":
            expected |= {"experts.shared": 0, "experts.bias_rate": 0.0, "experts.every": 1}
        else:
            expected |= {"experts.num": 0}
        actual = {name: operator.attrgetter(name)(model) for name in expected}
        differ[family] = [
            f"model.{name}={actual[name]}"
            for name, value in expected.items()
            if actual[name] != (model.heads if value == "heads" else value)
        ]
        if any(model.window):
            differ[family].append(f"model.window={model.window}")
        if family == "mixtral" and not model.experts.num:
            differ[family].append("model.experts.num=0")
        if family == "gpt2" and model.width * model.heads != model.embed:
            differ[family].append(f"model.head_dim={model.head_dim}")
        if not differ[family]:
            return family
    reasons = "; ".join(f"not {family} for {', '.join(d)}" for family, d in differ.items())
    raise ValueError(f"the model is of no family that Hugging Face weights are known of: {reasons}")


def stored_shape(model: Any, array: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of an array, or of a layer of it, in the files: tables without the rows that pad them."""
    if isinstance(model, Transformer) and array == "embed/table":
        return (model.vocab, *shape[1:])
    if isinstance(model, Transformer) and array == "head/kernel":
        return (shape[0], model.vocab)
    return tuple(shape)
