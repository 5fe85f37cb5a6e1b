"""FLOPs of dots and convolutions."""

from __future__ import annotations

import functools
import math
import re

import numpy as np

from spmd.hardware.hlo.text import Computation, Instruction


def flops(instruction: Instruction, computation: Computation) -> int:
    """FLOPs of an execution: 2 M N K of a dot or a convolution; 0 for other instructions."""
    if instruction.op not in ("dot", "convolution"):
        return 0
    (_, out), *_ = instruction.arrays
    (_, left), (_, right) = (computation.by_name[name].arrays[0] for name in instruction.operands)
    if instruction.op == "dot":
        contracted = re.findall(r"\d+", instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
        return 2 * math.prod(out) * math.prod(left[int(dim)] for dim in contracted)
    lhs, rhs, result = re.split(r"_|->", instruction.attribute(r"dim_labels=(\S+?)(?:,|$)"))
    total = 2 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
    window = _window(instruction.attribute(r"window=\{([^}]*)\}"))
    for dim, options in enumerate(window):
        label = str(dim)
        total *= _pairs(left[lhs.index(label)], out[result.index(label)], *options)
    return total


def _window(text: str) -> list[tuple[int, ...]]:
    """(size, stride, padding before, dilation of the array, dilation of the kernel) of each spatial dim."""
    values = dict(part.split("=") for part in text.split())
    dims = len(values.get("size", "").split("x")) if values.get("size") else 0

    def option(name: str, default: str) -> list[int]:
        parts = values[name].split("x") if name in values else [default] * dims
        return [int(part.split("_")[0]) for part in parts]

    options = (
        ("size", "1"),
        ("stride", "1"),
        ("pad", "0"),
        ("lhs_dilate", "1"),
        ("rhs_dilate", "1"),
    )
    return list(zip(*(option(*each) for each in options), strict=True))


@functools.lru_cache(maxsize=1024)
def _pairs(size: int, out: int, kernel: int, stride: int, pad: int, grow: int, spread: int) -> int:
    """Number of (output, kernel) positions of a spatial dim that meet an element of the array.

    The TPU compiler writes matmuls as convolutions whose batch dims are dilated and strided so that only few
    positions meet any.
    """
    place = np.arange(out) * stride - pad
    total = 0
    for k in range(kernel):
        position = place + k * spread
        total += int(
            np.sum((position >= 0) & (position <= (size - 1) * grow) & (position % grow == 0))
        )
    return total
