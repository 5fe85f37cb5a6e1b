"""Communication budget of an experiment: limits on the collectives of its compiled step."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING

from spmd.core.fields import check, closest
from spmd.parallel.mesh import AXES

if TYPE_CHECKING:
    from spmd.hardware.hlo import Collective, CompiledProgram

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", 1)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommsBudget:
    """Limits on the communication of a step, checked by `run.py plan --check`."""

    forbid: tuple[str, ...] = ()
    """Kinds of collectives that must not occur, for example all-to-all."""
    max_bytes: dict[str, str] = dataclasses.field(default_factory=dict)
    """Mesh axis -> the most bytes that a device may send over it in a step: {"replica": "50 MB"}."""

    def __post_init__(self) -> None:
        for kind in self.forbid:
            from spmd.hardware.hlo import KINDS  # imported here, since it loads numpy

            check(
                kind in KINDS,
                f"budget.forbid: unknown kind {kind!r}.{closest(kind, KINDS)} Known: {', '.join(KINDS)}",
            )
        for axis, text in self.max_bytes.items():
            check(
                axis in AXES,
                f"budget.max_bytes: unknown mesh axis {axis!r}.{closest(axis, AXES)} Known:"
                f" {', '.join(AXES)}",
            )
            parse_bytes(text)

    @property
    def limits(self) -> bool:
        """Whether the budget sets any limit."""
        return bool(self.forbid or self.max_bytes)


def parse_bytes(text: str) -> int:
    """Number of bytes of `50 MB` (powers of 1000) or `50 MiB` (powers of 1024)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(\w*)", text.strip())
    check(
        match is not None and match[2] in UNITS,
        f"budget.max_bytes: {text!r} must be a number of bytes, for example '50 MB' or '1.5 GiB'",
    )
    assert match
    return int(float(match[1]) * UNITS[match[2]])


def find_violations(budget: CommsBudget, program: CompiledProgram) -> list[str]:
    """A line for each limit that the compiled program exceeds, with the collectives that do so."""
    lines = []
    for kind in budget.forbid:
        forbidden = [c for c in program.collectives if c.kind == kind]
        if forbidden:
            count = sum(c.count for c in forbidden)
            lines.append(f"{kind} is forbidden, the step has {count:g}: {_largest(forbidden)}")
    for axis, text in budget.max_bytes.items():
        crossing = [c for c in program.collectives if axis in c.axes]
        sent = math.ceil(sum(c.count * c.wire_bytes for c in crossing))
        limit = parse_bytes(text)
        if sent > limit:
            lines.append(
                f"over {axis} a device may send {limit:,} bytes in a step ({text}), it sends {sent:,}:"
                f" {_largest(crossing)}"
            )
    return lines


def _largest(collectives: list[Collective]) -> str:
    """The three largest collectives, each with its source line."""
    from spmd.hardware.hlo import merge_alike

    merged_collectives = merge_alike(collectives)
    lines = [
        f"{c.kind} of {c.bytes:,} bytes over {' x '.join(c.axes) or '?'}"
        f"{f', {c.count:g} times' if c.count != 1 else ''} ({c.source or c.op_name})"
        for c in merged_collectives[:3]
    ]
    suffix = f" and {len(merged_collectives) - 3} more" if len(merged_collectives) > 3 else ""
    return "; ".join(lines) + suffix
