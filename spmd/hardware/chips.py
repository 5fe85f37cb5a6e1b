"""Peak FLOP/s, memory and links of devices by their name in JAX. Standard library only.

The figures are those of the vendors for dense matrices, without sparsity, which doubles some of them. A row
describes what JAX calls a device: for a TPU with two devices per chip, half of the chip. A name that is not
in the table has no row: that of a similar device (a card of lower power, a slice of a GPU) would be wrong.
"""

from __future__ import annotations

from typing import NamedTuple


class Links(NamedTuple):
    """Links between a device and others; every bandwidth is in bytes/s in one direction.

    axes: dims of the torus of a TPU slice; 0 for a switch that joins any two devices (NVLink).
    link: bandwidth of a torus link (there is one in each direction of each axis), or of all links of a device
    to a switch together. ring: a torus axis is a ring if its size is a multiple of this (and, in three dims,
    every size of the slice is), else a line. pod: number of devices that the links can join. host: devices on
    a host. scale_out: bandwidth per device of the slower network between slices or hosts.
    source: where link and scale_out are from.
    """

    axes: int
    link: float
    ring: int
    pod: int
    host: int
    scale_out: float
    source: str


class Chip(NamedTuple):
    """A device.

    flops: FLOP/s of matmuls by dtype of the operands, with JAX's default precision: float32 in one bfloat16
    pass on a TPU, as TF32 on a GPU. memory: bytes (the GB of the pages are GiB). bandwidth: bytes/s of that
    memory. source: the vendor's page. links: None for devices that are rarely joined. tile: side of a TPU's
    matrix unit; a matmul with a shorter dim leaves the rest of it idle. units: matrix units of a TPU; each
    multiplies and adds tile^2 pairs in a cycle.
    """

    name: str
    flops: dict[str, float]
    memory: float
    bandwidth: float
    source: str
    links: Links | None = None
    tile: int = 1
    units: int = 0

    @property
    def clock(self) -> float:
        """Cycles of a TPU in a second, at which its matrix units reach the peak; 0 for other devices."""
        return self.flops["bfloat16"] / (2 * self.units * self.tile**2) if self.units else 0.0


def _tpu(
    name: str, tera: float, gb: float, gb_s: float, links: Links, units: int, tile: int = 128
) -> Chip:
    peaks = {"bfloat16": tera * 1e12, "float32": tera * 1e12}
    source = f"Google Cloud TPU documentation: TPU {name}"
    return Chip(name, peaks, gb * 2**30, gb_s * 1e9, source, links, tile, units)


def _gpu(
    name: str,
    tera: float,
    tf32: float,
    gb: float,
    gb_s: float,
    source: str,
    links: Links | None = None,
) -> Chip:
    peaks = {"bfloat16": tera * 1e12, "float16": tera * 1e12, "float32": tf32 * 1e12}
    return Chip(name, peaks, gb * 2**30, gb_s * 1e9, source, links)


# The axes of a torus in three dims are rings in slices made of complete 4x4x4 cubes; those of a torus in two
# dims only if they span the pod's 16. A program reaches 90 GB/s of a link's nominal 100 (45 of 50): the table
# in "How to Scale Your Model", chapter 2 (jax-ml.github.io/scaling-book). The vendor's pages give the sum of
# a chip's links in both directions (v5e 400 GB/s, v5p 1200, v6e 800). The chips of a host share its network.
_BOOK = "scaling-book, chapter 2; DCN: Google Cloud TPU documentation"
_V4 = Links(3, 45e9, 4, 4096, 4, 25e9 / 4, f"{_BOOK}, 25 GB/s for each host of 4")
_V5E = Links(2, 45e9, 16, 256, 8, 25e9 / 8, f"{_BOOK}, 2 x 100 Gb/s for each host of 8")
_V5P = Links(3, 90e9, 4, 8960, 4, 50e9 / 8, f"{_BOOK}, 50 Gb/s for each chip")
_V6E = Links(2, 90e9, 16, 256, 8, 100e9 / 8, f"{_BOOK}, 100 Gb/s for each chip")
# Two devices share the links of a chip: half of the 90 GB/s that are reached of a link's 100 (the page has
# 1200 GB/s for all links).
_7X = Links(
    3, 90e9 / 2, 4, 9216 * 2, 8, 100e9 / 16, f"{_BOOK}, 100 Gb/s for each chip of 2 devices"
)


