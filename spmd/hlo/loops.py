"""How often a while-loop runs its body, read from its text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from spmd.hlo.text import Computation, Instruction, Module

_SAME = (
    *("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape"),
    "optimization-barrier",
)
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


Known = Callable[[int], int | None]  # element of the state of the loop around -> its constant value


def nothing(index: int) -> int | None:
    """Outside of all loops there is no state."""
    return None


def unchanged(loop: Instruction, around: Computation, module: Module, outer: Known) -> Known:
    """What the body of `loop` may know of its state: constants that it passes on as they are."""
    body = module.computations[loop.called[0]]

    def known(index: int) -> int | None:
        if _step(body, index, module) != 0:
            return None
        first = _first(around.by_name[loop.operands[0]], index, around, module, outer)
        return None if first is None else first.offset

    return known


def executions(
    loop: Instruction, around: Computation, module: Module, outer: Known = nothing
) -> int | None:
    """The known trip count, or what condition, first state and step say; None for a loop that ends by its
    data. outer: of the state of the loop whose body `around` is.
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
    start = _first(first, counter.index, around, module, outer)
    end = bound if bound.index is None else _first(first, bound.index, around, module, outer)
    step = _step(body, counter.index, module)
    if start is None or end is None or not step:
        return None
    distance = end.offset + (bound.offset if bound.index is not None else 0)
    distance = (distance - start.offset - counter.offset) / step
    return max(0, _EXECUTIONS[direction](distance))


def _first(
    state: Instruction, index: int, around: Computation, module: Module, outer: Known
) -> Affine | None:
    """Element `index` of the state before the loop, if it is a constant."""
    found = value(around, state.name, module, element=index)
    if found is None or found.index is None:
        return found
    constant = outer(found.index)
    return None if constant is None else Affine(None, constant + found.offset)


def _step(body: Computation, index: int, module: Module) -> int | None:
    """What one execution adds to element `index`."""
    found = value(body, body.root.name, module, element=index)
    return found.offset if found is not None and found.index == index else None


def value(
    inside: Computation,
    name: str,
    module: Module,
    bind: Mapping[int, Affine | None] | None = None,
    element: int | None = None,
) -> Affine | None:
    """An instruction as an affine expression, if it is one.

    bind: of the parameters of a fusion. element: which, of an instruction that is a tuple.
    """
    one = inside.by_name[name]
    again = lambda operand, element=None: value(inside, operand, module, bind, element)
    if one.op == "constant":
        return Affine(None, int(one.inside)) if one.inside.lstrip("-").isdigit() else None
    if one.op == "parameter":
        return Affine(element, 0) if element is not None else (bind or {}).get(int(one.inside))
    if one.op == "get-tuple-element":
        return again(one.operands[0], int(one.attribute(r"index=(\d+)")))
    if one.op == "tuple" and element is not None:
        return again(one.operands[element])
    if one.op in _SAME:
        return again(one.operands[0], element if one.op == "optimization-barrier" else None)
    if one.op in ("add", "subtract"):
        left, right = map(again, one.operands)
        return _sum(left, right, -1 if one.op == "subtract" else 1)
    if one.op == "fusion":
        given = {i: again(operand) for i, operand in enumerate(one.operands)}
        called = module.computations[one.called[0]]
        return value(called, called.root.name, module, given, element)
    return None


def _sum(left: Affine | None, right: Affine | None, sign: int) -> Affine | None:
    if left is None or right is None or (left.index is not None and right.index is not None):
        return None
    if sign < 0 and right.index is not None:
        return None
    index = right.index if left.index is None else left.index
    return Affine(index, left.offset + sign * right.offset)
