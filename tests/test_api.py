"""spmd.load from Python: look at the arrays, train, read the history, restore, predict."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import spmd

WORDS = ["--train.steps", "40", "--log.every", "10", "--eval.every", "20"]
MESH = ["--simulate", "8", "--mesh.data", "2", "--mesh.fsdp", "4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    words = [*WORDS, "--run.dir", str(tmp_path_factory.mktemp("handle") / "run")]
    exp = spmd.load("digits", [*words, *MESH])
    return words, exp, exp.train()


def test_the_first_state_lies_on_the_mesh(trained):
    _, exp, _ = trained
    untrained = exp.init()
    kernel = untrained.arrays["params/layers/1/kernel"]
    assert untrained.step == 0
    assert {s.data.shape for s in kernel.addressable_shards} == {(256 // 4, 128)}
    assert untrained.evaluate()["eval/accuracy"] < 0.4


def test_the_history_has_every_line(trained):
    _, _, run = trained
    steps, losses = run.series("train/loss")
    assert steps == [10, 20, 30, 40] and losses[-1] < losses[0] / 2
    steps, accuracies = run.series("eval/accuracy")
    assert steps == [20, 40] and accuracies[-1] == run.metrics["eval/accuracy"]
    assert len(run.history) == 6
    with pytest.raises(ValueError, match="Did you mean 'train/loss'"):
        run.series("train/los")


def test_training_again_returns_the_finished_run(trained, capsys):
    _, exp, run = trained
    assert exp.train() == run
    assert "is finished: 40 steps" in capsys.readouterr().out


def test_a_restored_model_predicts_on_any_mesh(trained):
    words, exp, run = trained
    model = exp.restore()
    assert repr(model) == "digits at step 40 on data=2 fsdp=4"
    assert model.evaluate() == exp.evaluate()
    assert model.evaluate()["eval/accuracy"] == run.metrics["eval/accuracy"]
    source = exp.experiment.data.open("eval")
    examples = source.take(np.arange(len(source)))
    logits = model.predict(examples)
    assert isinstance(logits, np.ndarray) and logits.shape == (len(source), 10)
    right = logits.argmax(-1) == examples["label"]
    np.testing.assert_allclose(right.mean(), run.metrics["eval/accuracy"], rtol=1e-6)
    # three images, which eight devices do not divide; without labels; on another mesh and batch
    words = [*words, "--simulate", "8", "--mesh.fsdp", "8", "--mesh.data", "1"]
    other = spmd.load("digits", [*words, "--data.eval-batch-size", "2"]).restore(40)
    three = other.predict({"image": examples["image"][:3]})
    np.testing.assert_allclose(three, logits[:3], rtol=1e-4, atol=1e-4)


def test_a_source_may_return_another_config_each_time_it_is_read(trained):
    _, exp, run = trained
    data = exp.experiment.data

    found = {"found": lambda self, recorded=None: dataclasses.replace(self)}
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    anew = type(type(data).__name__, (type(data),), found)(**fields)
    fresh = dataclasses.replace(exp.experiment, data=anew)
    assert fresh.evaluate()["eval/accuracy"] == run.metrics["eval/accuracy"]


def test_mistakes_are_one_message(trained, tmp_path):
    words, exp, _ = trained
    model = exp.restore()
    with pytest.raises(ValueError, match="has no feature 'image'"):
        model.predict({"label": np.zeros(3, np.int32)})
    with pytest.raises(ValueError, match="declares uint8"):
        model.predict({"image": np.zeros((3, 8, 8, 1), np.float32)})
    with pytest.raises(ValueError, match="there are: 40"):
        exp.restore(7)
    with pytest.raises(ValueError, match="no run in"):
        spmd.load("digits", ["--run.dir", str(tmp_path / "gone")]).restore()
    with pytest.raises(ValueError, match="another identity"):
        spmd.load("digits", [*words, "--seed", "1"]).restore()


def test_a_word_that_is_not_understood_ends_no_session(capsys):
    with pytest.raises(ValueError, match=r"--train\.steps") as error:
        spmd.load("digits", ["--train.stepz", "5"])
    assert "--train.stepz" in str(error.value)
    assert capsys.readouterr().err == ""
