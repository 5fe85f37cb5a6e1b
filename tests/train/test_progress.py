"""Speed as the part of a chip's peak, and memory: shown where they are known."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest
from etils import epath

import spmd
from spmd.hardware import chips
from spmd.train import metrics
from spmd.train.progress import advise_input, utilisation


def device(kind, stats=None, process=0):
    """What `usage` asks of a device of a kind that is not in this machine."""
    return SimpleNamespace(device_kind=kind, process_index=process, memory_stats=lambda: stats)


def test_a_chip_of_the_table():
    work = {"bfloat16": 197 * 10**12}  # what two v5e do in half a second each
    two = [device("TPU v5 lite", {"peak_bytes_in_use": n * 10**9}) for n in (2, 3)]
    assert utilisation(work, 1.0, two) == pytest.approx(
        {"train/tflops_per_device": 98.5, "train/mfu": 0.5, "train/memory_gb": 3.0}
    )


def test_each_dtype_has_its_own_peak():
    h100 = chips.CHIPS["NVIDIA H100 80GB HBM3"].flops
    work = {"bfloat16": h100["bfloat16"], "float32": h100["float32"]}
    assert utilisation(work, 4.0, [device("NVIDIA H100 80GB HBM3")])["train/mfu"] == pytest.approx(
        0.5
    )


def test_an_unknown_chip_or_dtype_has_no_mfu():
    assert "train/mfu" not in utilisation(
        {"float32": 1}, 1.0, [device("NVIDIA H100 80GB HBM3 MIG 1g.10gb")]
    )
    assert "train/mfu" not in utilisation({"float64": 1}, 1.0, [device("TPU v4")])


def test_memory_of_other_hosts_is_not_asked_for():
    both = [device("TPU v4", {"peak_bytes_in_use": 10**9}), device("TPU v4", None, process=1)]
    assert utilisation({}, 1.0, both) == {"train/memory_gb": 1.0}


@pytest.mark.parametrize("known", [True, False])
def test_a_run_logs_mfu_where_the_chip_is_known(tmp_path, monkeypatch, capsys, known):
    if known:
        row = chips.Chip("cpu", {"float32": 1e15}, 2**34, 1e11, "none: the row that a CPU lacks")
        monkeypatch.setitem(chips.CHIPS, "cpu", row)
    words = ["--simulate", "2", "--train.steps", "4", "--log.every", "2"]
    words += ["--optimizer.warmup-steps", "0"]
    spmd.load("digits", [*words, "--run.dir", str(tmp_path)]).train()
    lines = [x for x in metrics.read_lines(epath.Path(tmp_path)) if "train/loss" in x]
    assert [x["step"] for x in lines] == [2, 4]
    assert all(("train/mfu" in x) == known for x in lines)
    assert ("MFU" in capsys.readouterr().out) == known
    if known:
        work = 3 * 2 * 64 * (64 * 256 + 256 * 128 + 128 * 10)  # over two devices
        last = lines[-1]
        assert last["train/mfu"] == pytest.approx(work / 2 / 1e15 / last["train/step_seconds"])


def test_a_cpu_has_tflops_only():
    assert set(utilisation({"float32": 10**9}, 0.1, jax.devices("cpu"))) == {
        "train/tflops_per_device"
    }


@pytest.mark.parametrize("kind", chips.CHIPS)
def test_the_table_is_of_one_piece(kind):
    chip = chips.CHIPS[kind]
    assert chips.chip(kind) is chip and chip.source
    assert 1e14 / 2 < chip.flops["bfloat16"] < 1e16
    assert chip.flops["float32"] <= chip.flops["bfloat16"]
    assert 16 * 2**30 <= chip.memory < 1e12 and 1e11 < chip.bandwidth < 2e13


@pytest.mark.parametrize(
    ("waited", "computed", "told"), [(30.0, 20.0, True), (30.0, 40.0, False), (5.0, 1.0, False)]
)
def test_a_run_that_waits_for_its_batches_says_what_to_do(waited, computed, told):
    seconds = {"compile": 90.0, "input": waited, "step": computed}
    text = advise_input(seconds)
    assert ("waited 30 s for batches: raise --data.threads" in text) == told and bool(text) == told
