"""Classes of texts: rows of the data, padding without effect, macro-F1 by its definition, mistakes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spmd
from spmd.data.text.labelled import LabelledTexts
from spmd.metrics import MacroF1
from spmd.tasks import TextClassification
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
