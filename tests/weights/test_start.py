"""A run that starts from another run's weights, whole or in part, through the command and from Python."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from etils import epath

import spmd
from spmd.core import tree
from spmd.tasks import Classification, FrozenModel

DIGITS = ("--experiment", "digits")
MESH = ("--simulate", "4", "--mesh.fsdp", "2", "--mesh.tensor", "2")
ADAMW = ("--optimizer", "adamw", "--optimizer.learning-rate", "0.01")


@pytest.fixture(autouse=True, scope="module")
def started(devices):
    """JAX with its eight devices, before an experiment asks for fewer."""


def load(*words):
    given = [str(w) for w in words]
    return spmd.load("digits", given if "--simulate" in given else [*given, "--simulate", "1"])


def arrays(snapshot):
    return {name: np.array(leaf) for name, leaf in snapshot.arrays.items()}


@pytest.fixture(scope="module")
def source(digits_run):
    """A trained run, on one device."""
    return digits_run


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A trained run that kept a moving average."""
    place = tmp_path_factory.mktemp("averaged") / "run"
    load("--train.steps", 30, "--optimizer.ema", 0.9, "--run.dir", place).train()
    return place


def test_starts_where_the_other_run_ended(run_main, tmp_path, source):
    words = (*DIGITS, "--init.from", source, "--train.steps", 20, *MESH, "--run.dir", "second")
    done = run_main(*words)
    assert done.returncode == 0, done.stderr
    assert f"starting from {source / 'checkpoints/60'}" in done.stdout
    after = json.loads((tmp_path / "second/summary.json").read_text())["metrics"]
    assert after["train/accuracy"] > 0.9  # over these 20 steps; from random weights 0.6

    shutil.rmtree(tmp_path / "second/checkpoints")  # so that the next start is the first one
    (tmp_path / "second/summary.json").unlink()
    start = load("--init.from", source, *MESH).init()
    assert start.step == 0
    assert tuple(start.arrays["params/layers/1/kernel"].sharding.spec) == ("tensor", "fsdp")
    measured = load("--run.dir", source).evaluate()
    assert start.evaluate() == pytest.approx(measured, rel=1e-5)
    assert not start.arrays["opt_state/0/trace/layers/1/kernel"].any()


@pytest.mark.gate
def test_a_resumed_run_does_not_look_at_its_source(tmp_path, source):
    copy, place = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(source, copy)
    words = ("--init.from", copy, "--run.dir", place)
    load(*words, "--train.steps", 5).train()
    shutil.rmtree(copy)
    assert load(*words, "--train.steps", 10).train().steps == 10
    with pytest.raises(ValueError, match=r"init.from: .*copy.* -> .*other"):
        load("--init.from", tmp_path / "other", "--run.dir", place, "--train.steps", 15).train()


@pytest.mark.slow
def test_a_step_can_be_named_and_the_average_is_taken(tmp_path, averaged):
    state = arrays(load("--optimizer.ema", 0.9, "--run.dir", averaged).restore())
    start = arrays(load("--init.from", averaged / "checkpoints" / "30").init())
    (tmp_path / "2026").symlink_to(averaged)  # a run whose name is a number is no step
    assert load("--init.from", tmp_path / "2026").init().arrays.keys() == start.keys()
    for name in ("layers/0/kernel", "head/bias"):
        np.testing.assert_array_equal(start[f"params/{name}"], state[f"ema/{name}"])
        assert (start[f"params/{name}"] != state[f"params/{name}"]).any()
    again = arrays(load("--init.from", averaged, "--optimizer.ema", 0.5).init())
    np.testing.assert_array_equal(again["ema/head/kernel"], state["ema/head/kernel"])


@pytest.mark.slow
def test_frozen_parameters_stay_as_they_are_bit_by_bit(tmp_path, source):
    words = (*ADAMW, "--init.from", source, "--init.freeze", "layers/*", *MESH)
    exp = load(*words, "--optimizer.ema", 0.9, "--train.steps", 20, "--run.dir", tmp_path / "run")
    exp.train()
    before = arrays(load("--run.dir", source).restore())
    state = exp.restore()
    after = arrays(state)
    for name in ("layers/0/kernel", "layers/0/bias", "layers/1/kernel", "layers/1/bias"):
        frozen = f"model_state/frozen/{name}"
        np.testing.assert_array_equal(after[frozen], before[f"params/{name}"])
        assert [n for n in after if n.endswith(name)] == [frozen]  # no moments, no average
    assert (after["params/head/kernel"] != before["params/head/kernel"]).any()
    placed = state.arrays["model_state/frozen/layers/1/kernel"].sharding
    assert tuple(placed.spec) == ("tensor", "fsdp")
    # What was frozen there is a parameter like any other for the next run.
    third = arrays(load("--init.from", tmp_path / "run").init())
    np.testing.assert_array_equal(third["params/layers/0/kernel"], before["params/layers/0/kernel"])
    np.testing.assert_array_equal(third["params/head/kernel"], after["ema/head/kernel"])


