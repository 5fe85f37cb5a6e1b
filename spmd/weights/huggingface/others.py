"""The families at Hugging Face that are no decoders: each a module with its tensors and its config.json.

Such a module has FAMILIES, DEFAULTS, family_of(model), tensors(model) and build_config(model, dtype).
"""

from __future__ import annotations

from typing import Any

from spmd.models.encoder import Encoder
from spmd.models.encoder_decoder import EncoderDecoder
from spmd.models.resnet import ResNet
from spmd.models.vit import ViT
from spmd.weights.huggingface import bert, t5, vision

MODELS: dict[type, Any] = {ResNet: vision, ViT: vision, Encoder: bert, EncoderDecoder: t5}
FAMILIES: dict[str, Any] = {name: m for m in MODELS.values() for name in m.FAMILIES}


def models_of(family: str) -> list[str]:
    """Names of the models that a family is read into."""
    return [kind.__name__ for kind, module in MODELS.items() if family in module.FAMILIES]
