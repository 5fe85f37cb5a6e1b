"""TPU VMs: commands parsed by the real gcloud; the course of a run on a stand-in that runs the scripts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spmd.launch.base import Job
from spmd.launch.tpu_vm import RUNTIMES, Machines, TpuVm
from tests.command import until
from tests.marks import slow_but

FAKE = Path(__file__).parent / "fake_gcloud.py"
RUN = ("--experiment", "digits", "--run.dir", "gs://bucket/digits")
VM = ("launch", "tpu-vm")
WHERE = ("--zone", "us-east5-a", "--accelerator", "v5litepod-16", "--poll", "0.2")

# In place of uv: an environment whose Python is a script of the test.
UV = """#!/bin/bash
if [ "$1" = venv ]; then mkdir -p .venv/bin; cp "$FAKE_GCLOUD/python" .venv/bin/python; fi
[ "$1" != pip ] || [ -e requirements/tpu.txt ]
"""


@pytest.fixture
def cloud(tmp_path):
    """`cloud(body, *states)`: two workers whose Python runs `body`; returns the environment."""
    root = tmp_path / "cloud"
    for path in ("bin", "worker-0", "worker-1"):
        (root / path).mkdir(parents=True)
    (root / "bin/gcloud").write_text(f'#!/bin/bash\nexec {sys.executable} -I {FAKE} "$@"\n')
    (root / "bin/uv").write_text(UV)

    def cloud(body: str, *states: str) -> dict[str, str]:
        (root / "python").write_text(f"#!/bin/bash\n{body}\n")
        (root / "states").write_text("\n".join(states) + "\n")
        for path in ("bin/gcloud", "bin/uv", "python"):
            (root / path).chmod(0o755)
        return {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "FAKE_GCLOUD": str(root)}

    return cloud


@pytest.fixture
def calls(tmp_path):
    """What gcloud was called for, a word each: list, create, scp, ..."""

    def calls() -> list[str]:
        lines = (tmp_path / "cloud/calls.jsonl").read_text().splitlines()
        return [json.loads(line)[3] for line in lines]

    return calls


def test_creates_waits_copies_starts_and_follows(cloud, calls, run_cli, tmp_path):
    env = cloud(
        'echo "$WORKER: $*"; sleep 1', "", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"
    )
    done = run_cli(*VM, *RUN, *WHERE, "--model.hidden", 8, 8, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    words = "run.py train --experiment digits --run.dir gs://bucket/digits --model.hidden 8 8"
    assert f"worker-0: {words}\n" in done.stdout
    assert f"worker-1: {words}\n" in (tmp_path / "cloud/worker-1/digits/log").read_text()
    for state in ("not created yet", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        assert done.stdout.count(f"digits is {state}") == 1
    made = [call for call in calls() if call in ("create", "scp", "delete")]
    assert made == ["create", "scp"]
    copied = {p.name for p in (tmp_path / "cloud/worker-1/digits").iterdir()}
    ours = {"run.py", "spmd", "experiments", "requirements", "requirements.txt"}
    assert copied == ours | {".venv", "log", "pid", "exit"}
    assert "is kept, and costs" in done.stdout


@pytest.mark.gate
def test_an_experiment_file_from_elsewhere_is_copied_too(cloud, run_cli, tmp_path):
    (tmp_path / "mine").mkdir()
    digits = Path(__file__).parents[2] / "experiments/digits.py"
    shutil.copy(digits, tmp_path / "mine/wide.py")
    env = cloud('[ -f "$4" ] && echo "runs $*"', "ACTIVE")
    words = ("--experiment", "mine/wide.py", "--run.dir", "gs://bucket/wide")
    done = run_cli(*VM, *words, *WHERE, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs run.py train --experiment wide.py --run.dir gs://bucket/wide" in done.stdout


@pytest.mark.parametrize(
    "code, starts",
    slow_but(
        [],
        [(1, 1), (2, 1), (130, 1), (75, 3), (143, 3), (137, 3)],
        gate=[(75, 3)],
    ),
)
def test_what_starts_again(code, starts, cloud, run_cli):
    """Worker 1 says why; worker 0 only lost its peer."""
    env = cloud(f'echo started; [ "$WORKER" = worker-0 ] && exit 75; exit {code}', "ACTIVE")
    done = run_cli(*VM, *RUN, *WHERE, "--restarts", 2, env=env)
    assert done.stdout.count("started") == starts, done.stdout + done.stderr
    assert done.returncode == (code if starts == 1 else 75)


def test_starts_again_after_a_preemption(cloud, calls, tmp_path):
    root = tmp_path / "cloud"
    body = 'echo started; [ -e "$FAKE_GCLOUD/second" ] && exit 0; touch ready; exec sleep 60'
    env = cloud(body, "ACTIVE")
    running = _start(tmp_path, env, *VM, *RUN, *WHERE, "--spot")
    try:
        until(lambda: (root / "worker-1/digits/ready").exists())
        (root / "second").touch()
        after = ["SUSPENDING", "SUSPENDED", "SUSPENDED", "", "PROVISIONING", "ACTIVE"]
        (root / "states").write_text("\n".join(after) + "\n")
        for worker in ("worker-0", "worker-1"):  # the machines go, and all that is on them
            os.kill(int((root / worker / "digits/pid").read_text()), signal.SIGKILL)
            shutil.rmtree(root / worker / "digits", ignore_errors=True)
        output, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 0, output
    assert "the machines are gone: digits is" in output
    assert "started" in output
    made = [call for call in calls() if call in ("create", "scp", "delete")]
    assert made == ["scp", "delete", "create", "scp"]


def test_a_resource_deleted_by_hand_is_not_created_again(cloud, calls, tmp_path):
    root = tmp_path / "cloud"
    running = _start(tmp_path, cloud("echo started; exec sleep 60", "ACTIVE"), *VM, *RUN, *WHERE)
    try:
        until(lambda: "--follow" in (root / "calls.jsonl").read_text())
        (root / "states").write_text("DELETING\n\n")
        for worker in ("worker-0", "worker-1"):
            os.kill(int((root / worker / "digits/pid").read_text()), signal.SIGKILL)
        output, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 143, output
    assert "digits was deleted; it is not created again" in output
    assert "create" not in calls()


@pytest.mark.gate
def test_a_broken_connection_is_taken_up_again_and_ctrl_c_leaves_the_run(cloud, tmp_path):
    root = tmp_path / "cloud"
    env = cloud('echo started; while [ ! -e "$FAKE_GCLOUD/end" ]; do sleep 0.1; done', "ACTIVE")
    running = _start(tmp_path, env, *VM, *RUN, *WHERE)
    followed = lambda: (root / "calls.jsonl").read_text().count("--follow")
    try:
        until(lambda: (root / "worker-0/digits/pid").exists())
        until(lambda: followed() == 1)
        (root / "unreachable").touch()
        _kill_tail(root)
        time.sleep(1)
        assert running.poll() is None
        (root / "unreachable").unlink()
        time.sleep(1)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        output, _ = running.communicate(timeout=150)
        assert running.returncode == 130, output
        assert "The run continues" in output
        before = followed()
        # Typed again, it follows the same run, and ends with it.
        again = _start(tmp_path, env, *VM, *RUN, *WHERE)
        until(lambda: followed() > before)
        (root / "end").touch()
        output, _ = again.communicate(timeout=150)
    finally:
        (root / "end").touch()
        running.kill()
        running.communicate()
    assert again.returncode == 0, output
    assert "running already" in output and output.count("started") == 1


@pytest.mark.gate
def test_stop_saves_keeps_the_resource_and_deletes_when_told(cloud, calls, run_cli, tmp_path):
    root = tmp_path / "cloud"
    body = "trap 'echo saved; exit 143' TERM; echo started; while true; do sleep 0.1; done"
    env = cloud(body, "ACTIVE")
    running = _start(tmp_path, env, *VM, *RUN, *WHERE)
    try:
        until(lambda: "started" in (root / "worker-1/digits/log").read_text())
        stop = run_cli(*VM, "stop", *RUN, *WHERE[:2], env=env)
        assert stop.returncode == 0 and "is kept, and costs" in stop.stdout, stop.stderr
        output, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 143, output
    assert (root / "worker-1/digits/log").read_text() == "started\nsaved\n"
    assert output.count("started") == 1 and "delete" not in calls()
    logs = run_cli(*VM, "logs", *RUN, *WHERE[:2], env=env)
    assert logs.stdout == "started\nsaved\n"
    gone = run_cli(*VM, "stop", *RUN, *WHERE[:2], "--delete", env=env)
    assert gone.returncode == 0 and calls()[-1] == "delete"


def test_a_request_that_fails_ends_the_launch(cloud, calls, run_cli):
    done = run_cli(*VM, *RUN, *WHERE, env=cloud("", "", "FAILED"))
    assert done.returncode == 1
    assert "the request failed; see: gcloud compute tpus queued-resources describe" in done.stdout
    assert "delete" not in calls()


# ---- the real gcloud reads the commands


def every_command(extra: tuple[str, ...] = ()):
    options = TpuVm(zone="us-east5-a", project="nobody", accelerator="v6e-64", spot=True)
    vm = Machines(options, Job(name="digits", experiment="digits", extra=extra))
    yield from (vm._state, vm._node, vm.describe, vm.create, vm.delete, vm.copy, vm.setup, vm.begin)
    yield from (vm.stop, vm.log, vm.follow("+1"), vm.ssh("true", worker="0"))


def refused(argv: tuple[str, ...], tmp_path: Path) -> str:
    """What gcloud says without an account or a network: nothing about its arguments, if they are right."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("CLOUDSDK_")}
    env |= {
        "CLOUDSDK_CONFIG": str(tmp_path),  # no account
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": "http://127.0.0.1:9/",
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
    }
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    return done.stderr


