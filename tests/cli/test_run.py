"""The command itself: train, stop, resume, compare."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

import spmd
from spmd.cli import main
from spmd.data import TFDS
from tests.command import REPOSITORY, final_state
from tests.marks import slow_but

DIGITS = ("--experiment", "digits")


def files(directory):
    """Path -> content of every file below `directory`."""
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.smoke
def test_twenty_steps(run_cli, tmp_path):
    done = run_cli(*DIGITS, "--train.steps", 20)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs/digits/summary.json").read_text())["steps"] == 20


def test_trains_and_writes_the_run_directory(run_main, tmp_path):
    args = ("--simulate", 8, "--mesh.data", 4, "--mesh.fsdp", 2, "--train.steps", 60)
    done = run_main(*DIGITS, *args, "--run.dir", "out")
    assert done.returncode == 0, done.stderr
    assert "8 x cpu (cpu), mesh data=4 fsdp=2" in done.stdout
    assert re.search(r"params/layers/1/kernel +\[256, 128\] +float32 +fsdp", done.stdout)
    assert "done: 60 steps" in done.stdout
    assert "\x1b" not in done.stdout  # plain lines where there is no terminal
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["experiment"], summary["steps"]) == ("digits", 60)
    assert summary["metrics"]["eval/accuracy"] > 0.8
    assert summary["metrics"]["train/loss"] > 0
    assert {"compile", "input", "step", "evaluation", "checkpoint"} <= set(summary["seconds"])
    lines = [json.loads(x) for x in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "train/loss" in x] == [50, 60]
    assert list((tmp_path / "out/tensorboard").glob("events*"))
    assert (tmp_path / "out/checkpoints/60").is_dir()
    assert json.loads((tmp_path / "out/config.json").read_text())["config"]["mesh"]["fsdp"] == 2

    before = files(tmp_path / "out")
    again = run_main(*DIGITS, "--train.steps", 60, "--run.dir", "out")  # on another mesh
    assert "is finished: 60 steps" in again.stdout and again.returncode == 0
    assert files(tmp_path / "out") == before

    other_mesh = run_main("eval", *DIGITS, "--run.dir", "out")
    assert other_mesh.returncode == 0, other_mesh.stderr
    measured = json.loads(other_mesh.stdout.splitlines()[-1])
    assert files(tmp_path / "out") == before
    assert measured["eval/accuracy"] == pytest.approx(summary["metrics"]["eval/accuracy"], abs=1e-6)

    one_device = (*DIGITS, "--simulate", 1)
    longer = run_main(*one_device, "--train.steps", 90, "--run.dir", "out")
    assert "1 x cpu" in longer.stdout
    assert "schedule now spans 90 steps (was 60)" in longer.stdout, longer.stderr
    assert "resuming at step 60 of 90" in longer.stdout
    assert json.loads((tmp_path / "out/summary.json").read_text())["steps"] == 90


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Where the runs without a signal are kept, one for each number of steps per dispatch."""
    return tmp_path_factory.mktemp("undisturbed")


