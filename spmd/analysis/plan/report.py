"""A plan as text and JSON: memory, collectives, step time, and the layouts of a search."""

from __future__ import annotations

import collections
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spmd.analysis.plan import cost, memory
from spmd.analysis.plan.collective import EstimatedCollective, ledger
from spmd.analysis.plan.compile import Compiled
from spmd.analysis.plan.facts import Facts
from spmd.analysis.plan.layout import Layout
from spmd.analysis.plan.scaling import Bound, Point
from spmd.analysis.plan.search import Candidate
from spmd.analysis.plan.shardings import new_table
from spmd.analysis.plan.tables import ROUNDS, is_tpu, padding_notes
from spmd.core import tree
from spmd.hardware import hlo
from spmd.hardware.targets import Target
from spmd.parallel.mesh import AXES

SHOWN = 10  # rows of a search
REASONS = 5  # kinds of rejection
TOO_LARGE = "needs more memory than a device has"
CALLS = 20  # collectives of a compiled program


class Plan(NamedTuple):
    """An experiment on a target.

    estimate: None if the speed of the target is not known. compiled: None if nothing was compiled. failed:
    the reason if the compilation failed, else "".
    """

    facts: Facts
    target: Target
    layout: Layout
    strategy: str
    memory: memory.EstimatedMemory
    collectives: list[EstimatedCollective]
    estimate: cost.Estimate | None
    compiled: Compiled | None = None
    failed: str = ""

    @property
    def fits(self) -> bool:
        """Whether the memory of a device suffices, by the compiler if it was asked, else by the estimate."""
        chip, compiled = self.target.chip, self.compiled
        if self.failed:
            return False
        if chip is None:
            return True
        if compiled is not None and compiled.how == "compiled":
            return compiled.memory.peak <= chip.memory
        return self.memory.peak <= memory.usable(chip.memory)

    def json(self) -> dict[str, Any]:
        """All fields as JSON types."""
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
    """(axes, kind) -> sum over a step, of the compiled program if there is one, else estimated."""
    return hlo.ledger(plan.compiled.program) if plan.compiled else ledger(plan.collectives)


# ---- text


def summary(plan: Plan) -> str:
    """All parts in short."""
    parts = [head(plan), "", _memory(plan), "", _ledger(plan)]
    if plan.estimate is not None:
        parts += ["", _time(plan.estimate), "", plan.estimate.bottleneck]
    elif plan.target.chip is None:
        parts += ["", f"step time: no speed is known for {plan.target.name}"]
    else:
        parts += ["", f"step time: no closed form covers strategy {plan.strategy}; compile it"]
    return "\n".join(parts)


def memory_view(plan: Plan) -> str:
    """Memory by part."""
    return "\n".join([head(plan), "", _memory(plan)])


def comms_view(plan: Plan) -> str:
    """Every collective: of the compiled program with its source line if there is one, else estimated."""
    parts = [head(plan), "", _ledger(plan)]
    if plan.compiled is not None:
        parts += ["", _calls(plan.compiled.program)]
    return "\n".join(parts)


def search_view(candidates: Sequence[Candidate], target: Target) -> str:
    """The fastest layouts that fit, the fastest one over each further axis, and the reasons of rejections."""
    fit = [c for c in candidates if c.fits and c.estimate]
    table = new_table("", "layout", ">step", ">MFU", ">memory", "bound by")
    places = range(min(SHOWN, len(fit)))
    for i in [*places, *sorted({best_of(fit, axis) for axis in AXES} - {*places, -1})]:
        each, estimate = fit[i], fit[i].estimate
        assert estimate
        table.add_row(
            str(i + 1),
            escape(str(each.layout)),
            seconds(estimate.step_seconds),
            f"{estimate.mfu:.1%}",
            tree.human_bytes(each.peak) + ("*" if each.compiled else ""),
            escape(estimate.bottleneck.split(" take ")[0]),
        )
    lines = [
        f"{len(candidates)} layouts on {target.name}: {len(fit)} fit; estimated, the fastest first",
        "",
        render(table),
    ]
    if any(each.compiled for each in fit[:SHOWN]):
        lines.append("* memory and collectives by the target's compiler")
    if verdict := pipelines(candidates):
        lines += ["", verdict]
    lines += ["", *_reasons([c.reason for c in candidates if not c.fits])]
    if fit:
        lines += ["", "select the first with: " + " ".join(fit[0].layout.words())]
    return "\n".join(lines)


