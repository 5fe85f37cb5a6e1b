"""HLO text -> computations of instructions, and lines of source."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

# Frames that stand between a model and the operation: the line is that of their caller.
_PLUMBING = ("spmd/models/layers.py", "spmd/scope.py", "spmd/sharding.py", "spmd/tree.py")
_LIBRARIES = ("site-packages/", "dist-packages/", "/lib/python", "<frozen")
_DEEPEST = 200  # frames


class Instruction(NamedTuple):
    """`ROOT %name = shape op(inside), attributes`."""

    name: str
    shape: str
    op: str
    inside: str  # between the parentheses
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names."""
        return re.findall(r"%([\w.\-]+(?:#\d+)*)", self.inside)

    @property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of each array of the result."""
        return [
            (dtype, tuple(int(size) for size in re.findall(r"\d+", dims)))
            for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", self.shape)
        ]

    def attribute(self, pattern: str) -> str:
        """The first group of `pattern` in the attributes, or ""."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        """Computations that run when this does."""
        if self.op == "conditional":
            named = r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+))"
            parts = re.findall(named, self.attributes)
            return re.findall(r"%([\w.\-]+)", " ".join(a + b for a, b in parts))
        key = {"while": "body", "call": "to_apply"}.get(self.op, "calls")
        if self.op in ("while", "call", "fusion", "async-start"):
            return re.findall(rf"\b{key}=%([\w.\-]+)", self.attributes)
        return []


@dataclasses.dataclass
class Computation:
    """Instructions in order; those of a scheduled module in the order in which they run."""

    name: str
    instructions: list[Instruction] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Every instruction."""
        return {one.name: one for one in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> the instructions that read it."""
        found = defaultdict[str, list[Instruction]](list)
        for one in self.instructions:
            for name in set(one.operands):
                found[name].append(one)
        return found

    @functools.cached_property
    def by_device(self) -> set[str]:
        """Names of what depends on which device this is."""
        found: set[str] = set()
        for one in self.instructions:  # operands come first
            if one.op in ("partition-id", "replica-id") or found.intersection(one.operands):
                found.add(one.name)
        return found

    @property
    def root(self) -> Instruction:
        """The result."""
        return next((one for one in self.instructions if one.root), self.instructions[-1])


class Module(NamedTuple):
    """Computations by name. sources: stack frame -> `file.py:line`. final: as it runs, no pass is to come."""

    computations: dict[str, Computation]
    entry: str
    sources: dict[str, str]
    final: bool


def module(text: str) -> Module:
    """ValueError for text that is no HLO module."""
    if not text.lstrip().startswith("HloModule"):
        raise ValueError("this is no HLO module: its text must begin with HloModule")
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) .*->.*\{$", line)
            if header:
                current = Computation(header[2])
                entry = header[2] if header[1] else entry
        # The thread is that of a part of the chip: "sparsecore".
        elif re.fullmatch(r'\}(, execution_thread="\w+")?', line):
            computations[current.name] = _spelt_out(current)
            current = None
        elif (one := _instruction(line)) is not None:
            current.instructions.append(one)
        elif current.instructions:  # attributes of a kernel go over several lines
            last = current.instructions.pop()
            current.instructions.append(last._replace(attributes=last.attributes + line))
    final = "is_scheduled=true" in text.lstrip().split("\n", 1)[0]
    return Module(computations, entry, _sources(text), final)


def _spelt_out(inside: Computation) -> Computation:
    """With an instruction for each element that newer texts name in short, as `%tuple#1`."""
    known: dict[str, Instruction] = {}

    def element(name: str) -> None:
        if name not in known and "#" in name:
            source, _, index = name.rpartition("#")
            element(source)
            shape = _elements(known[source].shape)[int(index)]
            known[name] = Instruction(
                name, shape, "get-tuple-element", f"%{source}", f", index={index}", False
            )

    for one in inside.instructions:
        for name in one.operands:
            element(name)
        known[one.name] = one
    return Computation(inside.name, list(known.values()))


def _elements(shape: str) -> list[str]:
    """Those of a tuple's shape, `(f32[2]{0}, (s32[], f32[3,4]))`."""
    parts, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _instruction(line: str) -> Instruction | None:
    start = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if start is None:
        return None
    rest = line[start.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    begin = rest.index("(")
    end = _closing(rest, begin)
    inside, attributes = rest[begin + 1 : end], rest[end + 1 :]
    return Instruction(start[2], shape, rest[:begin], inside, attributes, bool(start[1]))


def _closing(text: str, begin: int) -> int:
    """Where the parenthesis that opens at `begin` closes."""
    depth = 0
    for found in re.finditer(r"[()]", text[begin:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return begin + found.start()
    raise ValueError(f"an HLO instruction with unbalanced parentheses: {text[:80]}")


def _sources(text: str) -> dict[str, str]:
    """The line of our own code for each stack frame, from the tables after the module's header."""

    def table(title: str) -> dict[str, str]:
        found = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        return dict(row.split(" ", 1) for row in found[1].splitlines()) if found else {}

    def number(row: str, key: str) -> str:
        found = re.search(rf"\b{key}=(\d+)", row)
        return found[1] if found else ""

    files = {key: name.strip('"') for key, name in table("FileNames").items()}
    lines = {
        key: (files.get(number(row, "file_name_id"), ""), number(row, "line"))
        for key, row in table("FileLocations").items()
    }
    frames = table("StackFrames")
    sources = {}
    for key in frames:
        stack, frame = list[tuple[str, str]](), key
        while frame in frames and len(stack) < _DEEPEST:
            stack.append(lines.get(number(frames[frame], "file_location_id"), ("", "")))
            # Written one too high, so that 1 is no parent.
            frame = str(int(number(frames[frame], "parent_frame_id") or 1) - 1)
        sources[key] = _own(stack)
    return sources


def _own(stack: Iterable[tuple[str, str]]) -> str:
    """The innermost line that is no library's and no plumbing, as `spmd/models/mlp.py:20`."""
    own = [
        (re.sub(r"^.*/(?=(?:spmd|experiments)/)", "", file), line)
        for file, line in stack
        if file and not any(part in file for part in _LIBRARIES)
    ]
    speaking = [frame for frame in own if not frame[0].startswith(_PLUMBING)] or own
    if not speaking:
        return ""
    file, line = speaking[0]
    return f"{file if file.startswith(('spmd/', 'experiments/')) else file.split('/')[-1]}:{line}"
