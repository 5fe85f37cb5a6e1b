"""A compiled program read from its HLO text: collectives by mesh axis, bytes, FLOPs; loops expanded.

Two texts are read: the optimised module of a TPU program, and a module after spmd-partitioning. Of the
second, what the compilers for TPUs and GPUs go on to do is taken as done: an all-reduce of which each device
keeps its own slice is a reduce-scatter, and a sum of all-reduces is the all-reduce of a sum.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from spmd.hlo import groups, loops, text, work
from spmd.hlo.branches import taken

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_NEAR = 50  # instructions
# What an array passes through without being changed, for who follows it.
_SAME = ("get-tuple-element", "bitcast", "reshape", "transpose", "copy", "convert")
_WORK = ("fusion", "dot", "convolution", "while", "custom-call", "call", "conditional")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, as one device takes part in it.

    kind: one of KINDS. axes: the mesh axes that its groups span; () if no product of axes does. group:
    devices in a group. bytes: per execution, of the whole array: what an all-gather returns, what a
    reduce-scatter is given, the operand of the others. count: executions per step, 1 / n of what runs in
    every n-th step. source: `spmd/models/attention.py:120`, "" if unknown. overlapped: whether computation
    runs meanwhile.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    bytes: int
    count: float
    dtype: str
    op_name: str
    source: str
    overlapped: bool

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends per execution, in a ring."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (self.group - 1) / self.group


class Program(NamedTuple):
    """flops: of matrix products and convolutions, per device and step, what is computed anew included;
    kernels (custom calls) show none. endless: loops whose length the text does not tell; their bodies count
    once.
    """

    collectives: list[Collective]
    flops: float
    endless: int


@dataclasses.dataclass(frozen=True)
class Total:
    """Per device and step. wire_bytes: sent, by a ring."""

    count: float
    bytes: float
    wire_bytes: float

    def __add__(self, other: Total) -> Total:
        return Total(
            self.count + other.count,
            self.bytes + other.bytes,
            self.wire_bytes + other.wire_bytes,
        )


Key = tuple[tuple[str, ...], str]  # mesh axes, kind


def ledger(program: Program) -> dict[Key, Total]:
    """(axes, kind) -> its sum over the program, the largest first."""
    return summed(
        ((c.axes, c.kind), Total(c.count, c.count * c.bytes, c.count * c.wire_bytes))
        for c in program.collectives
    )


def summed(found: Iterable[tuple[Key, Total]]) -> dict[Key, Total]:
    """The sum of each key, the most bytes on the wire first."""
    sums: dict[Key, Total] = {}
    for key, each in found:
        sums[key] = sums[key] + each if key in sums else each
    return dict(sorted(sums.items(), key=lambda item: -item[1].wire_bytes))


def alike(found: Iterable[Collective]) -> list[Collective]:
    """Those that differ in nothing but how often they run, as one; the most bytes first."""
    counts = defaultdict[Collective, float](int)
    for c in found:
        counts[dataclasses.replace(c, count=0, op_name="" if c.source else c.op_name)] += c.count
    joined = [dataclasses.replace(c, count=count) for c, count in counts.items()]
    return sorted(joined, key=lambda c: -c.count * c.wire_bytes)


def read(module: str, axes: Mapping[str, int]) -> Program:
    """The program of an HLO module, as text.

    axes: mesh axis -> size, in order; devices are numbered row-major over them, as XLA numbers those of a
    mesh. ValueError for text that is no HLO module, and for replica groups in a form that is not known.
    """
    reader = _Reader(text.module(module), dict(axes))
    reader.walk(reader.module.entry, 1)
    return Program(reader.found, reader.flops, reader.endless)


# ---- the walk


class _Caller(NamedTuple):
    """What calls a computation as a part of itself: a fusion, or the start of something asynchronous.

    parts: place in `found` of the collectives within such, by channel: the TPU compiler spreads one over
    several fusions, beside the work that hides it.
    """

    one: text.Instruction
    parts: dict[str, int]
    hidden: bool


class _Reader:
    """Walks the computations as they run, each loop's body times its executions."""

    def __init__(self, module: text.Module, axes: dict[str, int]):
        self.module, self.axes = module, axes
        self.found: list[Collective] = []
        self.flops, self.endless = 0.0, 0

    def walk(
        self,
        name: str,
        count: float,
        caller: _Caller | None = None,
        known: loops.Known = loops.nothing,
    ) -> None:
        """known: what is constant in the state of the loop whose body this is."""
        inside = self.module.computations[name]
        parts = caller.parts if caller else {}
        for one in inside.instructions:
            self.flops += count * work.flops(one, inside)
            kind = one.op.removesuffix("-start")
            if kind in KINDS:
                self._collective(kind, one, inside, count, caller)
            elif one.op == "while":
                times = loops.executions(one, inside, self.module, known)
                self.endless += times is None
                within = loops.unchanged(one, inside, self.module, known)
                self.walk(one.called[0], count * (1 if times is None else times), known=within)
            elif one.op == "conditional":
                known_ways = taken(one, inside, self.module)
                for branch, part in known_ways:
                    self.walk(branch, count * part)
                if not known_ways:
                    self._dearest(one, count)
            elif one.op in ("fusion", "async-start"):
                hidden = _hidden(one, inside)
                self.walk(one.called[0], count, _Caller(one, parts, hidden))
            elif one.op == "call":
                self.walk(one.called[0], count)

    def _dearest(self, one: text.Instruction, count: float) -> None:
        """As if it always took the branch that sends most, then that computes most."""
        branches = []
        for name in one.called:
            branch = _Reader(self.module, self.axes)
            branch.walk(name, count)
            sent = sum(found.count * found.bytes for found in branch.found)
            branches.append((sent, branch.flops, len(branches), branch))
        *_, dearest = max(branches)
        self.found += dearest.found
        self.flops += dearest.flops
        self.endless += dearest.endless

    def _collective(
        self,
        kind: str,
        one: text.Instruction,
        inside: text.Computation,
        count: float,
        caller: _Caller | None,
    ) -> None:
        channel = one.attribute(r"channel_id=(\d+)")
        if caller is not None and channel in caller.parts:
            place = caller.parts[channel]
            self.found[place] = dataclasses.replace(self.found[place], overlapped=True)
            return
        arrays = [a for name in one.operands for a in inside.by_name[name].arrays]
        size = sum(math.prod(shape) * _bits(dtype) for dtype, shape in arrays) // 8
        axes, group = self._spans(kind, one)
        if group == 1 or not arrays:
            return
        if kind == "all-gather":
            size *= group
        elif kind == "all-reduce":
            if not self.module.final and _joined(one, inside):
                return
            # What is final is said by a fusion of the two.
            if (caller or not self.module.final) and _scattered(one, inside, group):
                kind = "reduce-scatter"
        said = _speaking(one, inside, caller)
        frame = said.attribute(r"stack_frame_id=(\d+)")
        if caller is not None and channel:
            caller.parts[channel] = len(self.found)
        self.found.append(
            Collective(
                kind=kind,
                axes=axes,
                group=group,
                bytes=size,
                count=count,
                dtype="+".join(dict.fromkeys(dtype for dtype, _ in arrays)),
                op_name=said.attribute(r'op_name="([^"]*)"'),
                source=self.module.sources.get(frame, ""),
                overlapped=_hidden(one, inside) or bool(caller and caller.hidden),
            )
        )

    def _spans(self, kind: str, one: text.Instruction) -> tuple[tuple[str, ...], int]:
        """Axes, and devices in a group."""
        if kind == "collective-permute":
            pairs = groups.pairs(one.attribute(r"source_target_pairs=(\{(?:\{[^}]*\},?)*\})"))
            axes = groups.crossed(pairs, self.axes)
            if (pairs[:, 0] == pairs[:, 1]).all():  # each to itself
                return (), 1
            return axes, math.prod(self.axes[axis] for axis in axes) if axes else len(pairs)
        written = one.attribute(rf"replica_groups=({groups.FORM})") or "{}"
        return _spans(written, tuple(self.axes.items()))