@pytest.mark.gate
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="needs gcloud (Google Cloud CLI)")
def test_gcloud_accepts_every_argument(tmp_path):
    for command in every_command(("--network=mine", "--reserved")):
        said = refused(command.argv, tmp_path)
        assert "You do not currently have an active account selected" in said, command.shell()
    wrong = (*next(iter(every_command())).argv, "--no-such-flag")
    assert "unrecognized arguments" in refused(wrong, tmp_path)


def test_scripts_are_plain_bash(shellcheck):
    for command in every_command():
        for word in command.argv:
            if word.startswith("--command="):
                shellcheck(word.partition("=")[2])


def test_images_of_the_accelerators():
    for prefix in RUNTIMES:
        options = TpuVm(zone="z", accelerator=f"{prefix}16")
        argv = Machines(options, Job(name="a", experiment="digits")).create.argv
        assert argv[argv.index("--runtime-version") + 1] == RUNTIMES[prefix]


def _start(tmp_path: Path, env: dict[str, str], *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).parents[2] / "run.py"), *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )


def _kill_tail(root: Path) -> None:
    """Ends the tail that worker 0's log is followed with."""
    pid = (root / "worker-0/digits/pid").read_text().strip()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0] == b"tail" and f"--pid={pid}".encode() in words:
                os.kill(int(entry.name), signal.SIGKILL)
