"""Batches of unlike sources: rows, filler, shares, transforms of the parts, a task on two of them."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spmd import Experiment
from spmd.api import Handle
from spmd.data import Arrays, loader
from spmd.data.augment import Crop, Flip, Mixup
from spmd.data.combined import Combined
from spmd.models.mlp import MLP
from spmd.optim import SGD
from spmd.tasks import Task
from spmd.train import CheckpointConfig, RunConfig, TrainConfig

IMAGES, POINTS = 30, 11


def part(num, seed, features, **fields):
    rng = np.random.default_rng(seed)
    arrays = {
        name: rng.integers(0, 3 if not shape else 200, (num, *shape)).astype(dtype)
        for name, (shape, dtype) in features.items()
    }
    give = lambda: arrays
    return Arrays(train=give, eval=give, features=features, **fields)


LABELLED = {"image": ((4, 4, 1), "uint8"), "label": ((), "int32")}
MEASURED = {"image": ((4, 4, 1), "uint8"), "value": ((2,), "float32")}


def combined(*transforms, weights=(3, 1), **fields):
    labelled = part(IMAGES, 0, LABELLED, transforms=transforms)
    return Combined(
        parts=(labelled, part(POINTS, 1, MEASURED)), weights=weights, batch_size=8, **fields
    )


def stream(data, seed=3, **kwargs):
    source = data.open("train")
    change = data.pipeline("train", source, seed)
    kwargs = {"batch_size": 8, "stop": 12} | kwargs
    batches = list(loader.train_batches(source, seed=seed, transform=change, **kwargs))
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def test_rows_are_examples_of_their_part_and_the_rest_is_zero():
    data = combined()
    got = stream(data)
    source, example = got["source"], got["example_id"]
    arrays = [p.train() for p in data.parts]
    for k, lacks in ((0, "value"), (1, "label")):
        rows = source == k
        ids = example[rows] - k * IMAGES
        for name, x in arrays[k].items():
            np.testing.assert_array_equal(got[name][rows], x[ids])
        assert not got[lacks][rows].any()
        num = len(arrays[k]["image"])
        assert (np.sort(ids[:num]) == np.arange(num)).all() or len(
            ids
        ) < num  # an epoch of the part
    assert abs(np.cumsum(source) - np.arange(1, 97) / 4).max() <= 1
    assert (got["weight"] == 1).all()
    shapes = {name: (x.shape[1:], str(x.dtype)) for name, x in got.items()}
    assert shapes == {
        name: (shape[1:], dtype) for name, (shape, dtype) in data.abstract_batch(8).items()
    }


ALL = (Crop(1), Flip(), Mixup(0.4))


def test_a_transform_of_one_part_may_not_change_the_type_of_a_common_feature():
    with pytest.raises(ValueError, match=r"'image' is float32\[4, 4, 1\] in part 0 .* uint8"):
        combined(*ALL)


def as_floats(transforms):
    features = {"picture" if name == "image" else name: x for name, x in LABELLED.items()}
    return Combined(
        parts=(part(IMAGES, 0, features, transforms=transforms), part(POINTS, 1, MEASURED)),
        weights=(2, 1),
        batch_size=8,
    )


def test_transforms_and_partners_are_those_of_the_part_alone():
    data = as_floats(ALL)
    got, plain = stream(data), stream(as_floats(()))
    rows = np.flatnonzero(got["source"] == 0)
    alone = data.parts[0]
    source = alone.open("train")
    batch = source.take(got["example_id"][rows].astype(np.int64))
    want = alone.pipeline("train", source, 3)(batch, rows)
    for name, x in want.items():
        np.testing.assert_array_equal(got[name][rows], x, err_msg=name)
    others = np.flatnonzero(got["source"] == 1)
    for name in ("image", "value"):
        np.testing.assert_array_equal(got[name][others], plain[name][others])
    assert not got["mix"][others].any() and not got["picture"][others].any()


@pytest.mark.parametrize("threads", [1, 3])
def test_resumption_rows_and_threads_do_not_show(threads):
    data = as_floats(ALL)
    whole = stream(data)
    rows = np.array([1, 2, 6])
    got = stream(data, start=5, rows=rows, threads=threads)
    for name, x in whole.items():
        want = x.reshape(12, 8, *x.shape[1:])[5:, rows]
        np.testing.assert_array_equal(got[name].reshape(want.shape), want, err_msg=name)


def test_evaluation_reads_every_example_of_all_parts_once():
    data = combined()
    batches = list(loader.eval_batches(data.open("eval"), batch_size=7))
    got = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    real = got["weight"] > 0
    np.testing.assert_array_equal(got["source"][real], np.repeat([0, 1], [IMAGES, POINTS]))
    np.testing.assert_array_equal(got["value"][real][IMAGES:], data.parts[1].eval()["value"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Both(Task):
    """Classes of the rows of part 0, two values of those of part 1."""

    input: str = "image"

    def weights(self, batch):
        return {
            name: (batch["source"] == k).astype(jnp.float32)
            for k, name in enumerate(("loss", "value"))
        }

    def values(self, outputs, batch, *, train):
        square = jnp.square(outputs[:, 3:] - batch["value"].astype(outputs.dtype) / 100).sum(-1)
        cross = optax.softmax_cross_entropy_with_integer_labels(outputs[:, :3], batch["label"])
        return {"loss": cross, "value": square}

    def coefficients(self, model):
        return {"loss": 1.0, "value": 0.5}


@pytest.mark.gate
def test_two_tasks_on_two_sources(tmp_path):
    exp = Experiment(
        run=RunConfig(dir=str(tmp_path / "run")),
        name="both",
        model=MLP(inputs=16, classes=5, hidden=(8,)),
        task=Both(),
        data=combined(Flip()),
        optimizer=SGD(learning_rate=0.1),
        train=TrainConfig(steps=4),
        checkpoint=CheckpointConfig(best=""),
    )
    snapshot = Handle(exp).init()
    measured = snapshot.evaluate()
    images, points = (p.eval() for p in exp.data.parts)
    outputs = np.asarray(snapshot.predict({"image": images["image"]}), np.float64)[:, :3]
    cross = np.log(np.exp(outputs).sum(-1)) - outputs[np.arange(IMAGES), images["label"]]
    assert measured["eval/loss"] == pytest.approx(cross.mean(), rel=1e-5)
    outputs = np.asarray(snapshot.predict({"image": points["image"]}), np.float64)[:, 3:]
    square = np.square(outputs - points["value"] / 100).sum(-1)
    assert measured["eval/value"] == pytest.approx(square.mean(), rel=1e-5)
    run = Handle(exp).train()
    longer = dataclasses.replace(exp, train=TrainConfig(steps=6))
    assert run.steps == 4 and Handle(longer).train().steps == 6  # resumed
    report = Handle(dataclasses.replace(exp, simulate=4)).verify(2)
    assert report.verified, report
    assert all(r.worst("float64", "grads") < 1e-9 for r in report.results if r.sound)


SAME = ({"x": ((2,), "float32")}, {"x": ((2,), "float32")})
MISTAKES = [
    (SAME, {"weights": (1,)}, "must be one number for each of the 2 parts"),
    (SAME, {"weights": (1, 0)}, "must all be more than 0"),
    (SAME, {"transforms": (Flip(),)}, "are those of its parts"),
    (({"x": ((), "int32")}, {}), {}, "part 1 of the combined data declares no features"),
    (({"source": ((), "int32")}, SAME[0]), {}, "part 0 .* has a feature 'source'"),
    (
        (SAME[0], {"x": ((3,), "float32")}),
        {},
        r"'x' is float32\[2\] in part 0 of the combined data and float32\[3\] in part 1",
    ),
]


@pytest.mark.parametrize("features,fields,message", MISTAKES)
def test_mistakes(features, fields, message):
    parts = tuple(part(4, k, f) for k, f in enumerate(features))
    with pytest.raises(ValueError, match=message):
        Combined(parts=parts, **({"weights": (1, 1)} | fields))