@functools.lru_cache(maxsize=1024)
def _spans(written: str, axes: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], int]:
    num_devices = math.prod(size for _, size in axes)
    found = groups.devices(written, num_devices)
    return groups.spanned(found, dict(axes)), num_devices if found is None else found.shape[1]


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 0  # a token has none


def _speaking(
    one: text.Instruction, inside: text.Computation, caller: _Caller | None
) -> text.Instruction:
    """Whose metadata say where this comes from: its own, its fusion's, or the nearest reader's or operand's.
    An all-gather that the TPU compiler does as an all-reduce has none.
    """
    near = [one] if caller is None else [one, caller.one]
    for other in near:  # which grows
        if other.attribute(r'(op_name)="') and other.op != "parameter":
            return other
        if len(near) < _NEAR and (caller is None or other is not caller.one):
            beside = [*inside.users[other.name], *(inside.by_name[n] for n in other.operands)]
            near += [each for each in beside if _elements(each) > 1]  # no counters
    return one


def _hidden(one: text.Instruction, inside: text.Computation) -> bool:
    """Whether work stands between a start and its done."""
    if not one.op.endswith("-start"):
        return False
    names, working = {one.name}, False
    begun = False
    for other in inside.instructions:
        if other is one:
            begun = True
        elif begun and names.intersection(other.operands):
            if other.op.endswith("-done"):
                return working
            names.add(other.name)
        elif begun:
            working |= other.op in _WORK
    return False


