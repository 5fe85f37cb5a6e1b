"""Pipeline schedules as tables: which microbatch goes forward and backward at which tick on which stage.

In a tick each stage does at most one forward and then one backward (slot form); what it makes reaches its
neighbour in the next tick. A table is data: the executor (execute.py) runs any that `check` lets through.
"""

# K ticks, S stages, m microbatches, v chunks of layers on each stage (virtual stages)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from spmd.core import fields

Kind = Literal["gpipe", "1f1b", "interleaved"]
IDLE = -1
Key = tuple[int, int]  # (virtual stage, microbatch)


class Timetable(NamedTuple):
    """forward, backward: int32 [K, S, 2], the (microbatch, chunk) of a tick on a stage, IDLE where there is
    none. Chunk c of stage s is virtual stage c S + s: layers go through the stages in turn, v times.
    """

    kind: str
    stages: int
    microbatches: int
    virtual: int
    forward: np.ndarray
    backward: np.ndarray

    @property
    def ticks(self) -> int:
        """Length of the table."""
        return len(self.forward)

    def slots(self, way: str) -> Iterator[tuple[int, int, int, int]]:
        """(tick, stage, microbatch, chunk) of all `forward` or all `backward`."""
        part = getattr(self, way)
        for tick, stage in np.argwhere(part[..., 0] != IDLE):
            microbatch, chunk = part[tick, stage]
            yield int(tick), int(stage), int(microbatch), int(chunk)


def make(
    kind: Kind, stages: int, microbatches: int, virtual: int = 1, *, stacks: int = 1
) -> Timetable:
    """The table of a schedule; ValueError for numbers that it cannot take.

    gpipe: all forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965): 2 (m + S - 1) ticks.
    1f1b: a backward as soon as it can be (Narayanan et al. 2019, PipeDream): m + 2 (S - 1) ticks.
    interleaved: 1f1b over v chunks on each stage (Narayanan et al. 2021, arXiv 2104.04473):
    v m + (v + 1) S - 2 ticks, each 1 / v as long.
    Of a model of several stacks (encoder, decoder) each stage has as many chunks of each, those of the first
    stack first: any kind is then a table of stacks x v chunks.
    """
    fields.check(
        stages >= 2,
        f"a pipeline has at least 2 stages, given mesh.stage={stages}; use --mesh.stage 2",
    )
    fields.check(microbatches >= 1, f"train.accumulate={microbatches} must be at least 1")
    if kind == "interleaved":
        fields.check(
            virtual >= 2,
            f"train.virtual_stages={virtual}: train.pipeline=interleaved needs at least 2; with 1 it is 1f1b",
        )
    virtual = num_chunks(kind, virtual, stacks)
    several = f"a model of {stacks} stacks" if stacks > 1 else "train.pipeline=interleaved"
    fields.check(
        virtual == 1 or microbatches % stages == 0,
        f"train.accumulate={microbatches} microbatches: {several} takes them in groups"
        f" of mesh.stage={stages}; use {fields.multiples(microbatches, stages)}"
        + (", or train.pipeline=1f1b" if stacks == 1 else ""),
    )
    num = virtual * microbatches  # of forwards on a stage
    # The first backward: once all forwards are done, or where its microbatch has just gone through.
    first = num + stages - 1 if kind == "gpipe" else virtual * stages - 1
    forward = np.full((first + num + stages - 1, stages, 2), IDLE, np.int32)
    backward = forward.copy()
    for stage in range(stages):
        for k in range(num):
            group, rest = divmod(k, virtual * stages)
            chunk, row = divmod(rest, stages)
            microbatch = group * stages + row
            forward[k + stage, stage] = microbatch, chunk
            backward[first + k + stages - 1 - stage, stage] = microbatch, virtual - 1 - chunk
    return Timetable(kind, stages, microbatches, virtual, forward, backward)


def num_chunks(kind: Kind, virtual: int, stacks: int = 1) -> int:
    """Chunks of layers on each stage: `virtual` of each stack if interleaved, else one of each."""
    return stacks * (virtual if kind == "interleaved" else 1)


def ticks(kind: Kind, stages: int, microbatches: int, virtual: int = 1, *, stacks: int = 1) -> int:
    """Length of a table by formula."""
    virtual = num_chunks(kind, virtual, stacks)
    if kind == "gpipe":
        return 2 * (virtual * microbatches + stages - 1)
    return virtual * microbatches + (virtual + 1) * stages - 2


def bubble(stages: int, microbatches: int, virtual: int = 1) -> float:
    """The part of a step in which a stage waits: (S - 1) / (v m + S - 1)."""
    return (stages - 1) / (virtual * microbatches + stages - 1)


