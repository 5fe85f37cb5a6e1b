"""The rendered job on a real Slurm: accepted, run, requeued, ended, stopped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.command import free_port, until
from tests.marks import slow_but

pytestmark = [pytest.mark.multiprocess, pytest.mark.gate]
NAME = ("--experiment", "digits")


@pytest.fixture
def submit(slurm, run_cli, tmp_path):
    """`submit(body, *options)`: the job's number; `body` is what each task runs in place of Python."""

    def submit(body: str, *options: str) -> str:
        task = tmp_path / "task"
        task.write_text(f"#!/bin/bash\n{body}\n")
        task.chmod(0o755)
        done = run_cli("launch", "slurm", *NAME, "--python", task, *options, env=slurm.env)
        assert done.returncode == 0, done.stdout + done.stderr
        (number,) = re.findall(r"submitted digits as job (\d+)", done.stdout)
        return number

    return submit


@pytest.fixture
def log(tmp_path):
    """The output of a job."""
    return lambda number: (tmp_path / f"runs/.launch/digits/slurm-{number}.log").read_text()


def test_runs_on_two_nodes(slurm, submit, log, run_cli, tmp_path):
    number = submit('echo "task $SLURM_PROCID on $SLURMD_NODENAME: $*"; pwd', "--nodes", "2")
    job = slurm.until(number, "COMPLETED", "FAILED")
    text = log(number)
    assert (job["JobState"], job["NumNodes"], job["JobName"]) == ("COMPLETED", "2", "digits"), text
    for task in (0, 1):
        found = re.findall(rf"task {task} on n{task + 1}: (.*)", text)
        assert len(found) == 1 and found[0].endswith("run.py train --experiment digits"), text
    assert text.count(f"{tmp_path}\n") == 2
    assert "ended with exit code 0" in text
    shown = run_cli("launch", "slurm", "logs", *NAME, env=slurm.env)
    assert (shown.returncode, shown.stdout) == (0, text)


def test_every_option_is_accepted(slurm, submit):
    options = (
        "--nodes",
        "2",
        "--processes-per-node",
        "2",
        "--gpus-per-node",
        "4",
        "--time",
        "1:00:00",
    )
    more = (
        "--cpus-per-process",
        "1",
        "--partition",
        "debug",
        "--account",
        "mine",
        "--name",
        "digits",
    )
    number = submit(
        "true", *options, *more, "--grace", "300", "--", "--comment=passed-on", "--nice=5"
    )
    job = slurm.until(number, "COMPLETED", "FAILED")
    assert job["JobState"] == "COMPLETED"
    wanted = {"NumNodes": "2", "NumTasks": "4", "TimeLimit": "01:00:00", "Partition": "debug"}
    wanted |= {"CPUs/Task": "1", "Account": "mine", "Comment": "passed-on", "Nice": "5"}
    assert wanted.items() <= job.items()
    assert job["Requeue"] == "1" and job["TresPerNode"] == "gres:gpu:4"


def test_saved_after_sigterm_and_requeued(slurm, submit, log):
    body = """echo "start ${SLURM_RESTART_COUNT:-0}"
    if [ -n "${SLURM_RESTART_COUNT:-}" ]; then exit 0; fi
    trap 'sleep 1; exit 143' TERM; echo ready; while true; do sleep 0.1; done"""
    number = submit(body, "--nodes", "2")
    slurm.until(number, "RUNNING")
    until(lambda: log(number).count("ready") == 2, timeout=30)
    slurm.run("scancel", "--signal=TERM", number)  # what --signal does near the time limit
    job = slurm.until(number, "COMPLETED", "FAILED", "CANCELLED")
    text = log(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), text
    assert "exit code 143; requeued, restart 1 of at most 20" in text
    assert len(re.findall("^start 0$", text, re.M)) == len(re.findall("^start 1$", text, re.M)) == 2


ALONE = "if [ $SLURM_PROCID = 0 ]; then sleep 60; fi\n"  # the other task would go on


@pytest.mark.parametrize(
    "ending, code", slow_but([("exit 1", 1)], [("exit 1", 1), ("exit 2", 2), ("exit 130", 130)])
)
def test_a_final_exit_code_of_one_task_ends_the_job(slurm, submit, log, ending, code):
    """srun itself reports 143 here, for the task that it ended."""
    number = submit(ALONE + ending, "--nodes", "2")
    job = slurm.until(number, "COMPLETED", "FAILED", "CANCELLED", timeout=40)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), log(number)
    assert job["ExitCode"] == f"{code}:0"
    assert f"ended with exit code {code}" in log(number)


@pytest.mark.slow
@pytest.mark.parametrize("ending, code", [("exit 75", 75), ("kill -KILL $$", 137)])
def test_a_lost_task_starts_the_job_again_so_often(slurm, submit, log, ending, code):
    number = submit(f"echo started\n{ALONE}{ending}", "--nodes", "2", "--restarts", "1")
    job = slurm.until(number, "COMPLETED", "FAILED", "CANCELLED", timeout=90)
    text = log(number)
    assert (job["JobState"], job["Restarts"], text.count("started")) == ("FAILED", "1", 4), text
    assert text.count("requeued, restart 1 of at most 1") == 1


def test_stop_ends_the_job_for_good(slurm, submit, log, run_cli):
    number = submit("trap 'echo saved; exit 143' TERM; echo ready; while true; do sleep 0.1; done")
    slurm.until(number, "RUNNING")
    until(lambda: "ready" in log(number), timeout=30)
    stopped = run_cli("launch", "slurm", "stop", *NAME, env=slurm.env)
    assert stopped.returncode == 0, stopped.stderr
    job = slurm.until(number, "COMPLETED", "FAILED", "CANCELLED")
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    until(lambda: "saved" in log(number), timeout=30)
    assert "requeued" not in log(number)


def test_trains_on_two_nodes_and_goes_on_after_a_preemption(slurm, run_cli, tmp_path, log):
    """Found by what srun says alone, but for the address: the nodes' names mean nothing on one machine."""
    steps = 400
    options = ("--nodes", "2", "--simulate", "2", "--train.steps", steps, "--log.every", 20)
    env = slurm.env | {"JAX_PLATFORMS": "cpu", "SPMD_COORDINATOR": f"127.0.0.1:{free_port()}"}
    done = run_cli("launch", "slurm", *NAME, *options, "--", "--comment=real", env=env)
    (number,) = re.findall(r"as job (\d+)", done.stdout)
    until(lambda: "step 40/" in log(number), timeout=200)
    slurm.run("scancel", "--signal=TERM", number)  # what --signal does near the time limit
    job = slurm.until(number, "COMPLETED", "FAILED", "CANCELLED", timeout=400)
    text = log(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), text
    assert "4 x cpu (cpu) in 2 processes, mesh data=4" in text
    (stopped,) = re.findall(r"stopped by SIGTERM at step (\d+), state saved", text)
    assert f"resuming at step {stopped} of {steps}" in text
    summary = json.loads(Path(tmp_path / "runs/digits/summary.json").read_text())
    assert summary["steps"] == steps