def _scattered(one: text.Instruction, inside: text.Computation, group: int) -> bool:
    """Whether each device keeps only its own slice of a sum, or of a sum of sums."""

    def kept(name: str) -> bool:
        users = inside.users[name]
        return bool(users) and all(
            kept(user.name)
            if user.op in _SAME
            else user.op == "dynamic-slice"
            and user.operands[0] == name
            and bool(inside.by_device.intersection(user.operands[1:]))
            and _elements(user) * group == _elements(inside.by_name[name])
            for user in users
        )

    names = [one.name, *(sum_ for sum_, _ in _sums(one, inside))]
    return inside.root.name not in names and kept(names[-1])


def _elements(one: text.Instruction) -> int:
    return sum(math.prod(shape) for _, shape in one.arrays)


def _joined(one: text.Instruction, inside: text.Computation) -> bool:
    """Whether a sum of all-reduces, of which this is not the last, is one all-reduce of the sum."""
    return any(inside.by_name[sum_].operands[0] == first for sum_, first in _sums(one, inside))


def _sums(one: text.Instruction, inside: text.Computation) -> list[tuple[str, str]]:
    """The additions of this all-reduce to others like it, from the inside out, and as what it enters them."""
    found, name = list[tuple[str, str]](), one.name
    while len(users := inside.users[name]) == 1 and users[0].op in ("add", "copy"):
        if users[0].op == "add":
            first, second = users[0].operands
            if first == second or not _summed(second if first == name else first, one, inside):
                break
            found.append((users[0].name, name))
        name = users[0].name
    return found


def _summed(name: str, like: text.Instruction, inside: text.Computation) -> bool:
    """Whether it is an all-reduce like that one, or a sum of such, read by nobody else."""
    other = inside.by_name[name]
    if len(inside.users[name]) != 1 or other.shape != like.shape:
        return False
    if other.op in ("add", "copy"):
        return all(_summed(operand, like, inside) for operand in other.operands)
    pattern = r"replica_groups=(.*?), (?:use_global|to_apply)"
    return other.op == "all-reduce" and other.attribute(pattern) == like.attribute(pattern)
