"""Parse HLO text into computations of instructions, and source lines."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

# Stack frames of helpers: a source line is that of their caller.
_HELPERS = (
    "spmd/models/layers/",
    "spmd/parallel/scope.py",
    "spmd/parallel/sharding.py",
    "spmd/core/tree.py",
)
_LIBRARIES = ("site-packages/", "dist-packages/", "/lib/python", "<frozen")
_MAX_FRAMES = 200


class Instruction(NamedTuple):
    """`ROOT %name = shape op(arguments), attributes`."""

    name: str
    shape: str
    op: str
    arguments: str  # the text between the parentheses
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+(?:#\d+)*)", self.arguments)

    @property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of each array of the result."""
        return [
            (dtype, tuple(int(size) for size in re.findall(r"\d+", dims)))
            for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", self.shape)
        ]

    def attribute(self, pattern: str) -> str:
        """The first group of `pattern` in the attributes; "" without a match."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""

    @property
    def called(self) -> list[str]:
        """Names of the computations that the instruction runs."""
        if self.op == "conditional":
            form = r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+))"
            parts = re.findall(form, self.attributes)
            return re.findall(r"%([\w.\-]+)", " ".join(a + b for a, b in parts))
        key = {"while": "body", "call": "to_apply"}.get(self.op, "calls")
        if self.op in ("while", "call", "fusion", "async-start"):
            return re.findall(rf"\b{key}=%([\w.\-]+)", self.attributes)
        return []


@dataclasses.dataclass
class Computation:
    """Instructions in order; in a scheduled module, in the order of execution."""

    name: str
    instructions: list[Instruction] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Name -> instruction."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> instructions that use it as an operand."""
        users = defaultdict[str, list[Instruction]](list)
        for instruction in self.instructions:
            for name in set(instruction.operands):
                users[name].append(instruction)
        return users

    @functools.cached_property
    def by_device(self) -> set[str]:
        """Names of instructions whose value depends on the device."""
        names: set[str] = set()
        for each in self.instructions:  # operands come first
            if each.op in ("partition-id", "replica-id") or names.intersection(each.operands):
                names.add(each.name)
        return names

    @property
    def root(self) -> Instruction:
        """The instruction that computes the result."""
        return next((each for each in self.instructions if each.root), self.instructions[-1])


class Module(NamedTuple):
    """Computations by name. sources: stack frame -> `file.py:line`. final: whether it is scheduled, after all
    passes.
    """

    computations: dict[str, Computation]
    entry: str
    sources: dict[str, str]
    final: bool


def module(text: str) -> Module:
    """Parses an HLO module; ValueError for other text."""
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
        # An execution thread names a part of the chip: "sparsecore".
        elif re.fullmatch(r'\}(, execution_thread="\w+")?', line):
            computations[current.name] = _with_elements(current)
            current = None
        elif (instruction := _instruction(line)) is not None:
            current.instructions.append(instruction)
        elif current.instructions:  # the attributes of a kernel continue on further lines
            last = current.instructions.pop()
            current.instructions.append(last._replace(attributes=last.attributes + line))
    final = "is_scheduled=true" in text.lstrip().split("\n", 1)[0]
    return Module(computations, entry, _sources(text), final)


def _with_elements(computation: Computation) -> Computation:
    """The computation with a get-tuple-element for each `%tuple#1`, the short form of newer texts."""
    instructions: dict[str, Instruction] = {}

    def element(name: str) -> None:
        if name not in instructions and "#" in name:
            source, _, index = name.rpartition("#")
            element(source)
            shape = _elements(instructions[source].shape)[int(index)]
            instructions[name] = Instruction(
                name, shape, "get-tuple-element", f"%{source}", f", index={index}", False
            )

    for instruction in computation.instructions:
        for name in instruction.operands:
            element(name)
        instructions[instruction.name] = instruction
    return Computation(computation.name, list(instructions.values()))


def num_elements(instruction: Instruction) -> int:
    """Number of elements of the result."""
    return sum(math.prod(shape) for _, shape in instruction.arrays)


def _elements(shape: str) -> list[str]:
    """Shapes of the elements of a tuple: `(f32[2]{0}, (s32[], f32[3,4]))`."""
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
    arguments, attributes = rest[begin + 1 : end], rest[end + 1 :]
    return Instruction(start[2], shape, rest[:begin], arguments, attributes, bool(start[1]))


def _closing(text: str, begin: int) -> int:
    """Index of the parenthesis that closes the one at `begin`."""
    depth = 0
    for match in re.finditer(r"[()]", text[begin:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return begin + match.start()
    raise ValueError(f"an HLO instruction with unbalanced parentheses: {text[:80]}")


def _sources(text: str) -> dict[str, str]:
    """Stack frame -> source line in the user's or our own code, from the tables after the module's header."""

    def table(title: str) -> dict[str, str]:
        match = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        return dict(row.split(" ", 1) for row in match[1].splitlines()) if match else {}

    def number(row: str, key: str) -> str:
        match = re.search(rf"\b{key}=(\d+)", row)
        return match[1] if match else ""

    files = {key: name.strip('"') for key, name in table("FileNames").items()}
    lines = {
        key: (files.get(number(row, "file_name_id"), ""), number(row, "line"))
        for key, row in table("FileLocations").items()
    }
    frames = table("StackFrames")
    sources = {}
    for key in frames:
        stack, frame = list[tuple[str, str]](), key
        while frame in frames and len(stack) < _MAX_FRAMES:
            stack.append(lines.get(number(frames[frame], "file_location_id"), ("", "")))
            # Parent ids are written plus 1; the id 1 stands for no parent.
            frame = str(int(number(frames[frame], "parent_frame_id") or 1) - 1)
        sources[key] = _innermost(stack)
    return sources


def _innermost(stack: Iterable[tuple[str, str]]) -> str:
    """The innermost line outside of libraries and helpers: `spmd/models/mlp.py:20`."""
    frames = [
        (re.sub(r"^.*/(?=(?:spmd|experiments)/)", "", file), line)
        for file, line in stack
        if file and not any(part in file for part in _LIBRARIES)
    ]
    frames = [frame for frame in frames if not frame[0].startswith(_HELPERS)] or frames
    if not frames:
        return ""
    file, line = frames[0]
    return f"{file if file.startswith(('spmd/', 'experiments/')) else file.split('/')[-1]}:{line}"
