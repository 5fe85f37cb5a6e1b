"""Walk the computations of an HLO module as they run, and collect its collectives and FLOPs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from spmd.hardware.hlo import groups, kernels, loops, text, work
from spmd.hardware.hlo.branches import fractions
from spmd.hardware.hlo.program import KINDS, Collective, CompiledProgram
from spmd.hardware.hlo.reductions import is_merged, is_scattered

_MAX_SEARCHED = 50  # instructions searched for metadata
_WORK = ("fusion", "dot", "convolution", "while", "custom-call", "call", "conditional")


def read(module: str, axes: Mapping[str, int]) -> CompiledProgram:
    """Reads the text of an HLO module.

    Args:
        module: the text.
        axes: mesh axis -> size, in order. Devices are numbered in row-major order over them, as XLA numbers
            those of a mesh.

    Raises:
        ValueError: the text is no HLO module, or has replica groups in an unknown form.
    """
    reader = _Reader(text.module(module), dict(axes))
    reader.walk(reader.module.entry, 1)
    estimated = any(each.cycles >= 0 for each in reader.kernels)
    return CompiledProgram(
        reader.collectives, reader.flops, reader.endless, reader.kernels if estimated else []
    )


class _Caller(NamedTuple):
    """An instruction that inlines a computation: a fusion, or the start of an asynchronous operation.

    parts: channel -> index in `collectives`, of collectives inside such instructions. The TPU compiler
    spreads a collective over several fusions, alongside the work that it overlaps with.
    """

    instruction: text.Instruction
    parts: dict[str, int]
    overlapped: bool


class _Reader:
    """Walks the computations, multiplying the body of each loop by its executions."""

    def __init__(self, module: text.Module, axes: dict[str, int]):
        self.module, self.axes = module, axes
        self.collectives: list[Collective] = []
        self.kernels: list[kernels.Kernel] = []
        self.flops, self.endless = 0.0, 0

    def walk(
        self,
        name: str,
        count: float,
        caller: _Caller | None = None,
        constants: loops.Constants = loops.no_constants,
    ) -> None:
        """Adds a computation that runs `count` times. constants: constant elements of the state of the loop
        whose body it is.
        """
        computation = self.module.computations[name]
        parts = caller.parts if caller else {}
        inlined = caller is not None and caller.instruction.op == "fusion"
        for instruction in computation.instructions:
            done, sent = self.flops, len(self.collectives)
            self.flops += count * work.flops(instruction, computation)
            kind = instruction.op.removesuffix("-start")
            if kind in KINDS:
                self._collective(kind, instruction, computation, count, caller)
            elif instruction.op == "while":
                times = loops.executions(instruction, computation, self.module, constants)
                self.endless += times is None
                inner = loops.constants(instruction, computation, self.module, constants)
                executions = count * (1 if times is None else times)
                self.walk(instruction.called[0], executions, constants=inner)
            elif instruction.op == "conditional":
                branches = fractions(instruction, computation, self.module)
                for branch, fraction in branches:
                    self.walk(branch, count * fraction)
                if not branches:
                    self._most_expensive(instruction, count)
            elif instruction.op in ("fusion", "async-start"):
                overlapped = _overlapped(instruction, computation)
                self.walk(instruction.called[0], count, _Caller(instruction, parts, overlapped))
            elif instruction.op == "call":
                self.walk(instruction.called[0], count)
            if not inlined and kernels.is_kernel(instruction) and len(self.collectives) == sent:
                self._kernel(instruction, computation, count, self.flops - done)

    def _kernel(
        self,
        instruction: text.Instruction,
        computation: text.Computation,
        count: float,
        flops: float,
    ) -> None:
        """Adds an operation outside of fusions that is no collective; flops: of all its executions."""
        fused = None
        if instruction.op == "fusion":
            fused = self.module.computations[instruction.called[0]]
        frame = instruction.attribute(r"stack_frame_id=(\d+)")
        self.kernels.append(
            kernels.Kernel(
                name=instruction.name,
                op=f"{instruction.op} {kernels.target_of(instruction)}".strip(),
                cycles=kernels.cycles_of(instruction),
                flops=flops / count if count else 0.0,
                bytes=kernels.accessed_bytes(instruction, computation, fused),
                count=count,
                op_name=instruction.attribute(r'op_name="([^"]*)"'),
                source=self.module.sources.get(frame, ""),
            )
        )

    def _most_expensive(self, conditional: text.Instruction, count: float) -> None:
        """Adds the branch that sends the most bytes; among equal ones, the one with the most FLOPs."""
        branches = []
        for name in conditional.called:
            branch = _Reader(self.module, self.axes)
            branch.walk(name, count)
            sent = sum(c.count * c.bytes for c in branch.collectives)
            branches.append((sent, branch.flops, len(branches), branch))
        *_, branch = max(branches)
        self.collectives += branch.collectives
        self.kernels += branch.kernels
        self.flops += branch.flops
        self.endless += branch.endless

    def _collective(
        self,
        kind: str,
        instruction: text.Instruction,
        computation: text.Computation,
        count: float,
        caller: _Caller | None,
    ) -> None:
        channel = instruction.attribute(r"channel_id=(\d+)")
        if caller is not None and channel in caller.parts:
            index = caller.parts[channel]
            self.collectives[index] = dataclasses.replace(self.collectives[index], overlapped=True)
            return
        arrays = [a for name in instruction.operands for a in computation.by_name[name].arrays]
        size = sum(math.prod(shape) * kernels.bits(dtype) for dtype, shape in arrays) // 8
        axes, group = self._spans(kind, instruction)
        if group == 1 or not arrays:
            return
        if kind == "all-gather":
            size *= group
        elif kind == "all-reduce":
            if not self.module.final and is_merged(instruction, computation):
                return
            # In a final program a reduce-scatter of this form is a fusion of all-reduce and slice.
            if (caller or not self.module.final) and is_scattered(instruction, computation, group):
                kind = "reduce-scatter"
        described = _with_metadata(instruction, computation, caller)
        frame = described.attribute(r"stack_frame_id=(\d+)")
        if caller is not None and channel:
            caller.parts[channel] = len(self.collectives)
        self.collectives.append(
            Collective(
                kind=kind,
                axes=axes,
                group=group,
                bytes=size,
                count=count,
                dtype="+".join(dict.fromkeys(dtype for dtype, _ in arrays)),
                op_name=described.attribute(r'op_name="([^"]*)"'),
                source=self.module.sources.get(frame, ""),
                overlapped=_overlapped(instruction, computation)
                or bool(caller and caller.overlapped),
            )
        )

    def _spans(self, kind: str, instruction: text.Instruction) -> tuple[tuple[str, ...], int]:
        """(mesh axes that the groups span, devices in a group)."""
        if kind == "collective-permute":
            pairs = groups.pairs(
                instruction.attribute(r"source_target_pairs=(\{(?:\{[^}]*\},?)*\})")
            )
            axes = groups.crossed_axes(pairs, self.axes)
            if (pairs[:, 0] == pairs[:, 1]).all():  # each device sends to itself
                return (), 1
            return axes, math.prod(self.axes[axis] for axis in axes) if axes else len(pairs)
        replica_groups = instruction.attribute(rf"replica_groups=({groups.FORM})") or "{}"
        return _spans(replica_groups, tuple(self.axes.items()))


@functools.lru_cache(maxsize=1024)
def _spans(replica_groups: str, axes: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], int]:
    num_devices = math.prod(size for _, size in axes)
    devices = groups.devices(replica_groups, num_devices)
    return groups.spanned_axes(
        devices, dict(axes)
    ), num_devices if devices is None else devices.shape[1]


def _with_metadata(
    instruction: text.Instruction, computation: text.Computation, caller: _Caller | None
) -> text.Instruction:
    """The instruction whose metadata describe the origin of `instruction`: itself, its fusion, or the nearest
    user or operand. An all-gather that the TPU compiler implements as an all-reduce has no metadata.
    """
    queue = [instruction] if caller is None else [instruction, caller.instruction]
    for other in queue:  # the loop appends to it
        if other.attribute(r'(op_name)="') and other.op != "parameter":
            return other
        if len(queue) < _MAX_SEARCHED and (caller is None or other is not caller.instruction):
            operands = (computation.by_name[name] for name in other.operands)
            neighbours = [*computation.users[other.name], *operands]
            queue += [each for each in neighbours if text.num_elements(each) > 1]  # not counters
    return instruction


def _overlapped(instruction: text.Instruction, computation: text.Computation) -> bool:
    """Whether computation is scheduled between the start of an operation and its end."""
    if not instruction.op.endswith("-start"):
        return False
    names, works, started = {instruction.name}, False, False
    for other in computation.instructions:
        if other is instruction:
            started = True
        elif started and names.intersection(other.operands):
            if other.op.endswith("-done"):
                return works
            names.add(other.name)
        elif started:
            works |= other.op in _WORK
    return False
