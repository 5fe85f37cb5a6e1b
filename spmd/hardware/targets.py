"""Targets of a plan: `cpu:8`, `h100:64`, `v5p:4x4x4`."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from spmd.core.fields import check, closest
from spmd.hardware.chips import CHIPS, Chip

# (dims of a TPU slice, devices per chip in JAX).
TPUS = {"v4": (3, 1), "v5e": (2, 1), "v5p": (3, 1), "v6e": (2, 1), "7x": (3, 2)}
SLICES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),  # and larger ones, see _exists
}
SHORT = {"a100": "a100-80"}
NAMES: dict[str, Chip] = {chip.name.lower(): chip for chip in CHIPS.values()}
MAX_DEVICES = 4096  # simulated ones take 3 s for 2048, 11 s for 4096, a minute for 8960


class Target(NamedTuple):
    """Devices to plan for, which need not be present. chip: None for `cpu`. topology: that of a TPU slice in
    chips; () for others.
    """

    name: str
    num_devices: int
    chip: Chip | None
    topology: tuple[int, ...] = ()


def parse(text: str) -> Target:
    """Parses `NAME:N`, or `NAME:AxBxC` for a TPU slice; ValueError for a target that does not exist."""
    name, _, size = text.strip().lower().partition(":")
    names = ["cpu", *SHORT, *NAMES]
    check(
        name in names,
        f"unknown target {text!r}.{closest(name, names)} Known: {', '.join(names)};"
        " for example cpu:8, h100:64 or v5p:4x4x4",
    )
    dims, per_chip = TPUS.get(name, (1, 1))
    example = f"{name}:{'x'.join(['4'] * dims) if dims > 1 else 8}"
    check(
        re.fullmatch(rf"[1-9]\d{{0,5}}(x[1-9]\d{{0,5}}){{{dims - 1}}}", size) is not None,
        f"target {text!r} must be "
        + (f"a slice of {dims} dims in chips" if dims > 1 else "a number of devices")
        + f", for example {example}",
    )
    sizes = tuple(int(part) for part in size.split("x"))
    num_devices = math.prod(sizes) * per_chip
    check(
        num_devices <= MAX_DEVICES,
        f"target {text!r} has {num_devices} devices; at most {MAX_DEVICES} can be planned for",
    )
    check(
        dims == 1 or _exists(size, sizes),
        f"target {text!r}: there is no such slice; {name} has {', '.join(SLICES.get(dims, ()))}"
        + (" and larger ones of multiples of 4, in rising order" if dims == 3 else ""),
    )
    chip = NAMES.get(SHORT.get(name, name))
    return Target(f"{name}:{size}", num_devices, chip, sizes if dims > 1 else ())


def _exists(size: str, sizes: tuple[int, ...]) -> bool:
    """Whether Google Cloud has a TPU slice of these chips (its pages on TPU v4 to 7x)."""
    large = len(sizes) == 3 and all(n % 4 == 0 for n in sizes) and sizes == tuple(sorted(sizes))
    return size in SLICES[len(sizes)] or large
