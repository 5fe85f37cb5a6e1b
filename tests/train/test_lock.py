"""One owner of a run directory at a time; nothing is claimed before a first step has run."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import signal
import sys
import threading
import time

import pytest
from etils import epath

import spmd
from spmd.cli import main
from spmd.train import trainer
from spmd.train.lock import Lock
from spmd.train.log import NonFinite
from spmd.train.owner import Busy
from spmd.train.program import Program
from tests.command import REPOSITORY
from tests.marks import slow_but

DIGITS = ("--experiment", "digits", "--model.hidden", "8", "--log.no-tensorboard")
LONG = (*DIGITS, "--train.steps", 20_000, "--checkpoint.every", 50, "--log.every", 10)


def tree(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def running(start_cli, *words):
    """A run that has begun to train."""
    process = start_cli(*words)
    for line in process.stdout:
        if line.removeprefix("[0] ").startswith("step "):
            return process
    raise AssertionError(process.stderr.read())


def test_the_second_owner_is_told_who_the_first_is(tmp_path):
    place = epath.Path(tmp_path / "a" / "run")
    first = Lock(place)
    with pytest.raises(Busy, match=rf"process {os.getpid()} on .*, since 20.*--run\.dir"):
        Lock(place)
    first.release()
    assert not (tmp_path / "a").exists()  # it made it, and nothing came into it
    again = Lock(place)
    (tmp_path / "a/run/config.json").write_text("{}")
    again.release()
    assert [p.name for p in (tmp_path / "a/run").iterdir()] == ["config.json"]


SEEDS = [(num, seed) for num in (1, 2) for seed in range(20)]
SEEDS = slow_but([(1, 0)], SEEDS)


@pytest.mark.parametrize(("num", "seed"), SEEDS)
def test_two_starts_of_one_directory(start_cli, run_cli, tmp_path, num, seed):
    """At any offset the second is refused, `--run.fresh` too, and the first goes on unharmed."""
    rng = random.Random(seed)
    launch = ("launch", "local", "--processes", num) if num > 1 else ()
    words = (*launch, *LONG, "--run.dir", "out")
    # a job of the same name is refused by the launcher already
    other = ["--name", "other"] if num > 1 else []
    first = running(start_cli, *words)
    owner = json.loads((tmp_path / "out/lock").read_text())
    time.sleep(rng.uniform(0, 0.5))
    fresh = ["--run.fresh", "--seed", 3] if rng.random() < 0.5 or seed == 0 else []
    second = run_cli(*words, *fresh, *other)
    assert second.returncode == 2, second.stdout + second.stderr
    said = [x for x in (second.stdout + second.stderr).splitlines() if "is in use by" in x]
    assert len(said) == 1 and f"process {owner['pid']} on {owner['host']}, since" in said[0]
    assert num > 1 or (owner["pid"] == first.pid and second.stderr.splitlines() == said)
    assert "Traceback" not in second.stdout + second.stderr
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    stdout, stderr = first.communicate(timeout=120)
    assert first.returncode == 143, stdout + stderr
    assert [p.name for p in tmp_path.iterdir() if p.name != "runs"] == ["out"]
    assert not (tmp_path / "out/lock").exists()
    assert run_cli("runs", "check", "out").returncode == 0


@pytest.mark.gate
def test_two_starts_in_one_process(tmp_path):
    words = [*DIGITS[2:], "--train.steps", "2000", "--run.dir", str(tmp_path / "out")]
    found: list = []
    thread = threading.Thread(target=lambda: found.append(spmd.load("digits", words).train()))
    thread.start()
    while not (tmp_path / "out/lock").exists():
        time.sleep(0.005)
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        spmd.load("digits", [*words, "--run.fresh"]).train()
    thread.join()
    assert found[0].steps == 2000


@pytest.mark.gate
def test_a_killed_owner_locks_nobody_out(start_cli, run_cli, tmp_path):
    words = (*LONG, "--run.dir", "out")
    first = running(start_cli, *words)
    first.kill()
    first.communicate()
    assert (tmp_path / "out/lock").exists()
    again = run_cli(*words[:-4], "--train.steps", 50, "--run.dir", "out")
    assert again.returncode == 0 or "holds" not in again.stderr, again.stderr


MISTAKES = {
    "weights that are not there": ["--init.from", "nowhere"],
    "a batch that does not divide": ["--simulate", "8", "--data.batch-size", "60"],
    "a schedule longer than the run": ["--optimizer.warmup-steps", "50"],
    "weights of another model": ["--init.from", "other"],
}


@pytest.mark.parametrize("case", slow_but([*MISTAKES][:1], MISTAKES, gate=[*MISTAKES][1:]))
def test_what_cannot_run_claims_nothing(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "other" in MISTAKES[case]:
        assert (
            main([*DIGITS, "--model.hidden", "4", "--train.steps", "6", "--run.dir", "other"]) == 0
        )
    before = tree(tmp_path)
    words = [*DIGITS, "--train.steps", "6", "--run.dir", "out"]
    assert main([*words, *MISTAKES[case]]) == 2
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()
    assert main(words) == 0, capsys.readouterr().err


def test_fresh_moves_nothing_before_a_step_has_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*DIGITS, "--train.steps", "6", "--run.dir", "out"]
    assert main(words) == 0
    before = tree(tmp_path)
    assert main([*words, "--run.fresh", "--init.from", "nowhere"]) == 2
    assert tree(tmp_path) == before
    assert main([*words, "--run.fresh", "--seed", "1"]) == 0
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("out.")]) == 1
    assert "moved the old run to" in capsys.readouterr().out


@pytest.mark.gate
def test_a_diverged_run_goes_on_with_what_its_message_proposes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*DIGITS, "--train.steps", "40", "--checkpoint.every", "5", "--run.dir", "out"]
    hot = ["--optimizer.learning-rate", "1e30", "--optimizer.warmup-steps", "39"]
    assert main([*words, *hot]) == 1
    assert "--run.amend" in capsys.readouterr().err
    cool = [*words, "--optimizer.learning-rate", "0.05", "--optimizer.clip-norm", "1"]
    assert main(cool) == 2
    assert "or --run.amend to continue" in capsys.readouterr().err
    assert main([*cool, "--run.amend"]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    (amended,) = config["amended"]
    assert amended["changes"]["optimizer.learning_rate"] == [1e30, 0.05]
    assert main(["eval", *cool]) == 0 and main(cool) == 0  # its identity now
    assert main([*cool, "--run.amend", "--seed", "1"]) == 2  # no other field


@pytest.mark.gate
def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*DIGITS, "--train.steps", "6"]
    assert main([*words, "--run.dir", "a"]) == 0
    assert main([*words, "--seed", "1", "--train.steps", "8", "--run.dir", "b"]) == 0
    (tmp_path / "b/checkpoints/8").rename(tmp_path / "a/checkpoints/8")
    before = tree(tmp_path)
    for command in ([], ["eval"]):
        assert main([*command, *words, "--train.steps", "10", "--run.dir", "a"]) == 2
        assert "seed: 1 -> 0" in capsys.readouterr().err
        assert tree(tmp_path) == before


@pytest.mark.gate
def test_a_stretched_schedule_is_reported_whether_the_run_had_finished_or_not(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = [*DIGITS, "--run.dir", "out"]
    assert main([*words, "--train.steps", "6"]) == 0
    assert main([*words, "--train.steps", "10"]) == 0
    assert re.search(
        r"now spans 10 steps \(was 6\): at step 6 the rate is 0\.\d+ \(was 0\)",
        capsys.readouterr().out,
    )
    (tmp_path / "out/summary.json").unlink()
    assert main([*words, "--train.steps", "12"]) == 0
    assert "now spans 12 steps (was 10)" in capsys.readouterr().out


@pytest.mark.gate
@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_saves(start_cli, ignored, tmp_path):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN) if ignored else None
    steps = 400 if ignored else 20_000
    try:
        process = running(start_cli, *DIGITS, "--train.steps", steps, "--run.dir", "out")
    finally:
        if ignored:
            signal.signal(signal.SIGHUP, old)
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (0 if ignored else 129), stderr
    assert ignored or "stopped by SIGHUP" in stderr


# The child touches nothing of JAX, which warns of any fork.
@pytest.mark.gate
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.parametrize("terminal", [True, False])
def test_who_reads_the_output_goes_away_and_the_run_saves(start_cli, terminal, tmp_path):
    """As a closed ssh session does: with a terminal by SIGHUP and errors, without one by a broken pipe."""
    words = (*LONG, "--run.dir", "out")
    if not terminal:
        process = running(start_cli, *words)
        process.stdout.close()
        _, said = process.communicate(timeout=60)
        assert "stopped by SIGPIPE" in said and "Traceback" not in said
        code = process.returncode
    else:
        pid, master = pty.fork()
        if not pid:
            os.chdir(tmp_path)
            environ = os.environ | {"JAX_PLATFORMS": "cpu"}
            os.execve(
                sys.executable,
                [sys.executable, str(REPOSITORY / "run.py"), *map(str, words)],
                environ,
            )
        shown = b""
        while b"examples/s" not in shown:
            shown += os.read(master, 65536)
        os.close(master)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == (129 if terminal else 141)
    saved = [p.name for p in (tmp_path / "out/checkpoints").iterdir()]
    assert saved and all(name.isdigit() for name in saved), saved
    assert not (tmp_path / "out/lock").exists()


def test_stopped_before_the_first_step_nothing_is_claimed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*DIGITS, "--train.steps", "6", "--run.dir", "out"]
    first = Program.init

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return first(self)

    monkeypatch.setattr(Program, "init", interrupted)
    assert main(words) == 130
    assert "before the first step; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.gate
def test_a_first_step_that_is_not_finite_claims_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "check_finite", lambda *_: (_ for _ in ()).throw(NonFinite("nan")))
    assert main([*DIGITS, "--train.steps", "6", "--run.dir", "out"]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.gate
def test_a_directory_moved_away_under_a_run_does_not_come_back(start_cli, tmp_path):
    process = running(start_cli, *LONG, "--run.dir", "out")
    (tmp_path / "out").rename(tmp_path / "away")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "was moved, deleted or replaced" in said
    assert "Traceback" not in said and [p.name for p in tmp_path.iterdir()] == ["away"]
