"""What a plan says: memory, collectives, step time, and the layouts of a search, as text and as JSON."""

from __future__ import annotations

import collections
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spmd import hlo, tree
from spmd.plan import comms, cost, memory
from spmd.plan.compile import Compiled
from spmd.plan.facts import Facts
from spmd.plan.layout import Layout
from spmd.plan.scaling import Bound, Point
from spmd.plan.search import Candidate
from spmd.plan.shardings import new_table
from spmd.plan.targets import Target

SHOWN = 10  # rows of a search
REASONS = 5  # kinds of rejection
CALLS = 20  # collectives of a compiled program


class Plan(NamedTuple):
    """An experiment on a target. estimate: None where nothing is known of the target's speed. compiled: None
    where nothing was compiled; failed: why not, when it was tried.
    """

    facts: Facts
    target: Target
    layout: Layout
    strategy: str
    memory: memory.Memory
    collectives: list[comms.Collective]
    estimate: cost.Estimate | None
    compiled: Compiled | None = None
    failed: str = ""

    @property
    def fits(self) -> bool:
        """Whether the memory of a device is enough, by the compiler where it says so, else by estimate."""
        chip, made = self.target.chip, self.compiled
        if self.failed:
            return False
        if chip is None:
            return True
        if made is not None and made.how == "compiled":
            return made.memory.peak <= chip.memory
        return self.memory.peak <= memory.usable(chip.memory)

    def json(self) -> dict[str, Any]:
        """As JSON types."""
        chip = self.target.chip
        return {
            "experiment": self.facts.name,
            "target": self.target.name,
            "devices": self.target.num_devices,
            "layout": self.layout.json(),
            "strategy": self.strategy,
            "memory_per_device": int(chip.memory) if chip else None,
            "fits": self.fits,
            "memory": self.memory.json(),
            "collectives": [each.json() for each in self.collectives],
            "estimate": self.estimate.json() if self.estimate else None,
            "compiled": self.compiled.json() if self.compiled else None,
            "failed": self.failed,
        }


def sent(plan: Plan) -> dict[hlo.Key, hlo.Total]:
    """(axes, kind) -> its sum over a step, of the compiled program where there is one."""
    made = plan.compiled
    return hlo.ledger(made.program) if made else comms.ledger(plan.collectives)


# ---- text


def summary(plan: Plan) -> str:
    """Everything at a glance."""
    parts = [_head(plan), "", _memory(plan), "", _ledger(plan)]
    if plan.estimate is not None:
        parts += ["", _time(plan.estimate), "", plan.estimate.bottleneck]
    else:
        parts += ["", f"step time: nothing is known of the speed of {plan.target.name}"]
    return "\n".join(parts)


def memory_view(plan: Plan) -> str:
    """Memory by part."""
    return "\n".join([_head(plan), "", _memory(plan)])


def comms_view(plan: Plan) -> str:
    """Every collective: of the compiled program with its line where there is one, and by the estimate."""
    parts = [_head(plan), "", _ledger(plan)]
    if plan.compiled is not None:
        parts += ["", _calls(plan.compiled.program)]
    return "\n".join(parts)


def search_view(found: Sequence[Candidate], target: Target) -> str:
    """The fastest that fit, and why others were rejected."""
    fit = [c for c in found if c.fits and c.estimate]
    table = new_table("", "layout", ">step", ">MFU", ">memory", "bound by")
    for i, each in enumerate(fit[:SHOWN], 1):
        made = each.estimate
        assert made
        table.add_row(
            str(i),
            escape(str(each.layout)),
            seconds(made.step_seconds),
            f"{made.mfu:.1%}",
            tree.human_bytes(each.peak) + ("*" if each.compiled else ""),
            escape(made.bottleneck.split(" take ")[0]),
        )
    lines = [
        f"{len(found)} layouts on {target.name}: {len(fit)} fit; estimated, the fastest first",
        "",
        rendered(table),
    ]
    if any(each.compiled for each in fit[:SHOWN]):
        lines.append("* compiled: the compiler's own memory and collectives")
    reasons = collections.Counter(_kind(c.reason) for c in found if not c.fits)
    lines += ["", *(f"{n} rejected: {why}" for why, n in reasons.most_common(REASONS))]
    if fit:
        lines += ["", "the first: " + " ".join(fit[0].layout.words())]
    return "\n".join(lines)