@pytest.mark.parametrize(
    ("signum", "dispatch"),
    slow_but([(signal.SIGINT, 1)], [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 4)]),
)
def test_stopped_and_resumed_equals_undisturbed_bit_by_bit(
    run_cli, start_cli, tmp_path, undisturbed, signum, dispatch
):
    steps = 600
    args = (
        *DIGITS,
        "--train.steps",
        steps,
        "--train.steps-per-dispatch",
        dispatch,
        "--log.every",
        20,
    )
    process = start_cli(*args, "--run.dir", "stopped")
    for line in process.stdout:
        if line.startswith("step 60"):
            process.send_signal(signum)
            break
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, stderr
    stopped_at = int(re.search(r"at step (\d+), state saved", stderr)[1])
    assert 60 <= stopped_at < steps and "the same command resumes it" in stderr
    assert not (tmp_path / "stopped/summary.json").exists()

    resumed = run_cli(*args, "--run.dir", "stopped")
    assert f"resuming at step {stopped_at} of {steps}" in resumed.stdout, resumed.stderr
    whole = undisturbed / str(dispatch)
    if not whole.exists():
        assert run_cli(*args, "--run.dir", whole).returncode == 0
    got, want = final_state(tmp_path / "stopped"), final_state(whole)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    steps_logged = [
        json.loads(x)["step"] for x in (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()
    ]
    assert steps_logged == sorted(steps_logged)


@pytest.mark.gate
def test_another_identity_is_refused_and_the_run_kept(run_main, tmp_path):
    short = (*DIGITS, "--train.steps", 5, "--run.dir", "out")
    assert run_main(*short).returncode == 0
    before = files(tmp_path / "out")
    refused = run_main(*short, "--optimizer.momentum", 0.5, "--data.batch-size", 32)
    assert refused.returncode == 2
    for part in (
        "optimizer.momentum: 0.9 -> 0.5",
        "data.batch_size: 64 -> 32",
        "--run.dir",
        "--run.fresh",
    ):
        assert part in refused.stderr
    assert files(tmp_path / "out") == before
    fresh = run_main(*short, "--optimizer.momentum", 0.5, "--run.fresh")
    assert fresh.returncode == 0, fresh.stderr
    (aside,) = [p for p in tmp_path.iterdir() if p.name.startswith("out.")]
    assert files(aside) == before


@pytest.mark.gate
def test_a_diverging_run_stops_and_names_the_step(run_main, tmp_path):
    args = (
        *DIGITS,
        "--train.steps",
        30,
        "--optimizer.learning-rate",
        1e30,
        "--optimizer.schedule",
        "constant",
        "--optimizer.warmup-steps",
        0,
        "--optimizer.momentum",
        0,
        "--checkpoint.every",
        1,
    )
    stopped = run_main(*args, "--run.dir", "a")
    assert stopped.returncode == 1
    step = int(re.search(r"not finite at step (\d+)", stopped.stderr)[1])
    assert "Traceback" not in stopped.stderr
    kept = {int(p.name) for p in (tmp_path / "a/checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {step - 1}
    assert not (tmp_path / "a/summary.json").exists()
    skipped = run_main(*args, "--run.dir", "b", "--train.nonfinite", "skip")
    assert skipped.returncode == 0, skipped.stderr
    assert (
        json.loads((tmp_path / "b/summary.json").read_text())["metrics"]["train/skipped_steps"] > 0
    )


@pytest.mark.smoke
def test_from_python(tmp_path):
    exp = spmd.load("digits", ["--train.steps", "50", "--run.dir", str(tmp_path / "out")])
    run = exp.train()
    assert run.steps == 50 and run.metrics["eval/accuracy"] > 0.8


AUGMENTED = (
    "--data.transforms crop:1,mixup:0.2 --optimizer.ema 0.98"
    " --optimizer.schedule constant --optimizer.learning-rate 0.03"
)


@pytest.mark.gate
def test_augmented_and_averaged_resumes_bit_by_bit(tmp_path, run_main):
    """Both depend on the step alone; what is evaluated is the average, in training and afterwards."""
    args = [*AUGMENTED.split(), "--train.steps-per-dispatch", "4", "--log.every", "400"]

    def train(name, steps):
        more = ["--train.steps", str(steps), "--run.dir", str(tmp_path / name)]
        return spmd.load("digits", args + more).train()

    train("cut", 102)  # resumes in the middle of what was a dispatch
    cut, whole = train("cut", 200), train("whole", 200)
    assert cut.metrics["eval/loss"] == whole.metrics["eval/loss"]
    assert whole.metrics["eval/accuracy"] > 0.85
    states = [final_state(tmp_path / name, *args) for name in ("cut", "whole")]
    for name in states[1]:
        np.testing.assert_array_equal(states[0][name], states[1][name], err_msg=name)
    shown = run_main("eval", *DIGITS, *AUGMENTED.split(), "--run.dir", "whole")
    measured = json.loads(shown.stdout.splitlines()[-1])
    assert measured["eval/loss"] == pytest.approx(whole.metrics["eval/loss"], rel=1e-5)
    refused = run_main("eval", *DIGITS, "--run.dir", "whole")
    assert refused.returncode == 2
    assert "optimizer.ema: 0.98 -> 0.0" in refused.stderr
    assert "data.transforms.1.alpha: 0.2 -> (absent)" in refused.stderr


@pytest.mark.parametrize(
    ("name", "rate"),
    slow_but(
        [],
        [("lion", 1e-3), ("muon", 3e-3), ("adafactor", 1e-2), ("lamb", 1e-2), ("lars", 30.0)],
        gate=[("muon", 3e-3)],
    ),
)
def test_every_optimizer_learns(name, rate, tmp_path):
    args = ["--optimizer", name, "--optimizer.learning-rate", str(rate), "--train.steps", "150"]
    args += ["--run.dir", str(tmp_path / "out")]
    assert spmd.load("digits", args).train().metrics["eval/accuracy"] > 0.9


def test_list_and_help_import_no_jax():
    code = (
        "import sys; from spmd.cli import main; main(['--help']); main(['--list']);"
        " assert not {'jax', 'flax', 'numpy'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--mesh.fsdp" in done.stdout and "digits" in done.stdout


def test_help_of_an_experiment_shows_its_own_fields(run_main):
    shown = run_main(*DIGITS, "--help")
    assert shown.returncode == 0
    for part in ("--model.hidden", "--optimizer.nesterov", "Global batch", "--strategy.zero"):
        assert part in shown.stdout


COMMANDS = [
    ("--help",),
    ("--list",),
    ("runs", "list", "."),
    (*DIGITS, "--help"),
    ("launch", "local", "--help"),
    ("launch", "slurm", "--dry-run", *DIGITS),
    ("data", "show", *DIGITS),
    ("plan", "--no-compile", *DIGITS),
]
REDIRECTED = {
    "| :; exit ${PIPESTATUS[0]}": (141, ""),  # as `| head` ends
    "2>&1 | :; exit ${PIPESTATUS[0]}": (141, ""),
    ">&-": (0, ""),
    ">&- <&-": (0, ""),
    ">/dev/full": (1, "error: cannot write to standard output: No space left on device\n"),
}


@pytest.mark.parametrize(
    ("words", "redirect"),
    slow_but(
        [(("runs", "list", "."), redirect) for redirect in REDIRECTED]
        + [((*DIGITS, "--help"), "| :; exit ${PIPESTATUS[0]}")],
        itertools.product(COMMANDS, REDIRECTED),
    ),
)
def test_output_that_nobody_takes_ends_a_command_without_a_traceback(tmp_path, words, redirect):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/config.json").write_text('{"experiment": "digits"}')
    line = '"$@" ' + redirect
    command = ["bash", "-c", line, "bash", sys.executable, str(REPOSITORY / "run.py"), *words]
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == REDIRECTED[redirect]
    assert contents_of(tmp_path) == [
        "one",
        "one/config.json",
    ]  # no file got the number of what was closed


def contents_of(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*"))


@pytest.mark.gate
def test_a_run_without_standard_output_trains(tmp_path):
    """The files it opens do not get the numbers that are free."""
    line = '"$@" >&- 2>&- <&-'
    words = (*DIGITS, "--train.steps", "5", "--run.dir", "out")
    command = ["bash", "-c", line, "bash", sys.executable, str(REPOSITORY / "run.py"), *words]
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    assert subprocess.run(command, cwd=tmp_path, env=environ).returncode == 0
    assert json.loads((tmp_path / "out/summary.json").read_text())["steps"] == 5
    assert main(["runs", "check", str(tmp_path / "out")]) == 0


OTHER_MESHES = {
    "three devices": ("", "--simulate 3"),
    "gradients in parts": ("--train.accumulate 4 --train.noise-scale", "--simulate 1"),
    "replicas": ("--strategy local --strategy.replicas 4 --strategy.period 5", "--simulate 3"),
    "a server": ("--strategy server", "--simulate 3"),
}


@pytest.mark.parametrize(
    "case", slow_but(["three devices"], OTHER_MESHES, gate=[*OTHER_MESHES][1:])
)
def test_eval_needs_nothing_of_training(tmp_path, monkeypatch, capsys, case):
    """Neither a batch size that divides nor the training split."""
    options, mesh = (words.split() for words in OTHER_MESHES[case])
    monkeypatch.chdir(tmp_path)
    run = [*DIGITS, *options, "--run.dir", "out", "--train.steps"]
    assert main([*run, "20", "--simulate", "4", "--log.no-tensorboard"]) == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    capsys.readouterr()
    opened = []
    whole = TFDS.open
    monkeypatch.setattr(
        TFDS, "open", lambda self, split: opened.append(split) or whole(self, split)
    )
    assert main(["eval", *run, "1", *mesh]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["eval/loss"] == pytest.approx(summary["metrics"]["eval/loss"], rel=1e-5)
    assert set(opened) == {"eval"}
