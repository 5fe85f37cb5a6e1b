"""How often a while loop runs its body, read from its text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from spmd.hardware.hlo.text import Computation, Instruction, Module

_SAME = (
    *("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape"),
    "optimization-barrier",
)
# Executions of a loop with compare(counter, bound), by the distance from start to bound in steps.
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
    """An integer: element `index` of a loop's state plus `offset`; a constant if `index` is None."""

    index: int | None
    offset: int


Constants = Callable[
    [int], int | None
]  # element of a loop's state -> its value, None unless constant


def no_constants(index: int) -> int | None:
    """Constants outside of all loops, where there is no state."""
    return None


def constants(
    loop: Instruction, computation: Computation, module: Module, outer: Constants
) -> Constants:
    """The elements of the loop's state that are constant, as its body passes them on unchanged."""
    body = module.computations[loop.called[0]]

    def constant(index: int) -> int | None:
        if _step(body, index, module) != 0:
            return None
        state = computation.by_name[loop.operands[0]]
        initial = _initial(state, index, computation, module, outer)
        return None if initial is None else initial.offset

    return constant


def executions(
    loop: Instruction, computation: Computation, module: Module, outer: Constants = no_constants
) -> int | None:
    """The trip count of a loop, from its known_trip_count, or from its condition, initial state and step;
    None for a loop that depends on data. outer: constants of the loop whose body `computation` is.
    """
    if trip_count := loop.attribute(r"known_trip_count\D+(\d+)"):
        return int(trip_count)
    condition = module.computations[loop.attribute(r"condition=%([\w.\-]+)")]
    body = module.computations[loop.attribute(r"body=%([\w.\-]+)")]
    root, bound_parameters = condition.root, dict[int, Affine | None]()
    if root.op == "fusion":
        bound_parameters = {
            i: value(condition, name, module) for i, name in enumerate(root.operands)
        }
        condition = module.computations[root.called[0]]
        root = condition.root
    direction = root.attribute(r"direction=(\w+)")
    if root.op != "compare" or direction not in _FLIPPED:
        return None
    counter, bound = (value(condition, name, module, bound_parameters) for name in root.operands)
    if counter is not None and counter.index is None:
        counter, bound, direction = bound, counter, _FLIPPED[direction]
    if counter is None or counter.index is None or bound is None:
        return None
    state = computation.by_name[loop.operands[0]]
    start = _initial(state, counter.index, computation, module, outer)
    end = bound if bound.index is None else _initial(state, bound.index, computation, module, outer)
    step = _step(body, counter.index, module)
    if start is None or end is None or not step:
        return None
    distance = end.offset + (bound.offset if bound.index is not None else 0)
    distance = (distance - start.offset - counter.offset) / step
    return max(0, _EXECUTIONS[direction](distance))


def _initial(
    state: Instruction, index: int, computation: Computation, module: Module, outer: Constants
) -> Affine | None:
    """Element `index` of the state before the loop, if it is a constant."""
    initial = value(computation, state.name, module, element=index)
    if initial is None or initial.index is None:
        return initial
    constant = outer(initial.index)
    return None if constant is None else Affine(None, constant + initial.offset)


def _step(body: Computation, index: int, module: Module) -> int | None:
    """Amount that an execution of the body adds to element `index`; None if it is not a constant."""
    result = value(body, body.root.name, module, element=index)
    return result.offset if result is not None and result.index == index else None


def value(
    computation: Computation,
    name: str,
    module: Module,
    bound: Mapping[int, Affine | None] | None = None,
    element: int | None = None,
) -> Affine | None:
    """The value of an instruction as an affine expression; None if it is not one.

    bound: values of the parameters of a fusion. element: index into an instruction that is a tuple.
    """
    instruction = computation.by_name[name]
    evaluate = lambda operand, element=None: value(computation, operand, module, bound, element)
    if instruction.op == "constant":
        digits = instruction.arguments
        return Affine(None, int(digits)) if digits.lstrip("-").isdigit() else None
    if instruction.op == "parameter":
        if element is not None:
            return Affine(element, 0)
        return (bound or {}).get(int(instruction.arguments))
    if instruction.op == "get-tuple-element":
        return evaluate(instruction.operands[0], int(instruction.attribute(r"index=(\d+)")))
    if instruction.op == "tuple" and element is not None:
        return evaluate(instruction.operands[element])
    if instruction.op in _SAME:
        barrier = instruction.op == "optimization-barrier"
        return evaluate(instruction.operands[0], element if barrier else None)
    if instruction.op in ("add", "subtract"):
        left, right = map(evaluate, instruction.operands)
        return _sum(left, right, -1 if instruction.op == "subtract" else 1)
    if instruction.op == "fusion":
        operands = {i: evaluate(operand) for i, operand in enumerate(instruction.operands)}
        fused = module.computations[instruction.called[0]]
        return value(fused, fused.root.name, module, operands, element)
    return None


def _sum(left: Affine | None, right: Affine | None, sign: int) -> Affine | None:
    if left is None or right is None or (left.index is not None and right.index is not None):
        return None
    if sign < 0 and right.index is not None:
        return None
    index = right.index if left.index is None else left.index
    return Affine(index, left.offset + sign * right.offset)