def best_of(fit: Sequence[Candidate], axis: str) -> int:
    """Index of the first layout that shards over `axis`; -1 if there is none."""
    return next((i for i, each in enumerate(fit) if each.layout.size(axis) > 1), -1)


def pipelines(candidates: Sequence[Candidate]) -> str:
    """A sentence that compares the best pipeline with the best layout without one; "" if none was tried."""
    tried = [c for c in candidates if c.layout.stages > 1]
    fit = [c for c in candidates if c.fits and c.estimate]
    with_stages, without = (
        next((c for c in fit if (c.layout.stages > 1) is piped), None) for piped in (True, False)
    )
    if not tried or not (with_stages or without):
        return ""
    if with_stages is None:
        return "No pipeline fits."
    if without is None:
        return f"Only pipelines fit: the best is {with_stages.layout}."
    assert with_stages.estimate and without.estimate
    piped, plain = with_stages.estimate, without.estimate
    more = piped.step_seconds / plain.step_seconds - 1
    waits = piped.seconds["bubble"] / piped.step_seconds
    fsdp = "FSDP" if without.layout.size("fsdp") > 1 else "the best layout without stages"
    compares = "loses to" if more > 0 else "wins over"
    best, other = seconds(piped.step_seconds), seconds(plain.step_seconds)
    return (
        f"A pipeline {compares} {fsdp}: the best one ({with_stages.layout}) takes {best} per step,"
        f" {abs(more):.0%} {'more' if more > 0 else 'less'} than {other} ({without.layout});"
        f" its stages wait {waits:.0%} of the time."
    )


def scaling_view(points: Sequence[Point], bounds: Sequence[Bound]) -> str:
    """Weak and strong scaling, and the limits at which axes of the first target are communication-bound."""
    table = new_table(
        "scaling", "target", ">devices", ">batch", "layout", ">step", ">tokens/s", ">efficiency"
    )
    for point in points:
        estimate = point.estimate
        table.add_row(
            point.mode,
            point.target,
            str(point.num_devices),
            str(point.batch_size),
            escape(str(estimate.layout)),
            seconds(estimate.step_seconds),
            f"{estimate.tokens_per_second:,.0f}",
            f"{point.efficiency:.0%}",
        )
    return "\n".join([render(table), "", *map(str, bounds)])


def head(plan: Plan) -> str:
    method = "estimated"
    if plan.compiled is not None:
        method = f"{plan.compiled.how} in {plan.compiled.seconds:.0f} s"
    failed = f"\nnot compiled: {plan.failed}" if plan.failed else ""
    strategy = f", strategy {plan.strategy}" if plan.strategy != "auto" else ""
    return (
        f"{plan.facts.name} on {plan.target.name}: {plan.facts.num_params:,} parameters,"
        f" {plan.target.num_devices} devices, {plan.layout}{strategy}, {plan.facts.tokens:,}"
        f" {'tokens' if plan.facts.length > 1 else 'examples'} per step; {method}{failed}"
    )


def _memory(plan: Plan) -> str:
    table = new_table("memory of a device", ">estimated")
    for name, size in plan.memory._asdict().items():
        if size:
            table.add_row(name.replace("_", " "), tree.human_bytes(size))
    table.add_row("peak", tree.human_bytes(plan.memory.peak))
    lines = [render(table)]
    chip, compiled = plan.target.chip, plan.compiled
    if compiled is not None and compiled.how == "compiled":
        sizes = compiled.memory
        lines.append(
            f"compiled: peak {tree.human_bytes(sizes.peak)}, with arguments"
            f" {tree.human_bytes(sizes.arguments)} and temporaries {tree.human_bytes(sizes.temporaries)}"
        )
    if is_tpu(chip):
        lines += padding_notes(plan.facts.tables, plan.target.num_devices)
    if chip is not None and not plan.failed:
        verdict = "it fits" if plan.fits else "it does NOT fit"
        lines.append(f"{verdict}: a device has {tree.human_bytes(chip.memory)}")
    return "\n".join(lines)


