"""Classes of texts: rows of the data, padding without effect, macro-F1 by its definition, mistakes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spmd
from spmd.data.hiding import DropTokens, MaskTokens
from spmd.data.text.labelled import LabelledTexts
from spmd.data.transform import Draws
from spmd.metrics import MacroF1
from spmd.tasks import TextClassification, TokenTagging
from tests.cases import MODELS, texts_at


def test_rows_are_texts_cut_or_padded(tmp_path):
    made = lambda split: [("abc", 1), ("a longer text", 0)]
    source = LabelledTexts(made=made, length=5, cache_dir=str(tmp_path)).open("train")
    batch = source.take(np.arange(2))
    np.testing.assert_array_equal(batch["tokens"], [[97, 98, 99, 0, 0], list(b"a lon")])
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1, 0, 0], [1] * 5])
    np.testing.assert_array_equal(batch["label"], [1, 0])
    for rows, message in (([("", 1)], "holds no text"), ([("a", "x")], "a class is a number")):
        bad = LabelledTexts(made=lambda split, rows=rows: rows, cache_dir=str(tmp_path))
        with pytest.raises(ValueError, match=message):
            bad.open("train")


def test_macro_f1_by_its_definition():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(40, 5)), rng.integers(0, 4, 40)
    predicted, scores = logits.argmax(1), []
    for c in range(5):  # the last class is predicted, and never right
        right = ((predicted == c) & (label == c)).sum()
        scores.append(2 * right / ((predicted == c).sum() + (label == c).sum()))
    weights = {"loss": jnp.ones(40)}
    sums = MacroF1().sums(jnp.asarray(logits), {"label": jnp.asarray(label)}, weights)
    assert MacroF1().compute(jax.device_get(sums)) == pytest.approx(np.mean(scores))


def test_padding_has_no_effect():
    model = dataclasses.replace(MODELS["texts"], pool="first")
    for config in (MODELS["texts"], model, dataclasses.replace(model, norm_at="input")):
        task = TextClassification().build(config)
        params, state = task.init(jax.random.key(0))
        batch = {k: jnp.asarray(v[:4]) for k, v in texts_at(0).items()}
        padded = batch["segments"] == 0
        other = batch | {"tokens": jnp.where(padded, 7, batch["tokens"])}
        a, b = (np.asarray(task.predict(params, state, x)) for x in (batch, other))
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert np.abs(a[0] - a[1]).max() > 1e-4


@pytest.mark.slow
def test_topics_are_learned(tmp_path):
    words = ["--run.dir", str(tmp_path / "run"), "--data.cache-dir", str(tmp_path / "cache")]
    words += ["--simulate", "1", "--log.no-tensorboard", "--train.epochs", "2"]
    run = spmd.load("topics", words).train()
    assert run.metrics["eval/accuracy"] > 0.5 and run.metrics["eval/macro_f1"] > 0.5


def test_tokens_are_hidden_by_seed_and_position():
    """15 % chosen, 80-10-10; each row's draws depend on the seed and its place in the stream alone."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 500, (64, 128)).astype(np.int32)
    segments = (np.arange(128) < rng.integers(1, 129, (64, 1))).astype(np.int32)
    batch = {"tokens": tokens, "segments": segments}
    draws = lambda rows, seed=1: Draws(seed, 1 << 32, np.asarray(rows))
    hide = MaskTokens(1, 500)
    got = hide(batch, draws(range(64)))
    targets, chosen = got["targets"], got["targets"] >= 0
    np.testing.assert_array_equal(targets[chosen], tokens[chosen])
    assert not (chosen & ((segments == 0) | (tokens < 3))).any()
    share = chosen.sum() / ((segments > 0) & (tokens >= 3)).sum()
    assert share == pytest.approx(0.15, abs=0.02)
    masked, kept = (got["tokens"] == 1) & chosen, (got["tokens"] == tokens) & chosen
    assert masked.sum() / chosen.sum() == pytest.approx(0.8, abs=0.05)
    assert kept.sum() / chosen.sum() == pytest.approx(0.1, abs=0.04)
    np.testing.assert_array_equal(got["tokens"][~chosen], tokens[~chosen])
    rows = [40, 3]
    part = hide({k: v[rows] for k, v in batch.items()}, draws(rows))
    for name, value in part.items():
        np.testing.assert_array_equal(value, got[name][rows])
    assert (hide(batch, draws(range(64), 2))["targets"] != targets).any()
    dropped = DropTokens(0.25)(batch, draws(range(64)))["segments"]
    assert ((dropped == 0) | (segments == 1)).all()
    assert dropped.sum() / segments.sum() == pytest.approx(0.75, abs=0.03)
    with pytest.raises(ValueError, match=r"rate=1\.5"):
        MaskTokens(1, 500, 1.5)
    with pytest.raises(ValueError, match="mask=500"):
        MaskTokens(500, 500)
    with pytest.raises(ValueError, match="needs a feature 'tokens'"):
        hide.features({"image": ((8, 8), "uint8")})


def test_tags_count_where_there_is_one():
    """The mean over tagged tokens; a batch whose labels are of a text is refused by name."""
    task = TokenTagging()
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 4, 3)))
    tags = jnp.asarray([[0, -100, 2, -1], [-100, 1, 1, 0]], jnp.int32)
    batch = {
        "tokens": jnp.zeros((2, 4), jnp.int32),
        "tags": tags,
        "weight": jnp.asarray([1.0, 0.5]),
    }
    weights = task.counted(batch)
    sums, measured = task.sums_of(logits, batch, weights, train=False)
    loss = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), np.maximum(tags, 0)[..., None], 2
    )
    weight = (np.asarray(tags) >= 0) * np.array([[1.0], [0.5]])
    np.testing.assert_allclose(sums["loss"], (loss[..., 0] * weight).sum(), rtol=1e-6)
    right = (np.asarray(logits).argmax(-1) == np.asarray(tags)) * weight
    accuracy = task.metrics[0]
    assert accuracy.compute(jax.device_get(measured["accuracy"])) == pytest.approx(
        right.sum() / weight.sum()
    )
    matrix = jax.device_get(measured["macro_f1"]["matrix"])
    assert matrix.sum() == 5 and (matrix.sum(1) == [2, 2, 1]).all()
    with pytest.raises(ValueError, match=r"model\.output=tokens"):
        task.values(logits[:, 0], batch, train=False)


def test_inputs_beyond_the_model_are_refused():
    task = TextClassification()
    model = dataclasses.replace(MODELS["texts"], types=2)
    batch = {"tokens": np.zeros((2, 4), np.int32), "types": np.zeros((2, 4), np.int32)}
    batch |= {"label": np.zeros(2, np.int32)}
    ranges = task.ranges(batch, jnp.zeros((2, 10)), model)
    assert (ranges["types"].high, ranges["tokens"].high) == (2, 64)
    for wrong, message in (
        ({"output": "vocab"}, "model.classes=10"),
        ({"output": "tokens", "pool": "tanh"}, "are of a text's head"),
        ({"types": -1}, "must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(MODELS["texts"], **wrong)