def short(stages: int, microbatches: int, virtual: int = 1) -> str:
    """A warning where there are fewer microbatches than stages, else ""."""
    if microbatches >= stages:
        return ""
    waits = bubble(stages, microbatches, virtual)
    return (
        f"train.accumulate={microbatches} microbatches on mesh.stage={stages}: each stage waits {waits:.0%}"
        f" of the time; --train.accumulate {4 * stages} makes that {bubble(stages, 4 * stages, virtual):.0%}"
    )


def idle(table: Timetable, backward_cost: float = 2.0) -> float:
    """The part of the time in which a stage waits, counted in the table: a tick lasts as long as its busiest
    stage works. backward_cost: of a backward, in forwards.
    """
    works = (table.forward[..., 0] != IDLE) + backward_cost * (table.backward[..., 0] != IDLE)
    return float(1 - works.sum() / (table.stages * works.max(axis=1).sum()))


# ---- what is wrong with a table


def check(table: Timetable) -> None:
    """ValueError, with the tick and the stage, for a table that does something twice or not at all, that
    deadlocks, or that reads what is not there yet.
    """
    done = {way: _done(table, way) for way in ("forward", "backward")}
    for way, ticks_of in done.items():
        for virtual in range(table.stages * table.virtual):
            for microbatch in range(table.microbatches):
                if (virtual, microbatch) not in ticks_of:
                    chunk, stage = divmod(virtual, table.stages)
                    raise ValueError(
                        f"{table.kind}: work is left undone: by the last tick, {table.ticks - 1}, stage"
                        f" {stage} has had no {_what(table, way, microbatch, chunk)}"
                    )
    _check_deadlock(table)
    for way, ticks_of in done.items():
        for (virtual, microbatch), tick in ticks_of.items():
            for source, key in _needs(table, way, virtual, microbatch):
                # A backward may follow its own forward in one tick; a neighbour's work comes a tick later.
                made = done[source][key]
                if made - (source == "forward" and way == "backward") >= tick:
                    chunk, stage = divmod(virtual, table.stages)
                    what = _what(table, way, microbatch, chunk)
                    raise ValueError(
                        f"{table.kind}: tick {tick}, stage {stage}: {what} reads what is not there: stage"
                        f" {key[0] % table.stages} makes it at tick {made}"
                    )


def _what(table: Timetable, way: str, microbatch: int, chunk: int) -> str:
    of = f" through chunk {chunk}" if table.virtual > 1 else ""
    return f"{way} of microbatch {microbatch}{of}"


def _done(table: Timetable, way: str) -> dict[Key, int]:
    """The tick of each (virtual stage, microbatch)."""
    found: dict[Key, int] = {}
    for tick, stage, microbatch, chunk in table.slots(way):
        what = f"{table.kind}: tick {tick}, stage {stage}: {_what(table, way, microbatch, chunk)}"
        fields.check(
            0 <= microbatch < table.microbatches and 0 <= chunk < table.virtual,
            f"{what}: there are {table.microbatches} microbatches and {table.virtual} chunks of layers",
        )
        key = (chunk * table.stages + stage, microbatch)
        fields.check(key not in found, f"{what} a second time, after tick {found.get(key)}")
        found[key] = tick
    return found


def _needs(table: Timetable, way: str, virtual: int, microbatch: int) -> list[tuple[str, Key]]:
    """Prerequisites of a slot: [(direction, key)]."""
    if way == "forward":
        return [("forward", (virtual - 1, microbatch))] if virtual else []
    last = virtual == table.stages * table.virtual - 1
    above = [] if last else [("backward", (virtual + 1, microbatch))]
    return [("forward", (virtual, microbatch)), *above]


