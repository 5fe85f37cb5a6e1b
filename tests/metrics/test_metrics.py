"""Metrics by their definitions in numpy, equal for every batch size, mesh and split of an evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd import metrics

N, C = 96, 5
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(N, C)).astype(np.float32)
LABELS = RNG.integers(0, C, N).astype(np.int32)
WEIGHTS = (RNG.uniform(size=N) > 0.2).astype(np.float32)
CHOSEN = WEIGHTS > 0
PIXELS = RNG.normal(size=(N, 4, 4, C)).astype(np.float32)
MASKS = RNG.integers(-1, C - 1, (N, 4, 4)).astype(np.int32)  # -1: not labelled; C - 1 never occurs
TARGETS = RNG.normal(size=(N, C)).astype(np.float32)
BINARY = np.round(RNG.normal(size=N) * 4).astype(np.float32) / 4  # with ties
POSITIVE = RNG.integers(0, 2, N).astype(np.int32)
RELEVANT = (RNG.uniform(size=(N, C)) < 0.3).astype(np.int32)


AUC_COLUMNS = ((BINARY, POSITIVE), (LOGITS[:, 0], RELEVANT[:, 0]))


def auc(score, label):
    pairs = score[label == 1][:, None] - score[label == 0][None]
    return np.mean((pairs > 0) + 0.5 * (pairs == 0))


def confusion():
    counted = (MASKS >= 0) & CHOSEN[:, None, None]
    label, predicted = MASKS[counted], PIXELS.argmax(-1)[counted]
    both = [np.sum((label == c) & (predicted == c)) for c in range(C)]
    either = [np.sum((label == c) | (predicted == c)) for c in range(C)]
    size = [np.sum(label == c) + np.sum(predicted == c) for c in range(C)]
    mean = lambda x, y: np.mean([a / b for a, b in zip(x, y, strict=True) if b])
    return {"miou": mean(both, either), "dice": mean([2 * b for b in both], size)}


def by_class():
    """IoU and Dice of each class."""
    counted = (MASKS >= 0) & CHOSEN[:, None, None]
    label, predicted = MASKS[counted], PIXELS.argmax(-1)[counted]
    values = {}
    for c in range(C):
        both, either = (
            np.sum((label == c) & (predicted == c)),
            np.sum((label == c) | (predicted == c)),
        )
        values[f"iou/{c}"] = both / either
        values[f"dice/{c}"] = 2 * both / (both + either)
    return values


def ranking(k):
    values = {"hit": [], "recall": [], "ndcg": [], "mrr": []}
    for score, relevant in zip(LOGITS[CHOSEN], RELEVANT[CHOSEN], strict=True):
        if not relevant.any():
            continue
        hits = relevant[np.argsort(-score, kind="stable")[:k]]
        discount = 1 / np.log2(np.arange(k) + 2)
        ideal = discount[: min(k, relevant.sum())].sum()
        values["hit"].append(hits.any())
        values["recall"].append(hits.sum() / relevant.sum())
        values["ndcg"].append((hits * discount).sum() / ideal)
        values["mrr"].append(1 / (hits.argmax() + 1) if hits.any() else 0)
    return {f"{name}@{k}": np.mean(x) for name, x in values.items()}


def calibration():
    logits = LOGITS[CHOSEN].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    sure, right = p.max(-1), p.argmax(-1) == LABELS[CHOSEN]
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (sure > low) & (sure <= low + 1 / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    return total


RIGHT = LOGITS.argmax(-1) == LABELS
ORDER = np.argsort(-LOGITS, -1, kind="stable")
# metric, outputs, features, weights, expected
CASES = {
    "accuracy": (metrics.Accuracy(), LOGITS, {"label": LABELS}, WEIGHTS, RIGHT[CHOSEN].mean()),
    "top 2": (
        metrics.Accuracy(name="top2", top=2),
        LOGITS,
        {"label": LABELS},
        WEIGHTS,
        (ORDER[:, :2] == LABELS[:, None]).any(-1)[CHOSEN].mean(),
    ),
    "fractions": (
        metrics.Accuracy(),
        LOGITS,
        {"label": LABELS},
        WEIGHTS / 3,
        RIGHT[CHOSEN].mean(),
    ),
    "mae": (
        metrics.MAE(),
        LOGITS,
        {"target": TARGETS},
        np.tile(WEIGHTS[:, None], C),
        np.abs(LOGITS - TARGETS)[CHOSEN].mean(),
    ),
    "rmse": (
        metrics.RMSE(),
        LOGITS,
        {"target": TARGETS},
        np.tile(WEIGHTS[:, None], C),
        np.square(LOGITS - TARGETS)[CHOSEN].mean() ** 0.5,
    ),
    "rmse of a column": (
        metrics.RMSE(),
        LOGITS[:, :1],
        {"target": TARGETS[:, 0]},
        WEIGHTS,
        np.square(LOGITS - TARGETS)[CHOSEN][:, 0].mean() ** 0.5,
    ),
    "confusion": (
        metrics.Confusion(),
        PIXELS,
        {"label": MASKS},
        (MASKS >= 0) * WEIGHTS[:, None, None],
        confusion(),
    ),
    "confusion by class": (
        metrics.Confusion(classes=tuple(map(str, range(C))), prefix="of/"),
        PIXELS,
        {"label": MASKS},
        (MASKS >= 0) * WEIGHTS[:, None, None],
        {f"of/{name}": value for name, value in (confusion() | by_class()).items()},
    ),
    "one candidate": (
        metrics.Ranking(k=(1,)),
        LOGITS,
        {"label": LABELS},
        WEIGHTS,
        dict.fromkeys(("hit@1", "recall@1", "ndcg@1", "mrr@1"), RIGHT[CHOSEN].mean()),
    ),
    "several candidates": (
        metrics.Ranking(k=(1, 3)),
        LOGITS,
        {"label": RELEVANT},
        WEIGHTS,
        ranking(1) | ranking(3),
    ),
    "predicted over observed": (
        metrics.CalibrationRatio(),
        BINARY,
        {"label": POSITIVE},
        WEIGHTS,
        (1 / (1 + np.exp(-BINARY[CHOSEN].astype(np.float64)))).sum() / POSITIVE[CHOSEN].sum(),
    ),
    "calibration": (metrics.Calibration(), LOGITS, {"label": LABELS}, WEIGHTS, calibration()),
}


def total(metric, outputs, features, weights, rows, place=lambda x: x):
    """The totals of an evaluation in batches of `rows`, the last one padded with weight 0."""
    sums = jax.jit(lambda o, b, w: metric.sums(o, b, {"loss": w}))
    result = None
    for start in range(0, N, rows):
        part = lambda x, start=start: np.resize(x[start : start + rows], (rows, *x.shape[1:]))
        weight = part(weights).copy()
        weight[N - start :] = 0
        batch = {name: place(part(x)) for name, x in features.items()}
        new = jax.device_get(sums(place(part(outputs)), batch, place(weight)))
        zeros = jax.tree.map(np.zeros_like, new) if result is None else result
        result = metrics.add_sums(zeros, new)
    return result


@pytest.mark.parametrize("case", CASES)
def test_a_metric_is_what_its_definition_says_in_any_batch_on_any_mesh(case, devices):
    metric, outputs, features, weights, expected = CASES[case]
    mesh = NamedSharding(Mesh(np.array(devices[:8]), "data"), P("data"))
    runs = [
        total(metric, outputs, features, weights, N),
        total(metric, outputs, features, weights, 40),
        total(metric, outputs, features, weights, 32, lambda x: jax.device_put(x, mesh)),
    ]
    for sums in runs:
        assert metric.compute(sums) == pytest.approx(expected, rel=1e-5)
    for name, counts in runs[0].items():
        if counts.dtype == np.int64:
            for other in runs[1:]:
                np.testing.assert_array_equal(other[name], counts)
    # The value of nothing is no number, and its names are those of a value.
    nothing = metric.compute(jax.tree.map(np.zeros_like, runs[0]))
    names = nothing if isinstance(nothing, dict) else {metric.name: nothing}
    assert set(names.values()) == {None}
    if isinstance(expected, dict):
        assert names.keys() == expected.keys()


@pytest.mark.parametrize("bins", [4, 64, 4096])
def test_the_area_under_the_roc_curve_is_within_its_bound(bins):
    metric = metrics.AUC(bins=bins)
    sums = total(metric, BINARY, {"label": POSITIVE}, WEIGHTS, 40)
    found = metric.compute(sums)
    exact = auc(BINARY[CHOSEN], POSITIVE[CHOSEN])
    assert abs(found["auc"] - exact) <= found["auc_error"] + 1e-12
    if bins == 4096:  # each score has a bin of its own: only its ties share one, and count half
        assert found["auc"] == pytest.approx(exact, abs=1e-12)
    both = np.stack([-BINARY / 2, BINARY / 2], -1)
    assert metric.compute(total(metric, both, {"label": POSITIVE}, WEIGHTS, N)) == found
    # By class: the areas of each column by itself, and their mean.
    columns = AUC_COLUMNS
    single = [metric.compute(total(metric, x, {"label": y}, WEIGHTS, N))["auc"] for x, y in columns]
    logits, labels = (np.stack(x, -1) for x in zip(*columns, strict=True))
    several = metrics.AUC(bins=bins, classes=("first", "second"))
    found = several.compute(
        total(several, logits, {"label": labels}, np.tile(WEIGHTS[:, None], 2), 32)
    )
    assert [found["auc/first"], found["auc/second"]] == single
    assert found["auc"] == pytest.approx(np.mean(single))
    ones = np.ones_like(POSITIVE)
    assert metric.compute(total(metric, BINARY, {"label": ones}, WEIGHTS, N))["auc"] is None


def test_counts_do_not_stop_at_two_to_the_24():
    big = {"x": np.full(3, 2**24 + 1, np.int32), "y": np.full((), 2**24, np.float32)}
    result = metrics.add_sums(jax.tree.map(np.zeros_like, big), big)
    for _ in range(200):
        result = metrics.add_sums(result, big)
    assert result["x"].tolist() == [201 * (2**24 + 1)] * 3
    assert float(result["y"]) == 201 * 2**24


def test_mistakes_with_metrics():
    with pytest.raises(ValueError, match=r"values of shape \[3\] and its weights .* are \[4\]"):
        metrics.Accuracy().sums(jnp.eye(3), {"label": jnp.arange(3)}, {"loss": jnp.ones(4)})
    with pytest.raises(ValueError, match="reads the weights of term 'los'; the task has: loss"):
        metrics.Accuracy(term="los").sums(
            jnp.eye(3), {"label": jnp.arange(3)}, {"loss": jnp.ones(3)}
        )
    with pytest.raises(ValueError, match=r"shape \[3, 3\], and feature 'target' of \[3\]"):
        metrics.MAE().sums(jnp.eye(3), {"target": jnp.ones(3)}, {"loss": jnp.ones(3)})
    with pytest.raises(ValueError, match="takes one logit for each label, or two"):
        metrics.AUC().sums(jnp.eye(3), {"label": jnp.arange(3)}, {"loss": jnp.ones(3)})
    with pytest.raises(ValueError, match="two metrics or loss terms are called accuracy"):
        metrics.check_metrics([metrics.Accuracy(), metrics.Accuracy()], ["loss"])
    odd = type("Odd", (metrics.Metric,), {"sums": lambda self, *_: {"sum": 3.0}})(name="odd")
    with pytest.raises(ValueError, match=r"'odd': sums\(\) returned sum: float; it returns"):
        metrics.measure(odd, jnp.eye(3), {}, {})
    with pytest.raises(ValueError, match=r"'odd': sums\(\) returned arrays of shapes \[\[3\]\]"):
        metrics.add_sums({"odd": {"sum": np.ones(2)}}, {"odd": {"sum": np.ones(3)}})
    with pytest.raises(ValueError, match="cut-offs of at least 1"):
        metrics.Ranking(k=())
