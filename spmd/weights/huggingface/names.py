"""Where each array of a Transformer lies in the files of Hugging Face: names and layouts."""

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
    """An array of ours in a tensor, each of whose axes is one or more dims of a layer's array, in order."""

    array: str
    axes: tuple[tuple[int, ...], ...]

    def shape_there(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the tensor, from the shape of a layer's array."""
        return tuple(math.prod(shape[d] for d in dims) for dims in self.axes)

    def block(
        self, tensor: Any, offset: int, shape: Sequence[int], index: Sequence[slice]
    ) -> np.ndarray:
        """The block `index` of a layer's array of this shape, of which no more is read than needed.

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
        found = tensor[tuple(ranges)].reshape(sizes)[tuple(inner)]
        return found.transpose(np.argsort(order))

    def flat(self, array: np.ndarray) -> np.ndarray:
        """A layer's array as the tensor's part."""
        order = [d for dims in self.axes for d in dims]
        return array.transpose(order).reshape(self.shape_there(array.shape))


class Tensor(NamedTuple):
    """A tensor of the files. at: where it lies in its arrays, (), (layer,) or (layer, expert); parts: side by
    side on its last axis.
    """

    name: str
    at: tuple[int, ...]
    parts: tuple[Part, ...]

    def inner(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the part of a layer's array that it holds: all, or an expert."""
        return tuple(shape[max(len(self.at) - 1, 0) :])

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        """From those of a layer's arrays."""
        each = [part.shape_there(self.inner(shapes[part.array])) for part in self.parts]
        return (*each[0][:-1], sum(shape[-1] for shape in each))


ROWS, COLUMNS = ((0,), (1,)), ((1,), (0,))  # a matrix as it is, and transposed


def tensors(model: Transformer, family: str) -> Iterator[Tensor]:
    """All tensors of a model, in the order of their layers."""
    one = lambda name, array, axes: Tensor(name, (), (Part(array, axes),))
    if family == "gpt2":
        yield one("transformer.wte.weight", "embed/table", ROWS)
        yield one("transformer.wpe.weight", "position/table", ROWS)
    else:
        yield one("model.embed_tokens.weight", "embed/table", ROWS)
    for layer in range(model.layers):
        for name, expert, parts in _block(model, family):
            blocks = tuple(Part(f"blocks/{array}", axes) for array, axes in parts)
            prefix = "transformer.h" if family == "gpt2" else "model.layers"
            yield Tensor(f"{prefix}.{layer}.{name}", (layer, *expert), blocks)
    if family == "gpt2":
        yield one("transformer.ln_f.weight", "norm/scale", ((0,),))
        yield one("transformer.ln_f.bias", "norm/bias", ((0,),))
    else:
        yield one("model.norm.weight", "norm/scale", ((0,),))
    if not model.tied:
        yield one("lm_head.weight", "head/kernel", COLUMNS)


def _block(model: Transformer, family: str) -> Iterator[tuple[str, tuple[int, ...], list[Any]]]:
    """(name, expert, parts) of a layer."""
    for name, parts in _gpt2() if family == "gpt2" else _llama(model.bias, family == "llama"):
        yield name, (), parts
    if family == "mixtral":
        yield "block_sparse_moe.gate.weight", (), [("mlp/router/kernel", COLUMNS)]
        for i in range(model.experts.num):
            for there, here in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
                name = f"block_sparse_moe.experts.{i}.{there}.weight"
                yield name, (i,), [(f"mlp/{here}/kernel", COLUMNS)]


def _gpt2() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Its Conv1D keeps matrices as [inputs, outputs], queries, keys and values side by side."""
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
    for there, here in (("c_fc", "up"), ("c_proj", "down")):
        yield f"mlp.{there}.weight", [(f"mlp/{here}/kernel", ROWS)]
        yield f"mlp.{there}.bias", [(f"mlp/{here}/bias", vector)]


def _llama(bias: bool, dense: bool) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Matrices as [outputs, inputs]; rotary pairs are the halves of a head, as ours are."""
    yield "input_layernorm.weight", [("attention_norm/scale", ((0,),))]
    for letter, here in (("q", "query"), ("k", "key"), ("v", "value")):
        yield f"self_attn.{letter}_proj.weight", [(f"attention/{here}/kernel", ((1, 2), (0,)))]
        if bias:
            yield f"self_attn.{letter}_proj.bias", [(f"attention/{here}/bias", ((0, 1),))]
    yield "self_attn.o_proj.weight", [("attention/out/kernel", ((2,), (0, 1)))]
    if bias:
        yield "self_attn.o_proj.bias", [("attention/out/bias", ((0,),))]
    yield "post_attention_layernorm.weight", [("mlp_norm/scale", ((0,),))]
    for here in ("gate", "up", "down") if dense else ():
        yield f"mlp.{here}_proj.weight", [(f"mlp/{here}/kernel", COLUMNS)]
        if bias:
            yield f"mlp.{here}_proj.bias", [(f"mlp/{here}/bias", ((0,),))]


def family_of(model: Any) -> str:
    """The member of FAMILIES that a model belongs to; ValueError with the fields that fit none."""
    check(
        isinstance(model, Transformer),
        f"Hugging Face weights are those of spmd.models.transformer.Transformer, not {type(model).__name__}",
    )
    differ: dict[str, list[str]] = {}
    for family, fields in FAMILIES.items():
        wanted = fields | {"qk_norm": False, "logit_cap": 0.0}
        if family == "mixtral":
            wanted |= {"experts.shared": 0, "experts.bias_rate": 0.0}
        else:
            wanted |= {"experts.num": 0}
        found = {name: operator.attrgetter(name)(model) for name in wanted}
        differ[family] = [
            f"model.{name}={found[name]}"
            for name, value in wanted.items()
            if found[name] != (model.heads if value == "heads" else value)
        ]
        if family == "mixtral" and not model.experts.num:
            differ[family].append("model.experts.num=0")
        if family == "gpt2" and model.width * model.heads != model.embed:
            differ[family].append(f"model.head_dim={model.head_dim}")
        if not differ[family]:
            return family
    said = "; ".join(f"not {family} for {', '.join(d)}" for family, d in differ.items())
    raise ValueError(f"the model is of no family that Hugging Face weights are known of: {said}")
