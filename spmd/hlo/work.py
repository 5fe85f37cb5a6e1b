"""FLOPs of dots and convolutions."""

from __future__ import annotations

import functools
import math
import re

import numpy as np

from spmd.hlo.text import Computation, Instruction


def flops(one: Instruction, inside: Computation) -> int:
    """Of one execution: 2 M N K; 0 for what is neither a dot nor a convolution."""
    if one.op not in ("dot", "convolution"):
        return 0
    (_, out), *_ = one.arrays
    (_, left), (_, right) = (inside.by_name[name].arrays[0] for name in one.operands)
    if one.op == "dot":
        contracted = re.findall(r"\d+", one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
        return 2 * math.prod(out) * math.prod(left[int(dim)] for dim in contracted)
    lhs, rhs, result = re.split(r"_|->", one.attribute(r"dim_labels=(\S+?)(?:,|$)"))
    total = 2 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
    window = _window(one.attribute(r"window=\{([^}]*)\}"))
    for dim, options in enumerate(window):
        label = str(dim)
        total *= _pairs(left[lhs.index(label)], out[result.index(label)], *options)
    return total


def _window(text: str) -> list[tuple[int, ...]]:
    """(size, stride, padding before, dilation of the array, of the kernel) of each spatial dim."""
    given = dict(part.split("=") for part in text.split())
    dims = len(given.get("size", "").split("x")) if given.get("size") else 0

    def of(name: str, default: str) -> list[int]:
        parts = given[name].split("x") if name in given else [default] * dims
        return [int(part.split("_")[0]) for part in parts]

    options = (
        ("size", "1"),
        ("stride", "1"),
        ("pad", "0"),
        ("lhs_dilate", "1"),
        ("rhs_dilate", "1"),
    )
    return list(zip(*(of(*option) for option in options), strict=True))


@functools.lru_cache(maxsize=1024)
def _pairs(size: int, out: int, kernel: int, stride: int, pad: int, grow: int, spread: int) -> int:
    """(output, kernel) positions of one spatial dim that meet an element of the array.

    The TPU compiler writes matrix products as convolutions whose batch dims are dilated and strided so that
    only one position in many meets any.
    """
    place = np.arange(out) * stride - pad
    total = 0
    for k in range(kernel):
        at = place + k * spread
        total += int(np.sum((at >= 0) & (at <= (size - 1) * grow) & (at % grow == 0)))
    return total
