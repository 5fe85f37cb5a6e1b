"""Each script of benchmarks/ runs without further arguments and prints its table; no time is asserted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.marks import slow_but

REPOSITORY = Path(__file__).resolve().parent.parent
TITLES = {
    "digest": ["s for 1 GB"],
    "input_images": ["images/s", "spmd / faster peer"],
    "input_pipeline": ["steps per item"],
    "input_tables": ["arrow", "parquet"],
    "road_baselines": ["mIoU by colour", "RMSE of a constant", "RMSE of ridge regression"],
    "translate_peers": ["rows/s", "padding"],
    "translate_scores": ["copy the source: BLEU", "ours, mean of 1: BLEU"],
    "unet_peers": ["intensity alone: Dice grey", "PyTorch"],
    "top_k": ["same rows: yes"],
    "sparse_tables": ["caches overwritten", "rows / jnp.take and optax"],
    "dlrm_peers": ["spmd, one device"],
    "votes": ["of 50 ms steps"],
    "pipeline": ["compile", "1f1b / gpipe, median of pairs"],
    "cnn_peers": ["spmd, one device", "images/s"],
    "gpu_gpt2": ["spmd", "TFLOP/s", "MFU"],
    "lm_peers": ["spmd, 1 per dispatch", "spmd, 10.6M parameters", ">= 0.98"],
    "mnist_peers": [
        "spmd, one device, 1 per dispatch",
        "2 simulated devices, allreduce, 32 per dispatch",
        "within rounds",
    ],
}


def bench(name, *args):
    """A script in its own process, cut short; its standard output."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), "--quick", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


SCRIPTS = sorted(p.stem for p in (REPOSITORY / "benchmarks").glob("[!_]*.py"))


@pytest.mark.gate
@pytest.mark.parametrize("name", slow_but(("digest", "input_tables", "mnist_peers"), SCRIPTS))
def test_prints_its_table(name, tmp_path):
    out = tmp_path / "numbers.json"
    shown = bench(name, *(["--json", str(out)] if name == "mnist_peers" else []))
    for title in TITLES[name]:
        assert title in shown
    if name == "mnist_peers":
        numbers = json.loads(out.read_text())
        speeds = numbers["images/s"]
        torch = importlib.util.find_spec("torch") is not None
        assert ("ddp" in speeds) == torch
        assert ("pip install -r requirements/peers.txt" in shown) != torch
        assert all(len(each) == 1 and each[0] > 0 for each in speeds.values())
        first = numbers["ratios"][0]
        assert first["median"] == pytest.approx(speeds["ours"][0] / speeds["plain"][0])


def test_gpt2_says_that_it_needs_a_gpu():
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu_gpt2.py")]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout
