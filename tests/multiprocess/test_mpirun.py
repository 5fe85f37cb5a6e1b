"""`mpirun ... python run.py ...`: ranks find each other, stop together, resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command import REPOSITORY, ROOT

pytestmark = pytest.mark.multiprocess

STEPS = 400


@pytest.fixture
def mpirun(tmp_path):
    if shutil.which("mpirun") is None:
        pytest.skip("needs Open MPI: mpirun is not installed (apt install openmpi-bin)")
    more = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": f"{os.environ[ROOT]}/compiled"}
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]
    command += ["--mca", "oob_tcp_if_include", "lo"]  # this test stays on the loopback interface
    command += [sys.executable, str(REPOSITORY / "run.py"), "--experiment", "digits"]
    command += ["--simulate", "2", "--train.steps", str(STEPS), "--log.every", "20"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return lambda: subprocess.Popen(command, cwd=tmp_path, env=os.environ | more, **pipes)


def plain(text):
    """mpirun gives its ranks a terminal: without colours and line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))


@pytest.mark.slow
def test_stops_together_and_resumes(mpirun, tmp_path):
    lines = tmp_path / "runs/digits/metrics.jsonl"
    first, end = mpirun(), time.monotonic() + 200
    while not (lines.exists() and '"step": 40' in lines.read_text()):
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    ranks = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGTERM)  # one is enough; mpirun itself would hold it back
    text = plain(first.communicate(timeout=120)[0])
    assert "4 x cpu (cpu) in 2 processes, mesh data=4" in text
    (step,) = re.findall(r"stopped by SIGTERM at step (\d+), state saved", text)
    second = mpirun()
    text = plain(second.communicate(timeout=300)[0])
    assert second.returncode == 0, text
    assert f"resuming at step {step} of {STEPS}" in text
    assert json.loads((tmp_path / "runs/digits/summary.json").read_text())["steps"] == STEPS
