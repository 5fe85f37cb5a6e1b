"""How often a conditional takes each of its branches, if its text shows it."""

from __future__ import annotations

from spmd.hardware.hlo.text import Computation, Instruction, Module

_SAME = ("copy", "bitcast", "reshape", "convert")
# (computation, instruction in it, parameters of the computation if it is a fusion: index -> their sources)
Source = tuple[Computation, Instruction, dict[int, "Source"]]


def fractions(
    conditional: Instruction, computation: Computation, module: Module
) -> list[tuple[str, float]]:
    """[(branch, fraction of the executions)] of a conditional on `counter % n == k`, which holds every n-th
    time; [] for any other.
    """
    branches = conditional.called
    predicate = computation.by_name[conditional.operands[0]]
    computation, condition, bound = _source((computation, predicate, {}), module)
    if len(branches) != 2 or condition.op != "compare":
        return []
    if condition.attribute(r"direction=(\w+)") not in ("EQ", "NE"):
        return []
    sides = [
        _source((computation, computation.by_name[n], bound), module) for n in condition.operands
    ]
    periods = [_period(side, module) for side in sides]
    constant = [side[1].op == "constant" for side in sides]
    period = periods[0] if constant[1] else periods[1] if constant[0] else None
    if period is None:
        return []
    # Indexed branches begin with that of false, those of a predicate with that of true.
    last_holds = "branch_computations" in conditional.attributes
    if condition.attribute(r"direction=(\w+)") == "NE":
        last_holds = not last_holds
    parts = (1 - 1 / period, 1 / period) if last_holds else (1 / period, 1 - 1 / period)
    return list(zip(branches, parts, strict=True))


def _period(source: Source, module: Module) -> int | None:
    """n of `x % n`; None for any other instruction."""
    computation, instruction, bound = source
    if instruction.op != "remainder":
        return None
    divisor = computation.by_name[instruction.operands[1]]
    _, constant, _ = _source((computation, divisor, bound), module)
    is_number = constant.op == "constant" and constant.arguments.isdecimal()
    return int(constant.arguments) if is_number else None


def _source(source: Source, module: Module) -> Source:
    """The instruction that computes a scalar, through copies and conversions, into and out of fusions."""
    computation, instruction, bound = source
    if instruction.op in _SAME:
        operand = computation.by_name[instruction.operands[0]]
        return _source((computation, operand, bound), module)
    if instruction.op == "fusion" and not instruction.shape.startswith("("):
        fused = module.computations[instruction.called[0]]
        operands = {
            i: (computation, computation.by_name[n], bound)
            for i, n in enumerate(instruction.operands)
        }
        return _source((fused, fused.root, operands), module)
    if instruction.op == "parameter" and int(instruction.arguments) in bound:
        return _source(bound[int(instruction.arguments)], module)
    return source
