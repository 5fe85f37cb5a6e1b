"""Names and layouts of a model's arrays in the files of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from spmd.core.fields import check
from spmd.models.transformer import Transformer
from spmd.weights.huggingface import bert, families, others, t5
from spmd.weights.huggingface.families import FAMILIES
from spmd.weights.huggingface.layout import COLUMNS, ROWS, VECTOR, Part, Tensor, single

# Their prefix may be absent (GPT-2 at OpenAI, encoders without a head); these hold no weights of the model.
PREFIX = {
    **dict.fromkeys(FAMILIES, "model."),
    "gpt2": "transformer.",
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
    if family in others.FAMILIES:
        yield from others.FAMILIES[family].tensors(model)
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
    mixture = FAMILIES[family].experts
    for name, parts in _gpt2() if family == "gpt2" else _llama(model):
        yield name, (), parts
    if mixture is not None:
        prefix, matrices = mixture
        yield f"{prefix}.gate.weight", (), [("mlp/router/kernel", COLUMNS)]
        for i in range(model.experts.num):
            for layer_name, foreign_name in matrices.items():
                name = f"{prefix}.experts.{i}.{foreign_name}.weight"
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


# Norms of a layer, by where they are (BlockConfig.norm_at).
NORMS = {
    "input": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "output": {
        "attention_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
}


def _llama(model: Transformer) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Names of a Llama layer: matrices [outputs, inputs]; rotary pairs are the halves of a head, as ours."""
    for norm, foreign_name in NORMS[model.norm_at].items():
        yield f"{foreign_name}.weight", [(f"{norm}/scale", VECTOR)]
    for letter, layer_name in (("q", "query"), ("k", "key"), ("v", "value")):
        yield (
            f"self_attn.{letter}_proj.weight",
            [(f"attention/{layer_name}/kernel", ((1, 2), (0,)))],
        )
        if model.bias or model.qkv_bias:
            yield f"self_attn.{letter}_proj.bias", [(f"attention/{layer_name}/bias", ((0, 1),))]
        if model.qk_norm and letter in "qk":
            axes = VECTOR if model.qk_norm_over == "head" else ((0, 1),)
            yield f"self_attn.{letter}_norm.weight", [(f"attention/{layer_name}_norm/scale", axes)]
    yield "self_attn.o_proj.weight", [("attention/out/kernel", ((2,), (0, 1)))]
    if model.bias:
        yield "self_attn.o_proj.bias", [("attention/out/bias", VECTOR)]
    for layer_name in ("gate", "up", "down") if not model.experts.num else ():
        yield f"mlp.{layer_name}_proj.weight", [(f"mlp/{layer_name}/kernel", COLUMNS)]
        if model.bias:
            yield f"mlp.{layer_name}_proj.bias", [(f"mlp/{layer_name}/bias", VECTOR)]


def family_of(model: Any, preferred: str = "") -> str:
    """The family that a model belongs to, the preferred one if it does.

    Raises:
        ValueError: it belongs to none; with the fields that do not fit.
    """
    if isinstance(model, Transformer):
        return families.family_of(model, preferred)
    kinds = [kind.__name__ for kind in (Transformer, *others.MODELS)]
    check(
        isinstance(model, tuple(others.MODELS)),
        f"Hugging Face weights are those of the models {', '.join(kinds[:-1])} and {kinds[-1]}, not of"
        f" {type(model).__name__}",
    )
    return next(m for kind, m in others.MODELS.items() if isinstance(model, kind)).family_of(model)


def full_name(name: str, family: str) -> str:
    """The name of a tensor with its prefix, which base models lack."""
    if family == "bert":
        return bert.full_name(name)
    prefix = PREFIX.get(family, "")
    return name if name.startswith((prefix, *HEADS)) else prefix + name


def is_aside(model: Any, family: str, name: str) -> bool:
    """Whether a tensor of the files, by its full name, holds nothing of the model, and is not read."""
    if family == "bert":
        return bert.is_aside(model, name)
    if family == "t5":
        return t5.is_aside(model, name)
    return name.endswith(UNREAD)


def stored_shape(model: Any, array: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of an array, or of a layer of it, in the files: tables without the rows that pad them."""
    if isinstance(model, Transformer) and array == "embed/table":
        return (model.vocab, *shape[1:])
    if isinstance(model, Transformer) and array == "head/kernel":
        return (shape[0], model.vocab)
    return tuple(shape)
