"""Batches that a task does not take are refused: by shape at the start, by value as they are read."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spmd import tasks
from spmd.cli import main
from spmd.core import batches
from spmd.core.batches import Expected, Ids
from spmd.models.cnn import CNN
from spmd.models.mlp import MLP
from spmd.models.transformer import Transformer
from tests.marks import slow_but
from tests.spoiled import write

B, T = 4, 8
VECTORS = {"image": ((B, 6), "float32"), "label": ((B,), "int32")}
TOKENS = dict.fromkeys(("tokens", "targets", "segments", "positions"), ((B, T), "int32"))
LOADER = {"example_id": ((B,), "int32"), "weight": ((B,), "float32")}
TRANSFORMER = Transformer(vocab=37, length=T, layers=1, embed=16, heads=2, mlp=32)


class PerPixel(nnx.Module):
    """Logits for each of six places, as a segmentation has them."""

    def __init__(self, rngs: nnx.Rngs):
        self.head = nnx.Linear(1, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(x[..., None])


def ranges(task, model, features):
    """The ranges that a task gives for a batch of these shapes."""
    built = task.build(model)
    batch = {k: jax.ShapeDtypeStruct(*v) for k, v in (LOADER | features).items()}
    return batches.index_ranges(built, jax.eval_shape(built.init, jax.random.key(0)), batch)


def test_ranges_come_from_the_output_and_from_the_model():
    images, language = tasks.Classification(), tasks.LanguageModel()
    (label,) = ranges(images, MLP(inputs=6, classes=3), VECTORS).values()
    assert (label.low, label.high, label.target) == (0, 3, True)
    mixed = VECTORS | {"label_b": ((B,), "int32"), "mix": ((B,), "float32")}
    assert set(ranges(images, MLP(inputs=6), mixed)) == {"label", "label_b"}
    padded = dataclasses.replace(TRANSFORMER, vocab_multiple=16)  # 48 logits, 37 of them tokens
    found = ranges(language, padded, TOKENS)
    assert {k: (ids.low, ids.high, ids.target) for k, ids in found.items()} == {
        "tokens": (0, 37, False),
        "targets": (-1, 37, True),
        "positions": (0, T, False),
    }


@pytest.mark.parametrize(
    "model,change,message",
    [
        (
            MLP(inputs=6),
            {"label": ((B, B, 2), "int32")},
            "'label' is int32[4, 4, 2] and the task takes int[B]",
        ),
        (
            MLP(inputs=6),
            {"label": ((B, 1), "int32")},
            "'label' is int32[4, 1] and the task takes int[B]",
        ),
        (
            MLP(inputs=6),
            {"label": ((B,), "float32")},
            "'label' is float32[4] and the task takes int[B]",
        ),
        (MLP(inputs=6), {"label": ((B,), "bool")}, "'label' is bool[4] and the task takes int[B]"),
        (
            MLP(inputs=6),
            {"weight": ((B, 1), "float32")},
            "the weights are float32[4, 1] and the task takes float[B]",
        ),
        (MLP(inputs=6), {"weight": ((1,), "float32")}, "(B = 1 rows, as the weights have)"),
        (
            PerPixel,
            {},
            "output is float32[4, 6, 3], and feature 'label' is int32[4]: the task takes logits float[4",
        ),
        (
            MLP(inputs=6),
            {"image": ((B, 8, 8, 1), "uint8")},
            "shape [8, 8, 1] has 64 values and model.inputs=6",
        ),
        (
            CNN(),
            {"image": ((B, 8, 8), "uint8")},
            "the model takes images [H, W, 1] (model.channels=1), given [8, 8]",
        ),
        (
            PerPixel,
            {"image": ((B, 6), "int32")},
            "the model does not take the batch (image int32[4, 6], label int32[4])",
        ),
        (
            TRANSFORMER,
            {"targets": ((B,), "int32")},
            "'targets' is int32[4] and the task takes int[B, T]",
        ),
        (
            TRANSFORMER,
            {"targets": ((B, 4), "int32")},
            "'targets' is of shape [4, 4], and 'tokens' of [4, 8]",
        ),
        (TRANSFORMER, {"tokens": ((B, T, 2), "int32")}, "int32[4, 8, 2]"),
        (
            TRANSFORMER,
            {"tokens": ((B, T), "float32")},
            "'tokens' is float32[4, 8] and the task takes int[B, T]",
        ),
        (
            TRANSFORMER,
            {"positions": ((1, T), "int32")},
            "'positions' is int32[1, 8] and the task takes int[B, T]",
        ),
    ],
)
def test_shapes_are_refused_by_name(model, change, message):
    language = model is TRANSFORMER
    task = tasks.LanguageModel() if language else tasks.Classification()
    with pytest.raises(ValueError, match=re.escape(message)):
        ranges(task, model, (TOKENS if language else VECTORS) | change)


def test_a_traced_loss_refuses_them_too():
    """What no experiment has built: a task by itself, as strategies and verify trace it."""
    task = tasks.Classification().build(MLP(inputs=6))
    features = LOADER | VECTORS | {"label": ((B, B), "int32")}
    batch = {k: jnp.zeros(*v) for k, v in features.items()}
    params, state = task.init(jax.random.key(0))
    with pytest.raises(ValueError, match=re.escape("'label' is int32[4, 4]")):
        jax.jit(task.evaluate)(params, state, batch)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16"])
def test_narrow_indices_number_all_logits(dtype):
    """300 tokens do not fit into 8 bits: neither a label nor an argmax may wrap around."""
    model = Transformer(vocab=300, length=T, layers=1, embed=16, heads=2, mlp=32)
    rng = np.random.default_rng(0)
    batch = {k: rng.integers(0, 100, (B, T)).astype("int32") for k in ("tokens", "targets")}
    batch |= {"example_id": np.arange(B, dtype=np.int32), "weight": np.ones(B, np.float32)}
    task = tasks.LanguageModel().build(model)
    params, state = task.init(jax.random.key(0))
    narrow = batch | {"targets": batch["targets"].astype(dtype)}
    assert task.evaluate(params, state, narrow) == task.evaluate(params, state, batch)


@pytest.mark.parametrize(
    "values,example,message",
    [
        ([0, 2, -1], 7, "is -1 in example 7 of the training data: it must be in 0..9 (10 classes)"),
        ([10, 9, 9], 5, "feature 'x' is 10 in example 5 of the training data"),
        ([0, 2**40, 1], 6, f"feature 'x' is {2**40} in example 6"),
        ([0, -2, 0], 6, "feature 'y' is -2 in example 6 of the training data, element 1"),
    ],
)
def test_the_first_index_out_of_range_is_named(values, example, message):
    expected = Expected("training", {}, {"x": Ids(10, "classes"), "y": Ids(10, "tokens", low=-1)})
    ids = np.array([5, 6, 7])
    expected.check_ranges(
        {"x": np.array([0, 5, 9]), "y": np.array([[-1, 9]] * 3), "example_id": ids}
    )
    x = np.array(values)
    batch = {"x": x, "example_id": ids}
    if "'y'" in message:
        batch = {"x": np.zeros(3, int), "y": np.stack([np.zeros(3, int), x], 1), "example_id": ids}
    with pytest.raises(ValueError, match=re.escape(message)):
        expected.check_ranges(batch)


TRAIN = "if split == 'train':\n    "
SPOILED = {
    "label": (
        TRAIN + "data['label'][17] = -1",
        "'label' is -1 in example 17 of the training data: it must be in 0..2",
    ),
    "label, evaluated": (
        "if split == 'eval':\n    data['label'][9] = 3",
        "'label' is 3 in example 9 of the evaluation data",
    ),
    "label, mixed": (TRAIN + "data['label'][:] = 7", "'label' is 7 in example"),
    "labels, wide": (
        TRAIN + "data['label'] = data['label'].astype('int64')",
        "'label' of the training data is int64[], the experiment declares int32[]",
    ),
    "labels, deep": (
        TRAIN + "data['label'] = data['label'].repeat(4).reshape(32, 2, 2)",
        "'label' of the training data is int32[2, 2]",
    ),
    "image": (
        TRAIN + "data['image'] = data['image'][..., 0]",
        "'image' of the training data is float32[3, 2], the experiment",
    ),
    "missing": (
        TRAIN + "data['lable'] = data.pop('label')",
        "the training data has no feature 'label'. Did you mean 'lable'?",
    ),
    "token": (
        TRAIN + "data['tokens'][3, 5] = 10",
        "'tokens' is 10 in example 3 of the training data, element 5",
    ),
    "target": (
        TRAIN + "data['targets'][3, 5] = -100",
        "element 5: it must be in 0..9 (10 tokens of the model), or -1",
    ),
}


@pytest.mark.parametrize("case", slow_but([*SPOILED][:2], SPOILED, gate=[*SPOILED][2:]))
def test_a_run_refuses_spoiled_data(case, tmp_path, monkeypatch, capsys):
    spoil, message = SPOILED[case]
    language = case in ("token", "target")
    write(tmp_path, spoil, "Mixup(0.2)," if "mixed" in case else "", language)
    monkeypatch.chdir(tmp_path)
    assert main(["--experiment", "own.py", "--log.no-tensorboard"]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and "Traceback" not in shown
    if "evaluated" not in case:
        assert not (tmp_path / "runs").exists()


def test_verification_and_prediction_check_what_they_read(tmp_path, monkeypatch):
    import spmd

    monkeypatch.chdir(tmp_path)
    write(tmp_path, SPOILED["label"][0])
    with pytest.raises(ValueError, match="'label' is -1 in example 17"):
        spmd.load("own.py", ["--simulate", "2"]).verify(steps=4)
    write(tmp_path, "pass", language=True)
    model = spmd.load("own.py").init()
    with pytest.raises(
        ValueError, match="'tokens' is 10 in example 0 of the given data, element 6"
    ):
        model.predict({"tokens": np.eye(2, 8, k=6, dtype=np.int32) * 10})
    # An unlabelled test set is predicted: the labels are not read.
    unlabelled = np.full((2, 8), -100, np.int32)
    assert model.predict({"tokens": -1 - unlabelled // 50, "targets": unlabelled}).shape == (
        2,
        8,
        10,
    )


@pytest.mark.gate
def test_a_restored_run_checks_what_it_reads(tmp_path, monkeypatch):
    import spmd

    monkeypatch.chdir(tmp_path)
    write(tmp_path, "pass", language=True)
    assert main(["--experiment", "own.py", "--train.steps", "2", "--log.no-tensorboard"]) == 0
    model = spmd.load("own.py", ["--train.steps", "2", "--log.no-tensorboard"])
    restored = model.restore()
    assert restored.program.ranges == model.init().program.ranges != {}
    with pytest.raises(ValueError, match="'tokens' is 10 in example 0 of the given data"):
        restored.predict({"tokens": np.full((2, 8), 10, np.int32)})
