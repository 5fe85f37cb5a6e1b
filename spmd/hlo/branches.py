"""How often a conditional takes each of its branches, where its text says so."""

from __future__ import annotations

from spmd.hlo.text import Computation, Instruction, Module

_SAME = ("copy", "bitcast", "reshape", "convert")
# The last: parameters of a fusion -> what they are.
Place = tuple[Computation, Instruction, dict[int, "Place"]]


def taken(one: Instruction, inside: Computation, module: Module) -> list[tuple[str, float]]:
    """[(branch, part of the executions)] of a conditional on `counter % n == k`, which holds every n-th time;
    [] for any other.
    """
    names = one.called
    place = _source((inside, inside.by_name[one.operands[0]], {}), module)
    inside, condition, bind = place
    if len(names) != 2 or condition.op != "compare":
        return []
    if condition.attribute(r"direction=(\w+)") not in ("EQ", "NE"):
        return []
    sides = [_source((inside, inside.by_name[n], bind), module) for n in condition.operands]
    periods = [_period(side, module) for side in sides]
    constant = [side[1].op == "constant" for side in sides]
    period = periods[0] if constant[1] else periods[1] if constant[0] else None
    if period is None:
        return []
    # Branches by number begin with that of false, those of a predicate with that of true.
    holds = "branch_computations" in one.attributes
    if condition.attribute(r"direction=(\w+)") == "NE":
        holds = not holds
    parts = (1 - 1 / period, 1 / period) if holds else (1 / period, 1 - 1 / period)
    return list(zip(names, parts, strict=True))


def _period(place: Place, module: Module) -> int | None:
    """n of `x % n`."""
    inside, one, bind = place
    if one.op != "remainder":
        return None
    _, by, _ = _source((inside, inside.by_name[one.operands[1]], bind), module)
    return int(by.inside) if by.op == "constant" and by.inside.isdecimal() else None


def _source(place: Place, module: Module) -> Place:
    """Where a scalar is made: through copies and conversions, into fusions and out of them."""
    inside, one, bind = place
    if one.op in _SAME:
        return _source((inside, inside.by_name[one.operands[0]], bind), module)
    if one.op == "fusion" and not one.shape.startswith("("):
        within = module.computations[one.called[0]]
        given = {i: (inside, inside.by_name[n], bind) for i, n in enumerate(one.operands)}
        return _source((within, within.root, given), module)
    if one.op == "parameter" and int(one.inside) in bind:
        return _source(bind[int(one.inside)], module)
    return place
