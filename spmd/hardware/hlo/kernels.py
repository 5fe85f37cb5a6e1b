"""Kernels of a TPU program: what runs between its collectives, with the cycles that its compiler estimates.

The compiler writes `"estimated_cycles":"N"` into the backend_config of fusions, convolutions and copies.
Pallas kernels, gathers and scatters carry none.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from spmd.hardware.hlo.text import Computation, Instruction

# Without an estimate, still work of a device.
_UNCOUNTED = ("gather", "scatter", "sort", "dynamic-update-slice", "custom-call", "fusion")
# Calls that reserve or rename memory.
_FREE = (
    "AllocateBuffer",
    "ConcatBitcast",
    "SliceBitcast",
    "Sharding",
    "MoveToDevice",
    "MoveToHost",
)
_ON_CHIP = re.compile(r"S\([1-9]\d*\)")  # a layout in vector memory instead of HBM
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_SLICES = ("dynamic-slice", "slice")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operation of the program that one device runs.

    name: of the instruction. op: `fusion`, `copy`, `custom-call tpu_custom_call` and so on. cycles: per
    execution, by the compiler; -1 if it gives none. flops: of matmuls and convolutions in it, per execution;
    a Pallas kernel has 0. bytes: read from and written to the device's memory, per execution. count:
    executions per step. op_name, source: as of a Collective.
    """

    name: str
    op: str
    cycles: int
    flops: float
    bytes: int
    count: float
    op_name: str
    source: str

    @property
    def step_cycles(self) -> float:
        """Cycles of a step; 0 if the compiler gives none."""
        return max(self.cycles, 0) * self.count


def cycles_of(instruction: Instruction) -> int:
    """Estimated cycles of an execution; -1 if the text has none."""
    digits = instruction.attribute(r'"estimated_cycles":"(\d+)"')
    return int(digits) if digits else -1


def is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction outside of fusions takes time on the device, and is no collective."""
    if cycles_of(instruction) >= 0:
        return True
    return instruction.op in _UNCOUNTED and target_of(instruction) not in _FREE


def target_of(instruction: Instruction) -> str:
    """Name of the function that a custom call runs; "" for other instructions."""
    return instruction.attribute(r'custom_call_target="([^"]*)"')


def accessed_bytes(
    instruction: Instruction, computation: Computation, fused: Computation | None
) -> int:
    """Bytes of the operands and results in the device's memory.

    Of an operand that a fusion slices, and of a result that it updates in place, the slice.
    """
    sizes = [_bytes(computation.by_name[name].shape) for name in instruction.operands]
    if fused is None:
        return sum(sizes) + _bytes(instruction.shape)
    for number, size in _sliced(fused).items():
        sizes[number] = min(sizes[number], size)
    written = _bytes(instruction.shape)
    for update in _updates(fused):
        whole, part = (_origin(fused, name) for name in update.operands[:2])
        written += min(_bytes(part.shape) - _bytes(update.shape), 0)
        if whole.op == "parameter":
            sizes[int(whole.arguments)] = 0
    return sum(sizes) + max(written, 0)


def _updates(fused: Computation) -> list[Instruction]:
    """The updates of slices among the results of a fusion."""
    root = fused.root
    names = root.operands if root.op == "tuple" else [root.name]
    results = (_origin(fused, name) for name in names)
    return [each for each in results if each.op == "dynamic-update-slice"]


def _origin(fused: Computation, name: str) -> Instruction:
    """The instruction whose result it is, in another shape."""
    instruction = fused.by_name[name]
    while instruction.op in ("bitcast", "copy", "reshape"):
        instruction = fused.by_name[instruction.operands[0]]
    return instruction


def _sliced(fused: Computation) -> dict[int, int]:
    """Number of a parameter -> bytes that are read of it, for those that are only sliced."""
    sizes = {}
    for each in fused.instructions:
        users = fused.users[each.name]
        if (
            each.op == "parameter"
            and users
            and all(user.op in _SLICES and user.operands[0] == each.name for user in users)
        ):
            sizes[int(each.arguments)] = sum(_bytes(user.shape) for user in users)
    return sizes


def _bytes(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in the device's memory."""
    total = 0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if not _ON_CHIP.search(layout):
            sizes = (int(size) for size in re.findall(r"\d+", dims))
            total += math.prod(sizes) * bits(dtype) // 8
    return total


def bits(dtype: str) -> int:
    """Bits of a number; 0 of a token."""
    if dtype == "pred":
        return 8
    match = re.match(r"[a-z]+(\d+)", dtype)
    return int(match[1]) if match else 0


def rank(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Kernels that run the same line merged, by op and source; the most cycles first, then the most bytes.

    The merged count is that of all; cycles, FLOPs and bytes are means of an execution.
    """
    groups = defaultdict[tuple[str, str, bool], list[Kernel]](list)
    for each in kernels:
        origin = each.source or each.op_name or each.name
        groups[each.op, origin, each.cycles >= 0].append(each)
    merged = []
    for same in groups.values():
        longest = max(same, key=lambda each: each.step_cycles)
        merged.append(
            dataclasses.replace(
                longest,
                cycles=round(_mean(same, "cycles")),
                flops=_mean(same, "flops"),
                bytes=round(_mean(same, "bytes")),
                count=sum(each.count for each in same),
            )
        )
    return sorted(merged, key=lambda each: (-each.step_cycles, -each.bytes * each.count))


def _mean(kernels: Sequence[Kernel], field: str) -> float:
    """Mean of a field over the executions."""
    total = sum(getattr(each, field) * each.count for each in kernels)
    return total / max(sum(each.count for each in kernels), 1e-30)
