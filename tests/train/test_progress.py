"""Speed as the part of a chip's peak, and memory: shown where they are known."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from spmd import hardware
from spmd.train.progress import usage


def device(kind, stats=None, process=0):
    """What `usage` asks of a device of a kind that is not in this machine."""
    return SimpleNamespace(device_kind=kind, process_index=process, memory_stats=lambda: stats)


def test_a_chip_of_the_table():
    work = {"bfloat16": 197 * 10**12}  # what two v5e do in half a second each
    two = [device("TPU v5 lite", {"peak_bytes_in_use": n * 10**9}) for n in (2, 3)]
    assert usage(work, 1.0, two) == pytest.approx(
        {"train/tflops_per_device": 98.5, "train/mfu": 0.5, "train/memory_gb": 3.0}
    )


def test_each_dtype_has_its_own_peak():
    h100 = hardware.CHIPS["NVIDIA H100 80GB HBM3"].flops
    work = {"bfloat16": h100["bfloat16"], "float32": h100["float32"]}
    assert usage(work, 4.0, [device("NVIDIA H100 80GB HBM3")])["train/mfu"] == pytest.approx(0.5)


def test_an_unknown_chip_or_dtype_has_no_mfu():
    assert "train/mfu" not in usage(
        {"float32": 1}, 1.0, [device("NVIDIA H100 80GB HBM3 MIG 1g.10gb")]
    )
    assert "train/mfu" not in usage({"float64": 1}, 1.0, [device("TPU v4")])


def test_memory_of_other_hosts_is_not_asked_for():
    both = [device("TPU v4", {"peak_bytes_in_use": 10**9}), device("TPU v4", None, process=1)]
    assert usage({}, 1.0, both) == {"train/memory_gb": 1.0}


def test_a_cpu_has_tflops_only():
    assert set(usage({"float32": 10**9}, 0.1, jax.devices("cpu"))) == {"train/tflops_per_device"}


@pytest.mark.parametrize("kind", hardware.CHIPS)
def test_the_table_is_of_one_piece(kind):
    chip = hardware.CHIPS[kind]
    assert hardware.chip(kind) is chip and chip.source
    assert 1e14 / 2 < chip.flops["bfloat16"] < 1e16
    assert chip.flops["float32"] <= chip.flops["bfloat16"]
    assert 16 * 2**30 <= chip.memory < 1e12 and 1e11 < chip.bandwidth < 2e13