def _nvlink(gb_s: float, pod: int, host: int, gbit_s: float, nic: str) -> Links:
    """Links to an NVLink switch. gb_s: half of the data sheet's total, which counts both directions."""
    return Links(0, gb_s * 1e9, 1, pod, host, gbit_s * 1e9 / 8, f"data sheet; {nic} for each GPU")


_A100 = _nvlink(300, 8, 8, 200, "DGX A100: ConnectX-6, 200 Gb/s")
_H100 = _nvlink(450, 8, 8, 400, "DGX H100: ConnectX-7, 400 Gb/s")
_B200 = _nvlink(900, 8, 8, 400, "DGX B200: ConnectX-7, 400 Gb/s")
_GB200 = _nvlink(900, 72, 4, 400, "GB200 NVL72: ConnectX-7, 400 Gb/s")
_NVIDIA = "NVIDIA {} data sheet".format

CHIPS: dict[str, Chip] = {
    # by jax's device_kind: bf16 TFLOP/s, GB, GB/s, links, matrix units and their side. With these units the
    # compiler's cycles of a large matmul are 70 to 97 % of the peak (clocks of 1.05 GHz for a v4, 1.5 for a
    # v5e, 1.75 for v5p and v6e, 2.2 for a 7x).
    "TPU v4": _tpu("v4", 275, 32, 1200, _V4, 8),
    "TPU v5 lite": _tpu("v5e", 197, 16, 819, _V5E, 4),
    "TPU v5": _tpu("v5p", 459, 95, 2765, _V5P, 8),
    "TPU v5p": _tpu("v5p", 459, 95, 2765, _V5P, 8),
    "TPU v6 lite": _tpu("v6e", 918, 32, 1638, _V6E, 4, 256),
    "TPU7x": _tpu("7x", 2307 / 2, 192 / 2, 7380 / 2, _7X, 4, 256),  # two to a chip
    # bf16, TF32 TFLOP/s, GB, GB/s
    "NVIDIA A100-SXM4-40GB": _gpu("A100-40", 312, 156, 40, 1555, _NVIDIA("A100"), _A100),
    "NVIDIA A100-SXM4-80GB": _gpu("A100-80", 312, 156, 80, 2039, _NVIDIA("A100 80GB"), _A100),
    "NVIDIA A100 80GB PCIe": _gpu("A100-80-PCIe", 312, 156, 80, 1935, _NVIDIA("A100 80GB")),
    "NVIDIA H100 80GB HBM3": _gpu("H100", 989.5, 494.7, 80, 3350, _NVIDIA("H100"), _H100),
    "NVIDIA H100 PCIe": _gpu("H100-PCIe", 756.5, 378, 80, 2000, _NVIDIA("H100 PCIe")),
    "NVIDIA H100 NVL": _gpu("H100-NVL", 835.5, 417.5, 94, 3900, _NVIDIA("H100")),
    "NVIDIA H200": _gpu("H200", 989.5, 494.7, 141, 4800, _NVIDIA("H200"), _H100),
    "NVIDIA GH200 480GB": _gpu("GH200", 989.5, 494.7, 96, 4000, _NVIDIA("GH200")),
    "NVIDIA B200": _gpu("B200", 2250, 1125, 180, 8000, _NVIDIA("Blackwell (HGX B200)"), _B200),
    "NVIDIA GB200": _gpu("GB200", 2500, 1250, 186, 8000, _NVIDIA("GB200 NVL72"), _GB200),
    "NVIDIA L4": _gpu("L4", 121, 60, 24, 300, _NVIDIA("L4")),
    "NVIDIA L40S": _gpu("L40S", 362, 183, 48, 864, _NVIDIA("L40S")),
}


def chip(device_kind: str) -> Chip | None:
    """The row for a `jax.Device.device_kind`; None for devices that are not in the table, such as CPUs."""
    return CHIPS.get(device_kind)
