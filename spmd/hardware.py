"""What a device can do, by the name that JAX gives it. Standard library only.

The figures are the vendors', for dense matrices: sparsity, which doubles some of them, is left out. What JAX
calls a device is what a row is about: of a TPU with two devices per chip, half of the chip. For a name that
is not here, None: a near one (a card of lower power, a slice of a GPU) would give a wrong figure.
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """One device.

    flops: FLOP/s of matrix products by dtype of the operands, as JAX multiplies them by default: float32 in
    one bfloat16 pass on a TPU, as TF32 on a GPU. memory: bytes (the GB of the pages are GiB). bandwidth:
    bytes/s of that memory. source: the vendor's page.
    """

    name: str
    flops: dict[str, float]
    memory: float
    bandwidth: float
    source: str


def _tpu(name: str, tera: float, gb: float, gb_s: float, source: str) -> Chip:
    peak = tera * 1e12
    return Chip(name, {"bfloat16": peak, "float32": peak}, gb * 2**30, gb_s * 1e9, source)


def _gpu(name: str, tera: float, tf32: float, gb: float, gb_s: float, source: str) -> Chip:
    peaks = {"bfloat16": tera * 1e12, "float16": tera * 1e12, "float32": tf32 * 1e12}
    return Chip(name, peaks, gb * 2**30, gb_s * 1e9, source)


_TPU = "Google Cloud TPU documentation: TPU {}".format
_NVIDIA = "NVIDIA {} data sheet".format

CHIPS: dict[str, Chip] = {
    # by jax's device_kind           bf16 TFLOP/s, GB, GB/s
    "TPU v4": _tpu("v4", 275, 32, 1200, _TPU("v4")),
    "TPU v5 lite": _tpu("v5e", 197, 16, 819, _TPU("v5e")),
    "TPU v5": _tpu("v5p", 459, 95, 2765, _TPU("v5p")),
    "TPU v5p": _tpu("v5p", 459, 95, 2765, _TPU("v5p")),
    "TPU v6 lite": _tpu("v6e", 918, 32, 1638, _TPU("v6e")),
    "TPU7x": _tpu("7x", 2307 / 2, 192 / 2, 7380 / 2, _TPU("7x (Ironwood)")),  # two to a chip
    # bf16, TF32 TFLOP/s, GB, GB/s
    "NVIDIA A100-SXM4-40GB": _gpu("A100-40", 312, 156, 40, 1555, _NVIDIA("A100")),
    "NVIDIA A100-SXM4-80GB": _gpu("A100-80", 312, 156, 80, 2039, _NVIDIA("A100 80GB")),
    "NVIDIA A100 80GB PCIe": _gpu("A100-80-PCIe", 312, 156, 80, 1935, _NVIDIA("A100 80GB")),
    "NVIDIA H100 80GB HBM3": _gpu("H100", 989.5, 494.7, 80, 3350, _NVIDIA("H100")),
    "NVIDIA H100 PCIe": _gpu("H100-PCIe", 756.5, 378, 80, 2000, _NVIDIA("H100 PCIe")),
    "NVIDIA H100 NVL": _gpu("H100-NVL", 835.5, 417.5, 94, 3900, _NVIDIA("H100")),
    "NVIDIA H200": _gpu("H200", 989.5, 494.7, 141, 4800, _NVIDIA("H200")),
    "NVIDIA GH200 480GB": _gpu("GH200", 989.5, 494.7, 96, 4000, _NVIDIA("GH200")),
    "NVIDIA B200": _gpu("B200", 2250, 1125, 180, 8000, _NVIDIA("Blackwell (HGX B200)")),
    "NVIDIA GB200": _gpu("GB200", 2500, 1250, 186, 8000, _NVIDIA("GB200 NVL72")),
    "NVIDIA L4": _gpu("L4", 121, 60, 24, 300, _NVIDIA("L4")),
    "NVIDIA L40S": _gpu("L40S", 362, 183, 48, 864, _NVIDIA("L40S")),
}


def chip(device_kind: str) -> Chip | None:
    """The row of a device, by `jax.Device.device_kind`; None for what is not in the table, as a CPU."""
    return CHIPS.get(device_kind)
