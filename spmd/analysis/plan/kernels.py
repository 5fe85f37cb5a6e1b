"""The kernels of a program compiled for a TPU, by its compiler's cycles: a profile without a chip."""

from __future__ import annotations

from rich.markup import escape

from spmd.analysis.plan.report import Plan, head, render, seconds
from spmd.analysis.plan.shardings import new_table
from spmd.core import tree
from spmd.hardware import hlo
from spmd.hardware.chips import Chip

SHOWN = 20  # kernels


def kernels_view(plan: Plan) -> str:
    """The kernels of a program compiled for a TPU, by the compiler's cycles."""
    chip, compiled = plan.target.chip, plan.compiled
    if chip is None or compiled is None or not compiled.program.cycles:
        why = plan.failed or f"{plan.target.name} is not compiled by a compiler that counts cycles"
        return "\n".join([head(plan), "", f"no kernels to show: {why}"])
    return "\n".join([head(plan), "", _kernels(compiled.program, chip)])


def _kernels(program: hlo.CompiledProgram, chip: Chip) -> str:
    table = new_table(
        "kernel", ">count", ">M cycles", ">share", ">of ideal", ">bytes", ">GB/s", "line"
    )
    ranked = hlo.rank(program.kernels)
    counted = [each for each in ranked if each.cycles >= 0]
    for each in counted[:SHOWN]:
        spent = each.step_cycles / chip.clock
        ideal = each.flops * each.count / chip.flops["bfloat16"]
        moved = each.bytes * each.count
        table.add_row(
            each.op,
            f"{each.count:g}",
            f"{each.step_cycles / 1e6:,.1f}",
            f"{each.step_cycles / program.cycles:.1%}",
            f"{ideal / spent:.0%}" if ideal and spent else "",
            tree.human_bytes(moved),
            f"{moved / spent / 1e9:,.0f}" if spent else "",
            escape(each.source or each.op_name),
        )
    uncounted = [each for each in ranked if each.cycles < 0]
    ideal = sum(each.flops * each.count for each in counted) / chip.flops["bfloat16"]
    spent = program.cycles / chip.clock
    lines = [
        render(table),
        f"{program.cycles / 1e6:,.1f} M cycles per step in {len(program.kernels)} kernels:"
        f" {seconds(spent)} at {chip.clock / 1e9:.2f} GHz; their matmuls alone would take"
        f" {ideal / spent:.0%} of it at the peak",
    ]
    if uncounted:
        origins = dict.fromkeys(each.source or each.op for each in uncounted)
        lines.append(f"not counted by the compiler: {', '.join(list(origins)[:6])}")
    return "\n".join(lines)