def _check_deadlock(table: Timetable) -> None:
    """Lets each stage work off its column, waiting where it must; ValueError when all wait for each other."""
    columns: list[list[tuple[int, str, Key]]] = [[] for _ in range(table.stages)]
    for tick in range(table.ticks):
        for stage, column in enumerate(columns):
            for way in ("forward", "backward"):
                microbatch, chunk = map(int, getattr(table, way)[tick, stage])
                if microbatch != IDLE:
                    column.append((tick, way, (chunk * table.stages + stage, microbatch)))
    ready: set[tuple[str, Key]] = set()
    at, moved = [0] * table.stages, True
    while moved:
        moved = False
        for stage, column in enumerate(columns):
            while at[stage] < len(column):
                _, way, key = column[at[stage]]
                if not ready.issuperset(_needs(table, way, *key)):
                    break
                ready.add((way, key))
                at[stage] += 1
                moved = True
    stuck = [(*columns[s][i], s) for s, i in enumerate(at) if i < len(columns[s])]
    if stuck:
        tick, way, key, stage = min(stuck)
        source, missing = next(n for n in _needs(table, way, *key) if n not in ready)
        what = _what(table, way, key[1], key[0] // table.stages)
        other = _what(table, source, missing[1], missing[0] // table.stages)
        raise ValueError(
            f"{table.kind}: deadlock: tick {tick}, stage {stage}: {what} waits for {other} on stage"
            f" {missing[0] % table.stages}, which waits for it"
        )


# ---- what the executor reads


class BufferedTable(NamedTuple):
    """A table with its buffers: each int32 [K, S]. x: slots of the inputs that a stage keeps until their
    backward; ct: of the gradients that reach it. _to: where what was sent in the tick before is put, before
    anything is read.
    """

    forward: Any  # microbatch, or IDLE
    forward_chunk: Any
    forward_x: Any
    backward: Any
    backward_chunk: Any
    backward_x: Any
    backward_ct: Any
    x_to: Any
    ct_to: Any


def program(table: Timetable) -> tuple[BufferedTable, int, int]:
    """(what the executor reads, slots for inputs, slots for gradients): as few as do; the table is checked.

    The first virtual stage keeps no input, since it looks it up again.
    """
    check(table)
    empty = np.full(table.forward.shape[:2], IDLE, np.int32)
    made = BufferedTable(*(empty.copy() for _ in BufferedTable._fields))
    for way in ("forward", "backward"):
        part = getattr(table, way)
        getattr(made, way)[:] = part[..., 0]
        getattr(made, f"{way}_chunk")[:] = np.maximum(part[..., 1], 0)
    forward, backward = _done(table, "forward"), _done(table, "backward")
    last = table.stages * table.virtual - 1
    inputs = {key: (forward[key[0] - 1, key[1]], backward[key]) for key in forward if key[0]}
    slots, num_inputs = _slots(inputs, table.stages)
    for key, slot in slots.items():
        stage = key[0] % table.stages
        made.x_to[inputs[key][0] + 1, stage] = slot
        made.forward_x[forward[key], stage] = made.backward_x[backward[key], stage] = slot
    gradients = {k: (backward[k[0] + 1, k[1]], backward[k]) for k in backward if k[0] < last}
    slots, num_gradients = _slots(gradients, table.stages)
    for key, slot in slots.items():
        stage = key[0] % table.stages
        made.ct_to[gradients[key][0] + 1, stage] = slot
        made.backward_ct[backward[key], stage] = slot
    return made, num_inputs, num_gradients


def _slots(lives: dict[Key, tuple[int, int]], stages: int) -> tuple[dict[Key, int], int]:
    """A slot on its stage for each (virtual stage, microbatch), and how many slots a stage has. lives: the
    tick in which it is sent, and that in which it is read for the last time, after which the slot is free.
    """
    found: dict[Key, int] = {}
    free_from: list[list[int]] = [[] for _ in range(stages)]
    for key, (put, read) in sorted(lives.items(), key=lambda item: item[1]):
        ends = free_from[key[0] % stages]
        slot = next((i for i, end in enumerate(ends) if end <= put), len(ends))
        ends[slot : slot + 1] = [read]
        found[key] = slot
    return found, max(map(len, free_from))


# ---- as a picture


def draw(table: Timetable, width: int = 160) -> str:
    """A line for each stage, a column for each tick: F3 the forward of microbatch 3, B3 its backward; with
    virtual stages F3.1, of chunk 1.
    """

    def cell(tick: int, stage: int) -> str:
        text = ""
        for letter, part in (("F", table.forward), ("B", table.backward)):
            microbatch, chunk = part[tick, stage]
            if microbatch != IDLE:
                text += f"{letter}{microbatch}" + (f".{chunk}" if table.virtual > 1 else "")
        return text or "."

    cells = [[cell(tick, stage) for tick in range(table.ticks)] for stage in range(table.stages)]
    wide = max(len(text) for row in cells for text in row)
    shown = max(1, (width - 9) // (wide + 1))
    lines = []
    for first in range(0, table.ticks, shown):
        part = range(first, min(first + shown, table.ticks))
        lines.append("tick     " + " ".join(f"{tick:<{wide}}" for tick in part).rstrip())
        for stage, row in enumerate(cells):
            lines.append(
                f"stage {stage:<2} " + " ".join(f"{row[tick]:<{wide}}" for tick in part).rstrip()
            )
        lines.append("")
    return "\n".join(lines[:-1])
