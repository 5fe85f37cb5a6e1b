"""Local processes: real ones, with a small script in place of training, then run.py itself."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spmd.launch import local
from spmd.launch.base import Job, exit_code, starts_again

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = """
import json, sys
from spmd.launch.local import supervise
sys.exit(supervise([sys.executable, "-u", "-c", sys.argv[2]], **json.loads(sys.argv[1])))
"""
INDEX = "import os, sys, time, signal; index = int(os.environ.get('SPMD_PROCESS_ID', 0))\n"


def start(script: str, options: str = '{"processes": 2}') -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, options, INDEX + script],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 60) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def until(process: subprocess.Popen[str], text: str, times: int = 1) -> str:
    """Reads lines until `text` was seen `times` times."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        times -= text in line
        if not times:
            return seen
    raise AssertionError(f"{text!r} never came; got:\n{seen}")


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_every_line_is_whole_and_says_whose_it_is():
    code, output = finish(start("for i in range(300): print(index, 'x' * 200, i)\nprint('end')"))
    lines = output.splitlines()
    assert code == 0
    assert all(re.fullmatch(r"\[([01])\] (\1 x{200} \d+|end)", line) for line in lines)
    assert len(lines) == 602


def test_a_process_that_fails_ends_the_rest_within_seconds():
    began = time.monotonic()
    code, output = finish(
        start(
            "print(os.getpid(), flush=True)\nif index == 1: sys.exit(3)\ntime.sleep(60)",
            '{"processes": 3, "restarts": 5}',
        )
    )
    assert code == 3, output
    assert time.monotonic() - began < 10
    assert "launch: process 1 ended with exit code 3; ending the others" in output
    assert output.count("launch:") == 1, "a failure is not worth a restart"
    assert not any(alive(int(pid)) for pid in re.findall(r"\] (\d+)$", output, re.M))


def test_one_that_ignores_sigterm_is_killed_after_the_grace_with_its_children():
    script = """
if index == 1: time.sleep(1); sys.exit(1)
signal.signal(signal.SIGTERM, lambda *_: print('not yet', flush=True))
import subprocess
child = subprocess.Popen(['sleep', '60'])
print('child', child.pid, flush=True)
while True: time.sleep(60)
"""
    began = time.monotonic()
    code, output = finish(start(script, '{"processes": 2, "grace": 1}'))
    assert (code, "[0] not yet" in output) == (1, True), output
    assert time.monotonic() - began < 15
    assert not alive(int(re.findall(r"child (\d+)", output)[0]))


@pytest.mark.parametrize(
    "ending, code, starts",
    [
        ("sys.exit(0)", 0, 1),
        ("sys.exit(1)", 1, 1),
        ("sys.exit(2)", 2, 1),
        ("sys.exit(130)", 130, 1),
        ("sys.exit(143)", 143, 3),
        ("sys.exit(75)", 75, 3),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, 3),
    ],
)
def test_what_starts_again_and_how_often(ending, code, starts):
    script = f"print('port', os.environ['SPMD_COORDINATOR'], flush=True); {ending}"
    got, output = finish(start(script, '{"processes": 2, "restarts": 2}'))
    assert got == code, output
    assert output.count("launch: exit code") == starts - 1
    ports = set(re.findall(r"\] port 127\.0\.0\.1:(\d+)", output))
    assert len(ports) == starts, "a new port for each start"


def test_a_restart_ends_when_the_run_finishes(tmp_path):
    script = f"p = {str(tmp_path / 'tries')!r}\nif index == 0: open(p, 'a').write('x')\n"
    script += "time.sleep(0.3)\nsys.exit(0 if len(open(p).read()) == 2 else 75)"
    code, output = finish(start(script, '{"processes": 2, "restarts": 9}'))
    assert (code, (tmp_path / "tries").read_text()) == (0, "xx"), output


def test_the_first_cause_is_named_not_its_consequence():
    """A process that lost its peer and the one that failed are found dead at the same look."""
    script = "sys.exit({0: 75, 1: 1, 2: 143}[index])"
    code, output = finish(start(script, '{"processes": 3, "restarts": 1, "grace": 5}'))
    assert code in (1, 75, 143), output  # which of the three is seen first is the system's
    group = local.ProcessGroup([], local.Output(None), [])
    group._processes = [Dead(75), Dead(1), Dead(-9)]  # type: ignore[list-item]
    assert group._wait(0) == 1


class Dead:
    def __init__(self, returncode: int):
        self.returncode = returncode

    def poll(self) -> int:
        return self.returncode


HEARS = """
heard = []
signal.signal(signal.SIGINT, lambda s, f: heard.append(s))
signal.signal(signal.SIGTERM, lambda s, f: heard.append(s))
print('ready', flush=True)
while len(heard) < 1: time.sleep(0.05)
time.sleep(1)
print('heard', *map(int, heard), flush=True)
sys.exit(128 + heard[0])
"""


@pytest.mark.parametrize(
    "sent, heard", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")]
)
def test_a_signal_is_passed_on_once_and_ends_the_run(sent, heard):
    process = start(HEARS, '{"processes": 2, "restarts": 5}')
    until(process, "ready", 2)
    process.send_signal(signal.Signals[sent])
    code, output = finish(process)
    number = int(signal.Signals[heard])
    assert code == 128 + number, output
    assert sorted(output.splitlines()) == [f"[0] heard {number}", f"[1] heard {number}"]


