"""Networks for images: published sizes, pooling by its definition, what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spmd.models.functional import functionalize
from spmd.models.layers import GroupNorm, max_pool
from spmd.models.patches import grid_sinusoids
from spmd.models.resnet import ResNet
from spmd.models.segmenter import Segmenter
from spmd.models.unet import UNet
from spmd.models.vit import ViT
from spmd.models.wide_resnet import WideResNet
from spmd.tasks.staged import check_stages


@pytest.mark.parametrize(
    "model, published",
    [
        (ResNet(depth=18, classes=1000), 11_689_512),
        (ResNet(depth=50, classes=1000), 25_557_032),
        (WideResNet(depth=28, widen=10), 36_479_194),
        (ViT(embed=768, heads=12), 86_567_656),
        # Beyer et al. 2022: 22.1 million with a class token, and 197 learned positions; here neither.
        (ViT(pool="mean", position="sincos"), 22_050_664 - 197 * 384 - 384),
        # Strudel et al. 2021 print 22M for the encoder and about 27M together; this is 150 classes' formula.
        (Segmenter(), 21_983_616 + 147_840 + 57_600 + 2 * 1_774_464 + 768 + 2 * 147_456 + 300),
    ],
)
def test_numbers_of_parameters_are_the_published_ones(model, published):
    params, _ = jax.eval_shape(functionalize(model).init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == published


def test_fixed_positions_tell_a_distance_whatever_the_place():
    config = ViT(image=32, patch=4, embed=64, heads=4, position="sincos")
    waves = grid_sinusoids(config).reshape(8, 8, 64)
    product = lambda a, b: waves[a] @ waves[b]
    assert product((0, 1), (2, 4)) == pytest.approx(product((3, 2), (5, 5)), abs=1e-9)
    assert product((1, 1), (1, 1)) == pytest.approx(32)
    flat = waves.reshape(64, 64)
    assert np.min(32 - (flat @ flat.T)[~np.eye(64, dtype=bool)]) > 0.5


@pytest.mark.parametrize("size, stride, margin", [(2, 0, 0), (3, 0, 0), (3, 2, 1)])
def test_max_pool_by_its_definition(size, stride, margin):
    x = np.random.default_rng(0).normal(size=(2, 8, 10, 3)).astype(np.float32)
    step = stride or size
    padded = np.pad(
        x, ((0, 0), (margin, margin), (margin, margin), (0, 0)), constant_values=-np.inf
    )
    rows = range(0, padded.shape[1] - size + 1, step)
    columns = range(0, padded.shape[2] - size + 1, step)
    windows = lambda a, i, j: a[:, i : i + size, j : j + size]
    want = np.stack(
        [np.stack([windows(padded, i, j).max((1, 2)) for j in columns], 1) for i in rows], 1
    )
    np.testing.assert_array_equal(max_pool(jnp.asarray(x), size, stride), want)
    # Without ties, the gradient goes to the largest of each window.
    pick = np.random.default_rng(1).normal(size=want.shape).astype(np.float32)
    gradient = np.zeros_like(padded)
    for a, i in enumerate(rows):
        for b, j in enumerate(columns):
            largest = windows(padded, i, j) == want[:, a, b][:, None, None]
            windows(gradient, i, j)[...] += largest * pick[:, a, b][:, None, None]
    inside = slice(margin, None if not margin else -margin)
    got = jax.grad(lambda x: jnp.sum(max_pool(x, size, stride) * pick))(jnp.asarray(x))
    np.testing.assert_allclose(got, gradient[:, inside, inside], rtol=1e-6)


def test_group_norm_is_that_of_flax():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 8)) * 3 + 1, jnp.float32)
    theirs = nnx.GroupNorm(8, num_groups=4, epsilon=1e-5, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(GroupNorm(8, 4)(x), theirs(x), atol=1e-5)


def test_a_segmenter_is_no_pipeline():
    with pytest.raises(
        ValueError, match=r"mesh.stage .*_Segmenter is none: it has no through, leave"
    ):
        check_stages(functionalize(Segmenter(image=16, encoder_layers=1, decoder_layers=1)))


@pytest.mark.parametrize(
    "model, shape, message",
    [
        (ResNet(depth=20), (1, 8, 8, 1), r"takes images \[H, W, 3\].*\[8, 8, 1\]; use --model.channels 1"),
        (UNet(), (1, 10, 8, 3), "images of 10 x 8 pixels do not halve 2 times .* multiples of 4"),
        (Segmenter(image=16), (1, 8, 8, 3), "images of 8 x 8 pixels and model.image=16: resize or crop"),
        (UNet(norm="group", groups=5), (1, 8, 8, 3), "groups=5 does not divide 16 channels; use one of"),
    ],
)  # fmt: skip
def test_what_they_refuse(model, shape, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: model.build(nnx.Rngs(0))(jnp.zeros(shape)))
