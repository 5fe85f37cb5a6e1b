"""Recognise all-reduces that the compilers for TPUs and GPUs rewrite after partitioning."""

from __future__ import annotations

from spmd.hardware.hlo.text import Computation, Instruction, num_elements

# Operations that pass an array on unchanged.
_SAME = ("get-tuple-element", "bitcast", "reshape", "transpose", "copy", "convert")


def is_scattered(all_reduce: Instruction, computation: Computation, group: int) -> bool:
    """Whether each device keeps only its own slice of the sum, or of a sum of such sums."""

    def sliced(name: str) -> bool:
        users = computation.users[name]
        return bool(users) and all(
            sliced(user.name)
            if user.op in _SAME
            else user.op == "dynamic-slice"
            and user.operands[0] == name
            and bool(computation.by_device.intersection(user.operands[1:]))
            and num_elements(user) * group == num_elements(computation.by_name[name])
            for user in users
        )

    names = [all_reduce.name, *(addition for addition, _ in _additions(all_reduce, computation))]
    return computation.root.name not in names and sliced(names[-1])


def is_merged(all_reduce: Instruction, computation: Computation) -> bool:
    """Whether a later all-reduce replaces this one: a sum of all-reduces is one all-reduce of the sum, which
    is counted as the last of them.
    """
    return any(
        computation.by_name[addition].operands[0] == operand
        for addition, operand in _additions(all_reduce, computation)
    )


def _additions(all_reduce: Instruction, computation: Computation) -> list[tuple[str, str]]:
    """(addition, operand that contains this all-reduce), for its additions to equal all-reduces, innermost
    first.
    """
    additions, name = list[tuple[str, str]](), all_reduce.name
    while len(users := computation.users[name]) == 1 and users[0].op in ("add", "copy"):
        if users[0].op == "add":
            first, second = users[0].operands
            other = second if first == name else first
            if first == second or not _is_sum(other, all_reduce, computation):
                break
            additions.append((users[0].name, name))
        name = users[0].name
    return additions


def _is_sum(name: str, all_reduce: Instruction, computation: Computation) -> bool:
    """Whether `name` is an all-reduce over the same groups, or a sum of such, with a single user."""
    other = computation.by_name[name]
    if len(computation.users[name]) != 1 or other.shape != all_reduce.shape:
        return False
    if other.op in ("add", "copy"):
        return all(_is_sum(operand, all_reduce, computation) for operand in other.operands)
    pattern = r"replica_groups=(.*?), (?:use_global|to_apply)"
    return other.op == "all-reduce" and other.attribute(pattern) == all_reduce.attribute(pattern)
