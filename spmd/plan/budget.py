"""A contract of an experiment: what its compiled step may communicate."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING

from spmd.fields import check, closest
from spmd.mesh import AXES

if TYPE_CHECKING:
    from spmd.hlo import Collective, Program

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", 1)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommsBudget:
    """What the step may send, checked by `run.py plan --check`: a contract that a test can hold."""

    forbid: tuple[str, ...] = ()
    """Kinds of collectives that may not occur, as all-to-all."""
    max_bytes: dict[str, str] = dataclasses.field(default_factory=dict)
    """Mesh axis -> the most that a device may send over it in a step: {"replica": "50 MB"}."""

    def __post_init__(self) -> None:
        for kind in self.forbid:
            from spmd.hlo import KINDS  # with numpy, which a command line without it need not load

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
            parsed(text)

    @property
    def asks(self) -> bool:
        """Whether there is anything to hold."""
        return bool(self.forbid or self.max_bytes)


def parsed(text: str) -> int:
    """Bytes of `50 MB` (1000s) or `50 MiB` (1024s)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(\w*)", text.strip())
    check(
        found is not None and found[2] in UNITS,
        f"budget.max_bytes: {text!r} must be a number of bytes, as '50 MB' or '1.5 GiB'",
    )
    assert found
    return int(float(found[1]) * UNITS[found[2]])


def broken(budget: CommsBudget, program: Program) -> list[str]:
    """A line for each term that the compiled program breaks, with the collectives that break it."""
    lines = []
    for kind in budget.forbid:
        found = [c for c in program.collectives if c.kind == kind]
        if found:
            lines.append(
                f"{kind} is forbidden, the step has {sum(c.count for c in found):g}: {_named(found)}"
            )
    for axis, text in budget.max_bytes.items():
        found = [c for c in program.collectives if axis in c.axes]
        sent, most = math.ceil(sum(c.count * c.wire_bytes for c in found)), parsed(text)
        if sent > most:
            lines.append(
                f"over {axis} a device may send {most:,} bytes in a step ({text}), it sends {sent:,}:"
                f" {_named(found)}"
            )
    return lines


def _named(found: list[Collective]) -> str:
    """The largest of them, each with its line."""
    from spmd.hlo import alike

    joined = alike(found)
    said = [
        f"{c.kind} of {c.bytes:,} bytes over {' x '.join(c.axes) or '?'}"
        f"{f', {c.count:g} times' if c.count != 1 else ''} ({c.source or c.op_name})"
        for c in joined[:3]
    ]
    more = f" and {len(joined) - 3} more" if len(joined) > 3 else ""
    return "; ".join(said) + more