def scaling_view(points: Sequence[Point], bounds: Sequence[Bound]) -> str:
    """Weak and strong scaling, and where the axes of the first target become bound by communication."""
    table = new_table(
        "scaling", "target", ">devices", ">batch", "layout", ">step", ">tokens/s", ">efficiency"
    )
    for point in points:
        made = point.estimate
        table.add_row(
            point.mode,
            point.target,
            str(point.num_devices),
            str(point.batch_size),
            escape(str(made.layout)),
            seconds(made.step_seconds),
            f"{made.tokens_per_second:,.0f}",
            f"{point.efficiency:.0%}",
        )
    return "\n".join([rendered(table), "", *map(str, bounds)])


def _head(plan: Plan) -> str:
    how = "estimated"
    if plan.compiled is not None:
        made = plan.compiled
        how = f"{made.how} in {made.seconds:.0f} s"
    failed = f"\nnot compiled: {plan.failed}" if plan.failed else ""
    return (
        f"{plan.facts.name} on {plan.target.name}: {plan.facts.num_params:,} parameters,"
        f" {plan.target.num_devices} devices, {plan.layout}, {plan.facts.tokens:,}"
        f" {'tokens' if plan.facts.length > 1 else 'examples'} a step; {how}{failed}"
    )


def _memory(plan: Plan) -> str:
    table = new_table("memory of a device", ">estimated")
    for name, size in plan.memory._asdict().items():
        if size:
            table.add_row(name.replace("_", " "), tree.human_bytes(size))
    table.add_row("peak", tree.human_bytes(plan.memory.peak))
    lines = [rendered(table)]
    chip, made = plan.target.chip, plan.compiled
    if made is not None and made.how == "compiled":
        held = made.memory
        lines.append(
            f"compiled: peak {tree.human_bytes(held.peak)}, of it arguments"
            f" {tree.human_bytes(held.arguments)} and temporaries {tree.human_bytes(held.temporaries)}"
        )
    if chip is not None and not plan.failed:
        said = "it fits" if plan.fits else "it does NOT fit"
        lines.append(f"{said}: a device has {tree.human_bytes(chip.memory)}")
    return "\n".join(lines)


def _ledger(plan: Plan) -> str:
    """By axis and kind; of the compiled program where there is one."""
    made = plan.compiled
    title = f"collectives a step ({made.how if made else 'estimated'})"
    table = new_table(title, "axis", ">count", ">bytes", ">sent by a device")
    for (axes, kind), each in sent(plan).items():
        sizes = tree.human_bytes(each.bytes), tree.human_bytes(each.wire_bytes)
        table.add_row(kind, " x ".join(axes) or "?", f"{each.count:g}", *sizes)
    return rendered(table) if table.row_count else f"{title}: none"


def _calls(program: hlo.Program) -> str:
    table = new_table("collective", "axis", ">count", ">bytes", "dtype", "hidden", "line")
    found = hlo.alike(program.collectives)
    for c in found[:CALLS]:
        table.add_row(
            c.kind,
            " x ".join(c.axes) or "?",
            f"{c.count:g}",
            tree.human_bytes(c.bytes),
            c.dtype,
            "yes" if c.overlapped else "no",
            escape(c.source or c.op_name),
        )
    more = len(found) - CALLS
    return rendered(table) + (f"\nand {more} smaller ones" if more > 0 else "")


def _time(made: cost.Estimate) -> str:
    table = new_table("time of a step (estimated)", ">seconds", ">hidden", ">share")
    step = made.step_seconds
    for name, spent in made.seconds.items():
        if name != "collectives":
            table.add_row(name, seconds(spent), "", f"{spent / step:.0%}")
    for name, (whole, shown) in made.networks.items():
        table.add_row(escape(name), seconds(shown), seconds(whole - shown), f"{shown / step:.0%}")
    speed = f"{seconds(step)} a step, {made.tokens_per_second:,.0f} tokens/s, MFU {made.mfu:.1%}"
    flops = f"{made.model_flops:.3g} model FLOPs a step, {made.executed_flops:.3g} executed"
    return f"{rendered(table)}\n{speed}; {flops}"


def seconds(value: float) -> str:
    """`12.3 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us" if value else "0"


def _kind(reason: str) -> str:
    """A reason without its numbers."""
    return "needs more memory than a device has" if reason.startswith("needs ") else reason


def rendered(table: Table) -> str:
    """A table as plain lines."""
    out = io.StringIO()
    # A notebook would take the table as HTML, past the file, or with colours.
    console = Console(
        file=out, width=240, highlight=False, force_jupyter=False, force_terminal=False
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
