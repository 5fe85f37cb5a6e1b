"""ResNet and ViT at Hugging Face: names and layouts of their tensors, and the fields of config.json."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from spmd.core.fields import check
from spmd.models.resnet import STAGES, ResNet
from spmd.models.vit import ViT
from spmd.weights.huggingface.layout import COLUMNS, STATE, VECTOR, Axes, Part, Tensor, single

# Fields of a model with the values that the classes at Hugging Face compute.
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet": {"norm": "batch"},
    "vit": {
        "norm": "layer",
        "activation": "gelu_exact",
        "bias": True,
        "qk_norm": False,
        "norm_at": "input",
        "norm_offset": 0.0,
        "score_width": 0,
        "score_cap": 0.0,
        "mask": "full",
        "pool": "token",
        "position": "learned",
    },
}
# Defaults of the classes for fields that config.json does not have.
DEFAULTS: dict[str, dict[str, Any]] = {
    "resnet": {
        "num_channels": 3,
        "embedding_size": 64,
        "hidden_sizes": [256, 512, 1024, 2048],
        "depths": [3, 4, 6, 3],
        "layer_type": "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    },
    "vit": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "qkv_bias": True,
    },
}
CONV: Axes = ((3,), (2,), (0,), (1,))  # [height, width, inputs, outputs] as [outputs, inputs, ...]


def family_of(model: ResNet | ViT) -> str:
    """The member of FAMILIES that a model belongs to; ValueError with the fields that do not fit."""
    family = "resnet" if isinstance(model, ResNet) else "vit"
    wrong = [
        f"model.{name}={operator.attrgetter(name)(model)}"
        for name, value in FAMILIES[family].items()
        if operator.attrgetter(name)(model) != value
    ]
    if isinstance(model, ResNet):
        wrong += [f"model.depth={model.depth}"] * (len(STAGES[model.depth]) == 3)
    else:
        wrong += [f"model.window={model.window}"] * any(model.window)
        wrong += [f"model.kv_heads={model.kv_heads}"] * (model.num_kv_heads != model.heads)
        wrong += [f"model.head_dim={model.head_dim}"] * (model.width * model.heads != model.embed)
    check(
        not wrong, f"Hugging Face has no {type(model).__name__} with {', '.join(wrong)}: its weights"
        " can be neither read nor exported",
    )  # fmt: skip
    return family


def tensors(model: ResNet | ViT) -> Iterator[Tensor]:
    """All tensors of a model."""
    return _resnet(model) if isinstance(model, ResNet) else _vit(model)


def _resnet(model: ResNet) -> Iterator[Tensor]:
    yield from _conv_norm("resnet.embedder.embedder", "stem")
    stages = STAGES[model.depth]
    convs = ("first", "second", "third") if model.depth >= 50 else ("first", "second")
    block = 0
    for stage, num in enumerate(stages):
        for i in range(num):
            prefix = f"resnet.encoder.stages.{stage}.layers.{i}"
            # A stage's first block has a projection; with basic blocks the first stage has none.
            if not i and (stage or model.depth >= 50):
                yield from _conv_norm(f"{prefix}.shortcut", f"blocks/{block}/shortcut")
            for number, conv in enumerate(convs):
                yield from _conv_norm(f"{prefix}.layer.{number}", f"blocks/{block}/{conv}")
            block += 1
    yield single("classifier.1.weight", "head/kernel", COLUMNS)
    yield single("classifier.1.bias", "head/bias", VECTOR)


def _conv_norm(prefix: str, place: str) -> Iterator[Tensor]:
    """A convolution and its batch norm, whose statistics are model state."""
    yield single(f"{prefix}.convolution.weight", f"{place}/conv/kernel", CONV)
    norm = f"{place}/norm"
    for name, array in (
        ("weight", f"{norm}/scale"),
        ("bias", f"{norm}/bias"),
        ("running_mean", f"{STATE}{norm}/mean"),
        ("running_var", f"{STATE}{norm}/var"),
    ):
        yield single(f"{prefix}.normalization.{name}", array, VECTOR)


def _vit(model: ViT) -> Iterator[Tensor]:
    start, pixels = "vit.embeddings", (model.patch, model.patch, model.channels)
    patches = f"{start}.patch_embeddings.projection"
    yield single(f"{start}.cls_token", "token", ((), (0,), (1,)))
    yield single(f"{start}.position_embeddings", "position", ((), (0,), (1,)))
    yield single(f"{patches}.weight", "patches/kernel", CONV, pixels)
    yield single(f"{patches}.bias", "patches/bias", VECTOR)
    for layer in range(model.layers):
        for name, array, axes in _vit_block():
            part = Part(f"blocks/{array}", axes)
            yield Tensor(f"vit.encoder.layer.{layer}.{name}", (layer,), (part,))
    for name, array in (("weight", "scale"), ("bias", "bias")):
        yield single(f"vit.layernorm.{name}", f"norm/{array}", VECTOR)
    yield single("classifier.weight", "head/kernel", COLUMNS)
    yield single("classifier.bias", "head/bias", VECTOR)


def _vit_block() -> Iterator[tuple[str, str, Axes]]:
    """(name, array, axes) of a layer."""
    for foreign_name, norm in (("before", "attention_norm"), ("after", "mlp_norm")):
        yield f"layernorm_{foreign_name}.weight", f"{norm}/scale", VECTOR
        yield f"layernorm_{foreign_name}.bias", f"{norm}/bias", VECTOR
    for name in ("query", "key", "value"):
        place = f"attention.attention.{name}"
        yield f"{place}.weight", f"attention/{name}/kernel", ((1, 2), (0,))
        yield f"{place}.bias", f"attention/{name}/bias", ((0, 1),)
    yield "attention.output.dense.weight", "attention/out/kernel", ((2,), (0, 1))
    yield "attention.output.dense.bias", "attention/out/bias", VECTOR
    for foreign_name, name in (("intermediate", "up"), ("output", "down")):
        yield f"{foreign_name}.dense.weight", f"mlp/{name}/kernel", COLUMNS
        yield f"{foreign_name}.dense.bias", f"mlp/{name}/bias", VECTOR


def build_config(model: ResNet | ViT, dtype: str) -> dict[str, Any]:
    """The fields of config.json that determine the output of the model, as transformers reads them."""
    classes = {str(i): f"LABEL_{i}" for i in range(model.classes)}
    common = {"dtype": dtype, "num_channels": model.channels, "id2label": classes}
    common["label2id"] = {name: int(i) for i, name in classes.items()}
    if isinstance(model, ResNet):
        width, stages = model.width or 64, STAGES[model.depth]
        deep = model.depth >= 50
        return common | {
            "model_type": "resnet",
            "architectures": ["ResNetForImageClassification"],
            "embedding_size": width,
            "hidden_sizes": [width * 2**stage * (4 if deep else 1) for stage in range(len(stages))],
            "depths": list(stages),
            "layer_type": "bottleneck" if deep else "basic",
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
        }
    return common | {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": model.embed,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp_width,
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm_epsilon,
        "image_size": model.image,
        "patch_size": model.patch,
        "qkv_bias": True,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": 0.0,
    }
