"""Losses of the tasks by their definitions."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spmd import tasks
from spmd.models.mlp import MLP
from spmd.models.transformer import Transformer


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [(), tuple(1.0 + c for c in range(10))])
def test_mixup_blends_the_losses_and_their_gradients(smoothing, class_weights):
    task = tasks.Classification(label_smoothing=smoothing, class_weights=class_weights)
    task = task.build(MLP(inputs=6, hidden=(8,)))
    params, state = task.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.integers(0, 10, 5).astype(np.int32)) for _ in range(2))
    share = jnp.asarray(rng.uniform(size=5).astype(np.float32))
    weight = jnp.asarray([1.0, 1.0, 0.0, 1.0, 1.0])
    batch = {"image": jnp.asarray(rng.normal(size=(5, 6)).astype(np.float32)), "label": a}
    batch |= {"example_id": jnp.arange(5, dtype=jnp.int32), "weight": weight}

    def loss(params, batch):
        scale = {"loss": jnp.ones(())}
        total, (sums, _) = task.loss(params, state, batch, jax.random.key(1), scale)
        return total, sums

    run = jax.value_and_grad(loss, has_aux=True)
    (got, sums), gradient = run(params, batch | {"label_b": b, "mix": share})
    # By linearity: the losses of each label alone, its examples weighted by their share.
    (first, sums_a), gradient_a = run(params, batch | {"weight": weight * share})
    (second, sums_b), gradient_b = run(params, batch | {"weight": weight * (1 - share), "label": b})
    assert float(got) == pytest.approx(float(first + second), rel=1e-5)
    for name in ("loss", "accuracy"):
        assert float(sums[name][0]) == pytest.approx(
            float(sums_a[name][0] + sums_b[name][0]), rel=1e-5
        )
        assert float(sums[name][1]) == 4  # a blend counts once
    both = jax.tree.map(jnp.add, gradient_a, gradient_b)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), gradient, both
    )
    assert abs(float(first - second)) > 1e-3  # the two labels do differ


def test_class_weights_are_factors_of_the_loss_and_not_of_metrics():
    model, weights = MLP(inputs=6, hidden=(8,), classes=3), (1.0, 5.0, 0.25)
    plain, weighted = (tasks.Classification(class_weights=w).build(model) for w in ((), weights))
    params, state = plain.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(4, 6)).astype(np.float32))
    batch = {"image": image, "example_id": jnp.arange(4, dtype=jnp.int32)}

    def measured(task, labels, weight):
        given = batch | {"label": jnp.asarray(labels, jnp.int32), "weight": jnp.asarray(weight)}
        return task.measured(jax.device_get(task.evaluate(params, state, given)))

    labels = [0, 1, 2, 1]
    alone = [measured(plain, labels, np.eye(4, dtype=np.float32)[i])["loss"] for i in range(4)]
    got = measured(weighted, labels, np.ones(4, np.float32))
    want = np.mean([weights[label] * loss for label, loss in zip(labels, alone, strict=True)])
    assert got["loss"] == pytest.approx(want, rel=1e-5)
    assert got["accuracy"] == measured(plain, labels, np.ones(4, np.float32))["accuracy"]
    short = tasks.Classification(class_weights=(1.0, 2.0)).build(model)
    with pytest.raises(ValueError, match="must be 3 numbers above 0, one for each class"):
        measured(short, labels, np.ones(4, np.float32))


MODEL = Transformer(vocab=37, length=8, layers=1, embed=16, heads=2, mlp=32, tied=True)


def tokens(rows=3, time=8):
    rng = np.random.default_rng(1)
    batch = {k: rng.integers(0, 37, (rows, time)).astype(np.int32) for k in ("tokens", "targets")}
    batch["targets"][0, 2:] = -1
    weight = np.array([1.0, 0.5, 0.0], np.float32)[:rows]
    return batch | {"example_id": np.arange(rows, dtype=np.int32), "weight": weight}


def of_tokens(task, batch):
    """((scaled loss, Sums), gradient by name)."""
    params, state = jax.jit(task.init)(jax.random.key(0))

    def loss(params):
        scale = task.scale(task.weigh(batch))
        total, (sums, _) = task.loss(params, state, batch, jax.random.key(1), scale)
        return total, sums

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params), params


def test_language_model_by_definition():
    task = tasks.LanguageModel(z_loss=0.25).build(MODEL)
    batch = tokens()
    ((total, sums), _), params = of_tokens(task, batch)
    logits = np.asarray(task.predict(params, {}, batch), np.float64)
    partition = np.log(np.exp(logits).sum(-1))
    target = np.take_along_axis(logits, np.maximum(batch["targets"], 0)[..., None], -1)[..., 0]
    weight = (batch["targets"] >= 0) * batch["weight"][:, None]
    assert weight.sum() == 2 + 0.5 * 8
    assert task.weigh(batch) == {"loss": 6.0, "z_loss": 6.0}
    loss, z_loss = ((partition - target) * weight).sum(), (partition**2 * weight).sum()
    right = ((logits.argmax(-1) == batch["targets"]) * weight).sum()
    for name, want in {"loss": loss, "z_loss": z_loss, "accuracy": right}.items():
        assert float(sums[name][0]) == pytest.approx(want, rel=1e-5)
        assert float(sums[name][1]) == 6
    assert float(total) == pytest.approx((loss + 0.25 * z_loss) / 6, rel=1e-5)


def largest(task, batch):
    """Elements of the largest array in the jaxpr of a gradient."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval.size for v in eqn.outvars if hasattr(v.aval, "size"))
            for value in eqn.params.values():
                for item in value if isinstance(value, tuple | list) else (value,):
                    inner = getattr(item, "jaxpr", item)
                    yield from walk(inner) if hasattr(inner, "eqns") else ()

    return max(walk(jax.make_jaxpr(lambda: of_tokens(task, batch))().jaxpr))


