"""Names and layouts of a Transformer's arrays in the files of Hugging Face."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spmd.core.fields import check
from spmd.models.transformer import Transformer

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
# Their prefix may be absent (GPT-2 at OpenAI); these hold no weights.
PREFIX = {"gpt2": "transformer.", "llama": "model.", "mixtral": "model."}
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


class Part(NamedTuple):
    """An array of a Transformer in a tensor, whose axes are each one or more dims of a layer's array."""

    array: str
    axes: tuple[tuple[int, ...], ...]

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the tensor, from the shape of a layer's array."""
        return tuple(math.prod(shape[d] for d in dims) for dims in self.axes)

    def block(
        self, tensor: Any, offset: int, shape: Sequence[int], index: Sequence[slice]
    ) -> np.ndarray:
        """The block `index` of a layer's array of this shape; reads no more than the block.

        tensor: sliceable. offset: where the array begins along the tensor's last axis.
        """
        ranges, inner, order = [], [], []
        for axis, dims in enumerate(self.axes):
            first, width = index[dims[0]], math.prod(shape[d] for d in dims[1:])
            begin = offset if axis == len(self.axes) - 1 else 0
            ranges.append(slice(begin + first.start * width, begin + first.stop * width))
            inner += [slice(None), *(index[d] for d in dims[1:])]
            order += dims
        sizes = [
            index[d].stop - index[d].start if d == dims[0] else shape[d]
            for dims in self.axes
            for d in dims
        ]
        block = tensor[tuple(ranges)].reshape(sizes)[tuple(inner)]
        return block.transpose(np.argsort(order))

    def flat(self, array: np.ndarray) -> np.ndarray:
        """A layer's array as the tensor's part."""
        order = [d for dims in self.axes for d in dims]
        return array.transpose(order).reshape(self.stored_shape(array.shape))


class Tensor(NamedTuple):
    """A tensor of the files. at: its index in its arrays, (), (layer,) or (layer, expert); parts: arrays side
    by side on its last axis.
    """

    name: str
    at: tuple[int, ...]
    parts: tuple[Part, ...]

    def inner(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the part of a layer's array that it holds: all, or an expert."""
        return tuple(shape[max(len(self.at) - 1, 0) :])

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        """From those of a layer's arrays."""
        shapes_of_parts = [part.stored_shape(self.inner(shapes[part.array])) for part in self.parts]
        return (*shapes_of_parts[0][:-1], sum(shape[-1] for shape in shapes_of_parts))


ROWS, COLUMNS = ((0,), (1,)), ((1,), (0,))  # a matrix as it is, and transposed


def tensors(model: Transformer, family: str) -> Iterator[Tensor]:
    """All tensors of a model, in the order of their layers."""
    single = lambda name, array, axes: Tensor(name, (), (Part(array, axes),))
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
        yield single("transformer.ln_f.weight", "norm/scale", ((0,),))
        yield single("transformer.ln_f.bias", "norm/bias", ((0,),))
    else:
        yield single("model.norm.weight", "norm/scale", ((0,),))
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
    vector = ((0,),)
    yield "ln_1.weight", [("attention_norm/scale", vector)]
    yield "ln_1.bias", [("attention_norm/bias", vector)]
    yield "attn.c_attn.weight", [(f"attention/{n}/kernel", ((0,), (1, 2))) for n in heads]
    yield "attn.c_attn.bias", [(f"attention/{n}/bias", ((0, 1),)) for n in heads]
    yield "attn.c_proj.weight", [("attention/out/kernel", ((0, 1), (2,)))]
    yield "attn.c_proj.bias", [("attention/out/bias", vector)]
    yield "ln_2.weight", [("mlp_norm/scale", vector)]
    yield "ln_2.bias", [("mlp_norm/bias", vector)]
    for foreign_name, layer_name in (("c_fc", "up"), ("c_proj", "down")):
        yield f"mlp.{foreign_name}.weight", [(f"mlp/{layer_name}/kernel", ROWS)]
        yield f"mlp.{foreign_name}.bias", [(f"mlp/{layer_name}/bias", vector)]


def _llama(bias: bool, dense: bool) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Names of a Llama layer: matrices [outputs, inputs]; rotary pairs are the halves of a head, as ours."""
    yield "input_layernorm.weight", [("attention_norm/scale", ((0,),))]
    for letter, layer_name in (("q", "query"), ("k", "key"), ("v", "value")):
        yield (
            f"self_attn.{letter}_proj.weight",
            [(f"attention/{layer_name}/kernel", ((1, 2), (0,)))],
        )
        if bias:
            yield f"self_attn.{letter}_proj.bias", [(f"attention/{layer_name}/bias", ((0, 1),))]
    yield "self_attn.o_proj.weight", [("attention/out/kernel", ((2,), (0, 1)))]
    if bias:
        yield "self_attn.o_proj.bias", [("attention/out/bias", ((0,),))]
    yield "post_attention_layernorm.weight", [("mlp_norm/scale", ((0,),))]
    for layer_name in ("gate", "up", "down") if dense else ():
        yield f"mlp.{layer_name}_proj.weight", [(f"mlp/{layer_name}/kernel", COLUMNS)]
        if bias:
            yield f"mlp.{layer_name}_proj.bias", [(f"mlp/{layer_name}/bias", ((0,),))]


def family_of(model: Any) -> str:
    """The member of FAMILIES that a model belongs to; ValueError with the fields that fit none."""
    check(
        isinstance(model, Transformer),
        f"Hugging Face weights are those of spmd.models.transformer.Transformer, not {type(model).__name__}",
    )
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
