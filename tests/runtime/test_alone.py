"""One process: signals, the grace period and the watchdog, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from spmd.parallel import mesh
from spmd.runtime import agree, stop
from spmd.runtime.stop import Votes
from tests.command import REPOSITORY

CATCH = (
    "import time; from spmd.runtime.stop import catch_signals\n"
    "with catch_signals({grace}) as stop:\n"
    "    stop.phase, stop.outcome = 'evaluation', 'the checkpoint of step 7 is kept'\n"
    "    print('ready', flush=True)\n"
    "    while {condition}: time.sleep(0.05)\n"
    "print('left in order', stop.signum, flush=True)\n"
)


def start(code):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=env, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_first_ctrl_c_asks_and_the_second_leaves():
    process = start(CATCH.format(grace=30, condition="True"))
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "stopping: saving the state" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "exited at once; the checkpoint of step 7 is kept" in stderr


def test_a_second_sigterm_changes_nothing():
    process = start(CATCH.format(grace=30, condition="not stop.signum"))
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=20)
    assert (process.returncode, stdout) == (0, "left in order 15\n")


def test_the_grace_period_ends():
    process = start(CATCH.format(grace=0.5, condition="True"))
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "the grace period of 0.5 s is over, at: evaluation" in stderr
    assert "the checkpoint of step 7 is kept" in stderr


def test_the_watchdog_ends_a_process_that_hangs_but_not_one_that_compiles():
    code = (
        "import time; from spmd.runtime.watchdog import Watchdog\n"
        "with Watchdog(0.4) as dog:\n"
        "    print('ready', flush=True)\n"
        "    for step in range(8): dog.beat('step', step); time.sleep(0.1)\n"
        "    with dog.pause(): time.sleep(1.5)\n"
        "    print('compiled', flush=True)\n"
        "    dog.beat('input', 8); time.sleep(60)\n"
    )
    process = start(code)
    stdout, stderr = process.communicate(timeout=40)
    assert process.returncode == 75 and stdout == "compiled\n"
    assert "no progress for 0.4 s, at: input, step 8" in stderr  # and where its threads stand:
    assert 'File "<string>", line 7' in stderr


def test_alone_every_agreement_is_with_oneself():
    assert agree.process() == (0, 1) and agree.is_first()
    assert agree.gather({"a": (1, 2)}, "test") == [{"a": [1, 2]}]
    assert agree.from_first(lambda: 3, "test") == 3
    with pytest.raises(ValueError, match="mine"):
        agree.from_first(lambda: (_ for _ in ()).throw(ValueError("mine")), "test")


def test_votes_are_the_highest_signal(devices):
    votes = Votes(mesh.make(mesh.MeshConfig(data=2, fsdp=4), devices))
    for signum, agreed in ((0, 0), (15, 15), (2, 15), (0, 15)):
        vote = votes.cast(signum)["stop"]
        assert isinstance(vote, jax.Array) and vote.dtype == np.int32
        assert int(vote[0]) == signum
        votes.ask(signum)
        assert votes.agreed == agreed


def test_short_dispatches_do_not_all_carry_a_vote(devices, monkeypatch):
    monkeypatch.setattr(stop, "_SECONDS_APART", 1e9)
    votes = Votes(mesh.make(mesh.MeshConfig(), devices))
    for signum in (0, 15):
        vote = votes.cast(signum)["stop"]
        assert votes.cast(2)["stop"] is not None  # until it is read, each carries one
        votes.read(np.asarray(vote))
        assert votes.agreed == signum
        assert [len(votes.cast(2)) for _ in range(17)] == [0] * 16 + [1]
    monkeypatch.setattr(stop, "_SECONDS_APART", 0)
    votes.read(np.asarray(votes._highest(votes._vote(0, 0))))
    assert all(votes.cast(0) for _ in range(3))