def test_chunks_hold_a_part_of_the_logits_and_change_nothing():
    whole, parts = (tasks.LanguageModel(z_loss=0.1, chunks=n).build(MODEL) for n in (1, 4))
    batch = tokens()
    want, got = of_tokens(whole, batch)[0], of_tokens(parts, batch)[0]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7), got, want)
    wide = tokens(3, 8) | {k: np.zeros((64, 8), np.int32) for k in ("tokens", "targets")}
    wide |= {"example_id": np.arange(64, dtype=np.int32), "weight": np.ones(64, np.float32)}
    assert largest(whole, wide) >= 64 * 8 * 37
    assert largest(parts, wide) < 64 * 8 * 37


@pytest.mark.parametrize(
    "options,change,message",
    [
        ({"chunks": 3}, {}, "task.chunks=3 does not divide the 8 tokens"),
        ({}, {"token": 0}, "no feature 'tokens'. Did you mean 'token'?"),
        ({"features": ()}, {}, "task.features must name"),
        ({"z_loss": -1.0}, {}, "task.z_loss=-1.0 must not be negative"),
    ],
)
def test_mistakes_with_language_models(options, change, message):
    batch = tokens()
    if change:
        batch["token"] = batch.pop("tokens")
    with pytest.raises(ValueError, match=re.escape(message)):
        of_tokens(tasks.LanguageModel(**options).build(MODEL), batch)


def test_a_plain_module_is_a_language_model_too():
    class Plain(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.table = nnx.Embed(37, 16, rngs=rngs)
            self.head = nnx.Linear(16, 37, rngs=rngs)

        def __call__(self, tokens):
            return self.head(self.table(tokens))

    batch = tokens()
    ((total, _), gradient), _ = of_tokens(
        tasks.LanguageModel(features=("tokens",)).build(Plain), batch
    )
    assert np.isfinite(total) and abs(gradient["head"]["kernel"]).max() > 0
    with pytest.raises(ValueError, match="needs a model with methods hidden and logits"):
        of_tokens(tasks.LanguageModel(features=("tokens",), chunks=2).build(Plain), batch)


def values_of(task, outputs, features):
    """(values, weights) of a task, as numpy."""
    batch = {name: jnp.asarray(x) for name, x in features.items()}
    batch["weight"] = jnp.ones(len(outputs), jnp.float32)
    values = task.values(jnp.asarray(outputs), batch, train=True)
    return jax.tree.map(np.asarray, (values, task.weights(batch)))


def test_binary_labels_by_definition():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 3)).astype(np.float32)
    labels = rng.integers(-1, 2, (5, 3)).astype(np.int32)
    values, weights = values_of(tasks.MultiLabel(), logits, {"labels": labels})
    share = 1 / (1 + np.exp(-logits.astype(np.float64)))
    want = -np.log(np.where(labels == 1, share, 1 - share))
    np.testing.assert_allclose(values["loss"], want, rtol=1e-5)
    np.testing.assert_array_equal(weights["loss"], labels >= 0)
    clicks = (labels[:, 0] == 1).astype(np.int32)
    values, _ = values_of(tasks.ClickPrediction(), logits[:, 0], {"label": clicks})
    share = np.where(clicks == 1, share[:, 0], 1 - share[:, 0])
    np.testing.assert_allclose(values["loss"], -np.log(share), rtol=1e-5)


def test_regression_by_definition():
    rng = np.random.default_rng(0)
    outputs, target = (rng.normal(size=(5, 2)).astype(np.float32) for _ in range(2))
    values, weights = values_of(tasks.Regression(), outputs, {"target": target})
    np.testing.assert_allclose(values["loss"], (outputs - target) ** 2, rtol=1e-6)
    assert weights["loss"].shape == (5, 2) and weights["loss"].all()
    with pytest.raises(ValueError, match=r"outputs are of shape \[5, 2\].*'target' of \[5\]"):
        values_of(tasks.Regression(), outputs, {"target": target[:, 0]})


def test_segmentation_by_definition():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 4, 3)).astype(np.float32)
    mask = rng.integers(-1, 3, (3, 4, 4)).astype(np.int32)
    task = tasks.Segmentation(pixel="focal", gamma=1.5, dice=0.5)
    values, weights = values_of(task, logits, {"mask": mask})
    share = np.exp(logits.astype(np.float64))
    share /= share.sum(-1, keepdims=True)
    known = mask >= 0
    right = np.take_along_axis(share, np.maximum(mask, 0)[..., None], -1)[..., 0]
    focal = -((1 - right) ** 1.5) * np.log(right)
    np.testing.assert_allclose(values["focal"][known], focal[known], rtol=1e-5)
    np.testing.assert_array_equal(weights["focal"], known)
    for i in range(3):
        pixels, classes = share[i][known[i]], np.eye(3)[mask[i][known[i]]]
        both, either = (pixels * classes).sum(0), pixels.sum(0) + classes.sum(0)
        assert values["soft_dice"][i] == pytest.approx(
            1 - np.mean((2 * both + 1) / (either + 1)), rel=1e-5
        )
    assert task.coefficients(None) == {"focal": 1.0, "soft_dice": 0.5}
