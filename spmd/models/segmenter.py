"""Segmenter: masks of classes from the patches of a vision transformer."""

# B batch, H height, W width, C channels, T time (patches), N classes, D embed

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spmd.core import tree
from spmd.core.fields import check
from spmd.models.blocks import Block
from spmd.models.layers import Dense, Norm, param
from spmd.models.layers.activations import matmul_input
from spmd.models.patches import PatchConfig, PatchEmbedding, pad_sequence, padded_positions
from spmd.models.stack import Stack
from spmd.parallel import scope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmenter(PatchConfig):
    """Segmenter with a mask transformer (Strudel et al. 2021, arXiv 2105.05633). The default is
    Seg-S-Mask/16; B: embed 768, heads 12.

    The blocks of the decoder see the patches, as the encoder leaves them, and an embedding of each class. The
    mask of a class is the scalar product of its output with that of each patch, interpolated to the pixels.
    """

    image: int = 512
    classes: int = 150
    encoder_layers: int = 12
    """Number of blocks that see the patches."""
    decoder_layers: int = 2
    """Number of blocks that see patches and classes."""
    pool: Literal["token", "mean"] = "token"
    """Whether the encoder has a class token, as that of a classifier; the decoder does not see it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("encoder_layers", "decoder_layers"):
            value = getattr(self, name)
            check(value >= 1, f"model.{name}={value} must be at least 1")
        check(not self.window, "model.window: patches have no windows; leave it out")

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with initial weights."""
        return _Segmenter(self, rngs)


class _Segmenter(PatchEmbedding):
    config: Segmenter

    def __init__(self, config: Segmenter, rngs: nnx.Rngs):
        layers, embed = config.encoder_layers + config.decoder_layers, config.embed
        super().__init__(config, rngs, token=config.pool == "token", layers=layers)
        square, dims = (embed, embed), ("embed", "embed")
        self.encoder = Block(config, rngs, config.encoder_layers)
        self.encoder_norm = config.build_norm(rngs)
        self.project = Dense(rngs, square, dims, dtype=config.dtype)
        init = jax.nn.initializers.normal(config.init_std or embed**-0.5)
        self.classes = param(rngs, (config.classes, embed), ("classes", "embed"), init)
        self.decoder = Block(config, rngs, config.decoder_layers)
        self.decoder_norm = config.build_norm(rngs)
        narrow = jax.nn.initializers.normal(embed**-0.5)
        product = lambda: Dense(rngs, square, dims, bias=False, init=narrow, dtype=config.dtype)
        self.patch_product, self.class_product = product(), product()
        self.mask_norm = Norm(rngs, (config.classes,), ("classes",), centred=True, bias=True)
        self.stack = Stack(config.scan, config.remat, config.saved)

    def __call__(self, x_BHWC: Array) -> Array:
        """[B, H, W, C] -> logits [B, H, W, classes]."""
        config, num = self.config, self.config.patches
        x_BTD = self._run(self.encoder, self.enter(x_BHWC), self.length)
        x_BTD = _gather_time(matmul_input(self.encoder_norm(x_BTD)))
        x_BTD = self.project(x_BTD[:, self.length - num : self.length])
        classes_BND = jnp.tile(self.classes[...].astype(x_BTD.dtype)[None], (x_BTD.shape[0], 1, 1))
        x_BTD = pad_sequence(jnp.concatenate([x_BTD, classes_BND], axis=1))
        total = num + config.classes
        x_BTD = self._run(self.decoder, x_BTD, total, first=config.encoder_layers)
        x_BTD = _gather_time(matmul_input(self.decoder_norm(x_BTD)))
        patches_BTD = _unit(self.patch_product(x_BTD[:, :num]))
        classes_BND = _unit(self.class_product(x_BTD[:, num:total]))
        masks_BTN = self.mask_norm(jnp.einsum("btd,bnd->btn", patches_BTD, classes_BND))
        side = config.image // config.patch
        masks_BHWN = masks_BTN.reshape(-1, side, side, config.classes)
        shape = (masks_BHWN.shape[0], config.image, config.image, config.classes)
        return jax.image.resize(masks_BHWN, shape, "bilinear")

    def _run(self, blocks: Block, x_BTD: Array, length: int, first: int = 0) -> Array:
        positions = padded_positions(x_BTD, length)
        apply = functools.partial(_apply, positions=positions)
        return self.stack(blocks, x_BTD, apply, first=first)[0]


def _apply(block: Block, x_BTD: Array, _: None, **options: Any) -> tuple[Array, dict[str, Any]]:
    return block(x_BTD, **options)


def _gather_time(x_BTD: Array) -> Array:
    """The same, not sharded along time: what moves patches is not."""
    return scope.constrain(x_BTD, "batch", None, "embed")


def _unit(x: Array) -> Array:
    """x / |x| along the last dim, at least in float32; zeros stay zeros."""
    x = x.astype(tree.at_least_float32(x.dtype))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
