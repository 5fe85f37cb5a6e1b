"""How often a while-loop runs its body, read from its text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from spmd.hlo.text import Computation, Instruction, Module

_SAME = ("copy", "bitcast", "convert", "reshape")
# compare(counter, bound) -> executions, by the distance from start to bound in steps
_EXECUTIONS = {
    "LT": math.ceil,
    "GT": math.ceil,
    "NE": math.ceil,
    "LE": lambda distance: math.floor(distance) + 1,
    "GE": lambda distance: math.floor(distance) + 1,
}
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class Affine:
    """An integer: element `index` of the loop's state plus `offset`; without index a constant."""

    index: int | None
    offset: int


def executions(loop: Instruction, around: Computation, module: Module) -> int | None:
    """The known trip count, or what condition, first state and step say; None for a loop that ends by its
    data.
    """
    if known := loop.attribute(r"known_trip_count\D+(\d+)"):
        return int(known)
    condition = module.computations[loop.attribute(r"condition=%([\w.\-]+)")]
    body = module.computations[loop.attribute(r"body=%([\w.\-]+)")]
    root, bind = condition.root, dict[int, Affine | None]()
    if root.op == "fusion":
        bind = {i: value(condition, name, module) for i, name in enumerate(root.operands)}
        condition = module.computations[root.called[0]]
        root = condition.root
    direction = root.attribute(r"direction=(\w+)")
    if root.op != "compare" or direction not in _FLIPPED:
        return None
    counter, bound = (value(condition, name, module, bind) for name in root.operands)
    if counter is not None and counter.index is None:
        counter, bound, direction = bound, counter, _FLIPPED[direction]
    if counter is None or counter.index is None or bound is None:
        return None
    first = around.by_name[loop.operands[0]]
    start = _first(first, counter.index, around, module)
    end = bound if bound.index is None else _first(first, bound.index, around, module)
    step = _step(body, counter.index, module)
    if start is None or end is None or not step:
        return None
    distance = end.offset + (bound.offset if bound.index is not None else 0)
    distance = (distance - start.offset - counter.offset) / step
    return max(0, _EXECUTIONS[direction](distance))


def _first(state: Instruction, index: int, around: Computation, module: Module) -> Affine | None:
    """Element `index` of the state before the loop, if it is a constant."""
    if state.op != "tuple":
        return None
    found = value(around, state.operands[index], module)
    return found if found is not None and found.index is None else None


def _step(body: Computation, index: int, module: Module) -> int | None:
    """What one execution adds to element `index`."""
    if body.root.op != "tuple":
        return None
    found = value(body, body.root.operands[index], module)
    return found.offset if found is not None and found.index == index else None


def value(
    inside: Computation,
    name: str,
    module: Module,
    bind: Mapping[int, Affine | None] | None = None,
) -> Affine | None:
    """An instruction as an affine expression, if it is one; bind: of the parameters of a fusion."""
    one = inside.by_name[name]
    again = lambda operand: value(inside, operand, module, bind)
    if one.op == "constant":
        return Affine(None, int(one.inside)) if one.inside.lstrip("-").isdigit() else None
    if one.op == "parameter":
        return (bind or {}).get(int(one.inside))
    if one.op == "get-tuple-element":
        source = inside.by_name[one.operands[0]]
        if source.op == "parameter":
            return Affine(int(one.attribute(r"index=(\d+)")), 0)
        return (
            again(source.operands[int(one.attribute(r"index=(\d+)"))])
            if source.op == "tuple"
            else None
        )
    if one.op in _SAME:
        return again(one.operands[0])
    if one.op in ("add", "subtract"):
        left, right = map(again, one.operands)
        if left is None or right is None:
            return None
        if one.op == "subtract":
            return Affine(left.index, left.offset - right.offset) if right.index is None else None
        if left.index is not None and right.index is not None:
            return None
        index = right.index if left.index is None else left.index
        return Affine(index, left.offset + right.offset)
    if one.op == "fusion":
        given = {i: again(operand) for i, operand in enumerate(one.operands)}
        called = module.computations[one.called[0]]
        return value(called, called.root.name, module, given)
    return None