def _ledger(plan: Plan) -> str:
    """Collectives by axis and kind; of the compiled program if there is one."""
    title = f"collectives per step ({plan.compiled.how if plan.compiled else 'estimated'})"
    table = new_table(title, "axis", ">count", ">bytes", ">sent by a device")
    for (axes, kind), each in sent(plan).items():
        sizes = tree.human_bytes(each.bytes), tree.human_bytes(each.wire_bytes)
        table.add_row(kind, " x ".join(axes) or "?", f"{each.count:g}", *sizes)
    if not table.row_count:
        return f"{title}: none"
    rounds = f"{ROUNDS} round for the lookups of each width of tables: a run's metrics count lookup_rounds"
    return render(table) + (f"\nassumed: {rounds}" if plan.facts.tables else "")


def _calls(program: hlo.CompiledProgram) -> str:
    table = new_table("collective", "axis", ">count", ">bytes", "dtype", "overlapped", "line")
    collectives = hlo.merge_alike(program.collectives)
    for c in collectives[:CALLS]:
        table.add_row(
            c.kind,
            " x ".join(c.axes) or "?",
            f"{c.count:g}",
            tree.human_bytes(c.bytes),
            c.dtype,
            "yes" if c.overlapped else "no",
            escape(c.source or c.op_name),
        )
    more = len(collectives) - CALLS
    return render(table) + (f"\nand {more} smaller ones" if more > 0 else "")


def _time(estimate: cost.Estimate) -> str:
    table = new_table("time of a step (estimated)", ">seconds", ">overlapped", ">share")
    step = estimate.step_seconds
    for name, spent in estimate.seconds.items():
        if name != "collectives":
            table.add_row(name, seconds(spent), "", f"{spent / step:.0%}")
    for name, (spent, exposed) in estimate.networks.items():
        hidden = seconds(spent - exposed)
        table.add_row(escape(name), seconds(exposed), hidden, f"{exposed / step:.0%}")
    throughput = f"{estimate.tokens_per_second:,.0f} tokens/s, MFU {estimate.mfu:.1%}"
    speed = f"{seconds(step)} per step, {throughput}"
    flops = (
        f"{estimate.model_flops:.3g} model FLOPs per step, {estimate.executed_flops:.3g} executed"
    )
    return f"{render(table)}\n{speed}; {flops}"


def seconds(value: float) -> str:
    """A duration as text: `12.3 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us" if value else "0"


def _reasons(reasons: Sequence[str]) -> list[str]:
    """The most frequent kinds of rejections, each with an example."""
    kinds = collections.defaultdict[str, list[str]](list)
    for reason in reasons:
        kinds[_kind(reason)].append(reason)
    most = sorted(kinds.items(), key=lambda item: -len(item[1]))[:REASONS]
    return [
        f"{len(equal)} rejected: {kind if kind == TOO_LARGE else equal[0]}"
        + (" (and similar ones)" if kind != TOO_LARGE and len(set(equal)) > 1 else "")
        for kind, equal in most
    ]


def _kind(reason: str) -> str:
    """The reason without its numbers and without the axis."""
    if reason.startswith("needs "):
        return TOO_LARGE
    return re.sub(r"mesh\.\w+=\d+|\(.*?\)|\d+", "", reason.split(";")[0])


def render(table: Table) -> str:
    """A table as plain lines."""
    out = io.StringIO()
    # In a notebook, rich would otherwise print HTML instead of writing to the file, or use colours.
    console = Console(
        file=out, width=240, highlight=False, force_jupyter=False, force_terminal=False
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