def test_a_second_ctrl_c_is_passed_on_too():
    script = HEARS.replace("len(heard) < 1", "len(heard) < 2").replace("time.sleep(1)", "")
    process = start(script)
    until(process, "ready", 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert (code, output.count("heard 2 2")) == (130, 2), output


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a process to its parent")
def test_no_process_outlives_a_killed_launcher():
    process = start("print('pid', os.getpid(), flush=True); time.sleep(60)")
    seen = until(process, "pid", 2)
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", seen)]
    assert all(map(alive, pids))
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_a_closed_pipe_does_not_end_the_run(tmp_path):
    script = f"time.sleep(0.5)\nfor i in range(2000): print('x' * 99)\nopen({str(tmp_path)!r} + '/done', 'w')"
    process = start(script, '{"processes": 1}')
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 0
    assert (tmp_path / "done").exists()


def test_the_peers_are_on_the_loopback_interface_only():
    envs = local.environments(3, 1234)
    assert [env["SPMD_PROCESS_ID"] for env in envs] == ["0", "1", "2"]
    assert {env["SPMD_COORDINATOR"] for env in envs} == {"127.0.0.1:1234"}
    assert {env["SPMD_COORDINATOR_BIND"] for env in envs} == {"127.0.0.1:1234"}
    assert local.environments(1, 1234) == [{}]
    port = local.free_port()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def test_a_launcher_inside_another_starts_from_clean(monkeypatch):
    env = os.environ | {"SPMD_PROCESS_ID": "7", "SPMD_COORDINATOR": "there:1", "OTHER": "kept"}
    monkeypatch.setattr(os, "environ", env)
    (inner,) = local.ProcessGroup([], local.Output(None), local.environments(1, 0))._envs
    assert inner["OTHER"] == "kept" and "SPMD_PROCESS_ID" not in inner
    assert "SPMD_COORDINATOR" not in inner


def job(*fields: str) -> Job:
    return Job(name="digits", experiment="digits", fields=fields)


def test_gpus_are_split_over_the_processes(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,5")
    options = local.LocalLaunch(processes=2, devices_per_process=2)
    envs = local.environments(2, 1, options._gpus(job()))
    assert [env["CUDA_VISIBLE_DEVICES"] for env in envs] == ["0,1", "4,5"]
    assert local.LocalLaunch()._gpus(job()) == []  # one process takes what it sees
    assert local.LocalLaunch(processes=2)._gpus(job("--simulate", "4")) == []
    with pytest.raises(ValueError, match="need 6 GPUs; there are 4"):
        local.LocalLaunch(processes=3, devices_per_process=2)._gpus(job())
    with pytest.raises(ValueError, match="--devices-per-process 2"):
        local.LocalLaunch(processes=2)._gpus(job())
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert options._gpus(job()) == []


def test_exit_codes_are_those_of_a_shell():
    assert [exit_code(c) for c in (0, 3, -9, -15)] == [0, 3, 137, 143]
    assert [c for c in range(256) if starts_again(c) and c < 129] == [75]
    assert not starts_again(130) and starts_again(143) and starts_again(137)


# ---- run.py launch local


DIGITS = ("--experiment", "digits")


@pytest.fixture
def silent_proxy(monkeypatch):
    """A proxy that takes connections and never answers, in the environment of what is started."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("http_proxy", "HTTPS_PROXY", "grpc_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield


@pytest.mark.gate
def test_trains_in_processes_beside_a_proxy_and_keeps_the_log(run_cli, silent_proxy, tmp_path):
    processes = ("--processes", 2, "--devices-per-process", 1, "--runtime.join-timeout", 60)
    done = run_cli("launch", "local", *DIGITS, *processes, "--train.steps", 5)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[0] digits: 2 x cpu (cpu) in 2 processes" in done.stdout
    # nothing of JAX's about proxies, of Gloo's or of C++
    assert not re.search(r"(?i)proxy|gloo|^\[1\]|[EWF]\d{4} ", done.stdout, re.M), done.stdout
    assert (tmp_path / "runs/digits/summary.json").exists()
    logs = run_cli("launch", "local", "logs", *DIGITS)
    assert (logs.returncode, logs.stdout) == (0, done.stdout)


@pytest.mark.gate
def test_stop_saves_and_one_name_runs_once(run_cli, start_cli):
    quiet = ("--log.every", 1000)  # nobody reads while others start, and a pipe holds 64 KiB
    running = start_cli("launch", "local", *DIGITS, *quiet, "--train.steps", 10**6, "--restarts", 3)
    try:
        until(running, "step ")
        second = run_cli("launch", "local", *DIGITS, "--run.dir", "other")
        assert second.returncode == 2 and "is running already (process" in second.stderr
        assert str(running.pid) in run_cli("launch", "local", "stop", *DIGITS, "--dry-run").stdout
        stop = run_cli("launch", "local", "stop", *DIGITS)
        assert stop.returncode == 0, stop.stderr
        output, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 143
    assert "stopped by SIGTERM" in output and "state saved" in output
    again = run_cli("launch", "local", "stop", *DIGITS)
    assert again.returncode == 2 and "no job 'digits' is running here" in again.stderr


@pytest.mark.gate
def test_a_mistake_in_the_run_is_the_exit_code_of_the_launcher(run_cli):
    args = ("--simulate", 8, "--mesh.data", 3, "--restarts", 5)
    done = run_cli("launch", "local", *DIGITS, *args)
    assert done.returncode == 2, done.stdout
    assert "[0] error:" in done.stdout and "multiply to 3" in done.stdout
    assert "launch: exit code" not in done.stdout