@pytest.mark.gate
def test_adapters_train_resume_evaluate_and_are_merged(tmp_path, source):
    adapters = (*ADAMW, "--init.from", source, "--init.lora", 4, "--init.lora-alpha", 8)
    words = (*adapters, "--run.dir", tmp_path / "run")
    first = load(*adapters, *MESH).init()
    assert first.evaluate() == pytest.approx(load("--run.dir", source).evaluate(), rel=1e-5)
    load(*words, *MESH, "--train.steps", 20).train()
    run = load(*words, "--train.steps", 40).train()  # goes on, on one device
    assert run.metrics["eval/loss"] < first.evaluate()["eval/loss"]
    snapshot = load(*words).restore()
    assert snapshot.evaluate() == pytest.approx(
        {k: v for k, v in run.metrics.items() if k.startswith("eval/")}
    )
    state, before = arrays(snapshot), arrays(load("--run.dir", source).restore())
    trained = {n for n in state if n.startswith("params/")}
    assert trained == {f"params/layers/1/kernel/lora_{x}" for x in "ab"}
    for name in before:
        if name.startswith("params/"):
            frozen = state[f"model_state/frozen/{name.removeprefix('params/')}"]
            np.testing.assert_array_equal(frozen, before[name])
    a, b = (state[f"params/layers/1/kernel/lora_{x}"].astype(np.float64) for x in "ab")
    want = before["params/layers/1/kernel"] + 8 / 4 * (a @ b)
    merged = load("--init.from", tmp_path / "run", *MESH).init()
    got = np.array(merged.arrays["params/layers/1/kernel"])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert merged.evaluate() == pytest.approx(snapshot.evaluate(), rel=1e-4)


@pytest.mark.slow
def test_other_precision_is_cast(source):
    start = load("--init.from", source, "--param-dtype", "bfloat16").init()
    assert start.arrays["params/head/kernel"].dtype == "bfloat16"
    assert start.evaluate()["eval/accuracy"] > 0.9


WIDER = ("--model.classes", "12")


def test_another_head_is_named_and_can_be_left_out(source):
    with pytest.raises(ValueError) as said:
        load("--init.from", source, *WIDER).init()
    assert "params/head/bias: float32[10] in the checkpoint, float32[12] in the model" in str(
        said.value
    )
    assert (
        "params/head/kernel: float32[128, 10] in the checkpoint, float32[128, 12] in the model"
        in str(said.value)
    )
    assert "layers" not in str(said.value) and "init.skip" in str(said.value)
    with pytest.raises(ValueError, match=r"params/layers/2/kernel: absent in the checkpoint"):
        load("--init.from", source, "--model.hidden", 256, 128, 64).init()
    start = arrays(load("--init.from", source, *WIDER, "--init.skip", "head/*").init())
    random = arrays(load(*WIDER).init())
    before = arrays(load("--run.dir", source).restore())
    np.testing.assert_array_equal(start["params/head/kernel"], random["params/head/kernel"])
    np.testing.assert_array_equal(start["params/layers/0/bias"], before["params/layers/0/bias"])


def test_a_damaged_checkpoint_is_no_start_and_stays_where_it_is(tmp_path, source):
    place = tmp_path / "run"
    shutil.copytree(source, place)
    step = epath.Path(place) / "checkpoints/60"
    (step / "manifest.json").unlink()
    name = max((p for p in (place / "checkpoints/60").rglob("*") if p.is_file()), key=_size)
    content = bytearray(name.read_bytes())
    content[len(content) // 2] ^= 0xFF
    name.write_bytes(content)
    with pytest.raises(ValueError, match=r"init.from: .*(bad|cannot read)"):
        load("--init.from", place).init()
    assert step.exists()


def _size(path):
    return path.stat().st_size


MISTAKES = {
    "no such directory": (("--init.from", "nowhere"), r"nowhere.*there is no such directory"),
    "no run": (("--init.from", "."), r"holds no checkpoint"),
    "pattern": (("--init.freeze", "layer/*"), r"'layer/\*'.*There are: head/bias"),
    "nothing left": (("--init.freeze", "*"), "no parameter to train"),
    "both": (("--init.lora", "4", "--init.freeze", "head/*"), "give one of them"),
    "rank": (("--init.lora", "129"), r"layers/1/kernel of shape \[256, 128\].*at most 128"),
    "no rank": (("--init.lora-match", "layers/*"), "give init.lora"),
    "no matrix": (
        ("--init.lora", "2", "--init.lora-match", "head/bias"),
        r"lora_match=head/bias has no hidden matrix.*head/kernel",
    ),
    "skip alone": (("--init.skip", "head/*"), "init.skip leaves out arrays of init.from"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_have_one_message(case, run_main, tmp_path):
    words, message = MISTAKES[case]
    done = run_main(*DIGITS, *words, "--train.steps", 5)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr, re.S), done.stderr


def test_a_frozen_teacher_has_the_weights_of_its_run(source, devices):
    exp = load("--model.hidden", 8).experiment
    wide = load().experiment.model
    teacher = {"teacher": FrozenModel(model=wide, from_=str(source))}
    student = type("Student", (Classification,), {"frozen": teacher})
    mesh = dataclasses.replace(exp.mesh, data=2, fsdp=2)
    exp = dataclasses.replace(exp, task=student(), mesh=mesh, simulate=4)
    state = exp.build(devices[:4]).init()
    held = tree.named_leaves(state.model_state["frozen/teacher"]["params"])
    assert any("fsdp" in str(x.sharding.spec) for x in held.values())
    trained = arrays(load("--run.dir", source).restore())
    for name, leaf in held.items():
        np.testing.assert_array_equal(np.array(leaf), trained[f"params/{name}"])
    other = {"teacher": FrozenModel(model=exp.model, from_=str(source))}
    student = type("Student", (Classification,), {"frozen": other})
    with pytest.raises(ValueError, match="is of another model"):
        dataclasses.replace(exp, task=student()).build(devices[:4]).init()
