"""A whole run on gs://, against an emulated Cloud Storage that both Orbax's driver and gcsfs talk to."""

from __future__ import annotations

import json
import re
import signal
import sys

import pytest

from spmd.cli import main
from spmd.core import storage
from tests.bucket import NEEDS, reached, serving

emulated = pytest.mark.skipif(bool(NEEDS), reason=f"needs: pip install {' '.join(NEEDS)}")


@pytest.fixture(scope="module")
def served():
    with serving() as bucket:
        yield bucket


@pytest.fixture
def bucket(served, monkeypatch):
    reached(served, monkeypatch)
    return served


@pytest.mark.gate
@emulated
def test_train_stop_resume_evaluate(bucket, run_cli, start_cli, tmp_path):
    free = ("--train.steps", 400, "--log.every", 20, "--checkpoint.every", 100, "--log.examples")
    run = ("--experiment", "digits", *free)
    process = start_cli(*run, "--run.dir", "gs://bucket/runs/a", "--log.profile", "3:4")
    for line in process.stdout:
        if line.startswith("step 60"):
            process.send_signal(signal.SIGTERM)
            break
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    stopped = int(re.search(r"at step (\d+), state saved", stderr)[1])
    assert f"runs/a/checkpoints/{stopped}/commit_success.txt" in bucket.names()
    assert "runs/a/profile/plugins/profile/steps-3-4/process-0.xplane.pb" in bucket.names()
    assert max(x["step"] for x in bucket.lines("runs/a/metrics")) <= stopped

    # lost work of a start that was killed: past the checkpoint, its last line torn
    lost = {"step": stopped + 1, "train/loss": -1.0}
    bucket.put("runs/a/metrics/99999999.jsonl", json.dumps(lost).encode() + b'\n{"st')
    bucket.put("runs/a/examples-7/00000000.jsonl", json.dumps(lost).encode() + b"\n")

    resumed = run_cli(*run, "--run.dir", "gs://bucket/runs/a")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming at step {stopped} of 400" in resumed.stdout
    names = bucket.names()
    assert f"runs/a/metrics/{stopped:08}.jsonl" in names
    assert not [n for n in names if "99999999" in n or "examples-7" in n or n.endswith(".part")]
    assert len([n for n in names if n.startswith("runs/a/tensorboard/events")]) == 2

    steps = [x["step"] for x in bucket.lines("runs/a/metrics") if "train/loss" in x]
    assert steps == sorted(set(steps)) and steps[-1] == 400
    steps = [x["step"] for x in bucket.lines("runs/a/examples-0")]
    assert steps == list(range(1, 401))
    assert run_cli(*run, "--run.dir", "local").returncode == 0
    summary = json.loads(bucket.get("runs/a/summary.json"))
    undisturbed = json.loads((tmp_path / "local/summary.json").read_text())
    assert summary["metrics"] == undisturbed["metrics"]  # bit by bit

    measured = run_cli("eval", "--experiment", "digits", "--run.dir", "gs://bucket/runs/a")
    assert json.loads(measured.stdout)["eval/loss"] == pytest.approx(
        summary["metrics"]["eval/loss"]
    )


@emulated
@pytest.mark.slow
def test_what_is_refused_leaves_the_bucket_as_it_was(bucket, run_cli):
    run = ("--experiment", "digits", "--train.steps", 5, "--run.dir", "gs://bucket/runs/b")
    assert run_cli(*run, "--run.fresh").returncode == 0  # nothing to move
    before = {name: bucket.get(name) for name in bucket.names()}
    for words, message in (
        (("--run.fresh",), "cannot move it aside; choose another --run.dir"),
        (("--seed", 1), "seed: 0 -> 1"),
        (("--run.dir", "gs://bucket/runs"), "holds no run"),
        (("--run.dir", "gs://absent/run"), "there is no such bucket"),
    ):
        done = run_cli(*run, *words)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert {name: bucket.get(name) for name in bucket.names()} == before


@pytest.mark.slow  # gcsfs tries six times before it gives up
@emulated
def test_a_store_out_of_reach_is_one_message(run_cli):
    away = {"STORAGE_EMULATOR_HOST": "http://localhost:9", "GCSFS_RETRIES": "1"}
    done = run_cli("--experiment", "digits", "--run.dir", "gs://bucket/run", env=away)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot reach run directory gs://bucket/run:" in done.stderr


def test_the_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # find_spec fails, as without it
    with pytest.raises(ValueError, match="pip install gcsfs"):
        storage.check_usable("gs://bucket/run", "run.dir")
    assert main(["eval", "--experiment", "digits", "--run.dir", "gs://bucket/run"]) == 2
    assert "pip install gcsfs" in capsys.readouterr().err
