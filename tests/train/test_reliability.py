"""Through run.py: a flipped bit, a full disk, a kill amid saving; then the same command again."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess

import pytest

from tests.marks import slow_but

DIGITS = ("--experiment", "digits", "--train.steps", 60, "--checkpoint.every", 20)
OUT = ("--run.dir", "out")


def steps_in(directory):
    return sorted(int(p.name) for p in directory.iterdir())


def whole_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_flipped_bit_is_noticed_on_resuming_and_the_older_step_taken(
    digits_run, run_main, tmp_path
):
    shutil.copytree(digits_run, tmp_path / "out")
    checkpoints = tmp_path / "out/checkpoints"
    assert steps_in(checkpoints) == [40, 60]
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    data = max(checkpoints.glob("60/state/**/d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)

    checked = run_main("runs", "check", "out")
    assert checked.returncode == 1 and "step 60: BAD: file state/" in checked.stdout
    assert "step 40: 15 arrays" in checked.stdout and steps_in(checkpoints) == [40, 60]

    resumed = run_main(*DIGITS[:3], 90, *DIGITS[4:], *OUT)
    assert resumed.returncode == 0, resumed.stderr
    assert "the checkpoint of step 60 is bad: file state/" in resumed.stdout
    assert "resuming at step 40 of 90" in resumed.stdout
    assert steps_in(checkpoints) == [80, 90]
    assert steps_in(tmp_path / "out/quarantine") == [60]
    assert "has another sha256" in (tmp_path / "out/quarantine/60/reason.txt").read_text()
    assert run_main("runs", "check", "out").returncode == 0


def limited(process, size: int) -> None:
    """From now on no file of the process may grow beyond `size` bytes."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.gate
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
@pytest.mark.parametrize(
    ("size", "what"), slow_but([(2**16, "save step")], [(2**16, "save step"), (2**9, "write")])
)
def test_a_write_that_fails_stops_the_run_with_one_line(run_cli, start_cli, tmp_path, size, what):
    """64 KiB: in the middle of a save. 512 bytes: the metrics too."""
    args = ("--experiment", "digits", "--checkpoint.every", 20, "--log.every", 5, *OUT)
    process = start_cli(*args, "--train.steps", 3000)
    for line in process.stdout:
        if line.startswith("step 100/"):
            limited(process, size)
            break
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stdout + stderr
    said = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and f"cannot {what}" in said[0] and "File too large" in said[0], stderr
    assert "Make room and type the same command" in said[0]
    assert "Traceback" not in stderr
    saved = steps_in(tmp_path / "out/checkpoints")  # nothing half-written among them
    assert saved and f"the checkpoint of step {saved[-1]} is kept" in said[0]
    assert not (tmp_path / "out/summary.json").exists()
    assert run_cli("runs", "check", "out").returncode == 0
    resumed = run_cli(*args, "--train.steps", saved[-1] + 40)
    assert f"resuming at step {saved[-1]} of" in resumed.stdout, resumed.stderr
    assert resumed.returncode == 0, resumed.stderr
    logged = [line["step"] for line in whole_lines(tmp_path / "out/metrics.jsonl")]
    assert logged == sorted(logged) and logged[-1] == saved[-1] + 40


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.2 MB: two checkpoints of digits and a part of a third."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "none", place], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a small file system here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
def test_a_full_disk_leaves_the_run_and_the_last_step(run_cli, small_disk):
    args = (*DIGITS, "--run.dir", small_disk / "out", "--log.every", 5)
    full = run_cli(*args)
    assert full.returncode == 1, full.stdout + full.stderr
    assert full.stderr.startswith("error: cannot ") and full.stderr.count("\n") == 1, full.stderr
    assert "No space left on device; the checkpoint of step" in full.stderr
    saved = steps_in(small_disk / "out/checkpoints")
    assert saved and run_cli("runs", "check", small_disk / "out").returncode == 0
    assert shutil.disk_usage(small_disk).free > 100_000  # the partial step does not fill it
    json.loads((small_disk / "out/config.json").read_text())

    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    resumed = run_cli(*args)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming at step {saved[-1]} of 60" in resumed.stdout


@pytest.mark.gate
def test_killed_at_any_moment_of_saving_the_previous_step_stands(run_cli, start_cli, tmp_path):
    args = ("--experiment", "digits", "--checkpoint.every", 2, "--log.every", 2, *OUT)
    process = start_cli(*args, "--train.steps", 3000)
    for line in process.stdout:
        if line.startswith("step 40/"):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.communicate()
    checked = run_cli("runs", "check", "out")
    assert checked.returncode == 0, checked.stdout
    saved = [int(p.name) for p in (tmp_path / "out/checkpoints").iterdir() if p.name.isdigit()]
    resumed = run_cli(*args, "--train.steps", max(saved) + 10)
    assert f"resuming at step {max(saved)} of" in resumed.stdout, resumed.stderr
    assert resumed.returncode == 0
    left = [p.name for p in (tmp_path / "out/checkpoints").iterdir()]
    assert all(name.isdigit() for name in left)


def start_both(start_cli, *args):
    """Two processes of one run, two simulated devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ("--runtime.coordinator", f"127.0.0.1:{port}", "--runtime.num-processes", 2)
    cut = ("--simulate", 2, "--mesh.data", 1, "--mesh.fsdp", 4, *OUT)
    return [start_cli(*args, *where, "--runtime.process-id", i, *cut) for i in range(2)]


@pytest.mark.gate
@pytest.mark.multiprocess
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
def test_two_processes_agree_on_a_bad_step_and_on_a_failed_save(start_cli, tmp_path):
    both = start_both(start_cli, *DIGITS)
    errors = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    newest = tmp_path / "out/checkpoints/60"
    (newest / "manifest.json").unlink()  # so that what one process reads of the arrays decides
    data = max(newest.rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)

    both = start_both(start_cli, *DIGITS[:3], 20_000, *DIGITS[4:], "--log.every", 20)
    shown = []
    for line in both[0].stdout:
        shown.append(line)
        if line.startswith("step 80/"):
            limited(both[1], 2**15)  # only the disk of the second one is full
            break
    errors = [process.communicate(timeout=200)[1] for process in both]
    assert sum("the checkpoint of step 60 is bad" in line for line in shown) == 1
    assert any("resuming at step 40 of" in line for line in shown)
    assert [process.returncode for process in both] == [1, 1], errors
    assert "cannot save step" in errors[0] and "File too large" in errors[0]
    assert "Traceback" not in errors[0] + errors[1]
    assert all(p.name.isdigit() for p in (tmp_path / "out/checkpoints").iterdir())
