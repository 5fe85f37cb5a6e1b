"""What verify found: for the eye, as JSON, from Python."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from spmd.verify.compare import Leaf, Off

GROUPS = ("loss", "grads", "params", "opt_state", "other")
SHOWN = 5  # tensors that depart after the first


@dataclasses.dataclass(frozen=True)
class Fault:
    """Where the first step that departs does so. off: every tensor that differs, in the order of the step.

    axes: mesh axes that show it alone, at this size; of those `used`. padded: whether that step had padding.
    """

    step: int
    padded: bool
    off: list[Off]
    axes: list[str]
    used: list[str]

    @property
    def stage(self) -> str:
        """forward, gradient or update."""
        return self.off[0].stage

    @property
    def tensor(self) -> str:
        """The first tensor that differs: `activation layers/0`, `grads/head/bias`, `ema/head/bias`."""
        return self.off[0].name

    def __str__(self) -> str:
        name, leaf = self.tensor, self.off[0].leaf
        rows = ", the first with padded rows" if self.padded and self.step == 2 else ""
        if len(self.used) == 1:
            axes = f"axis {self.used[0]}"
        elif self.axes:
            axes = f"shown by {' and by '.join(self.axes)} alone"
        else:
            axes = f"by no axis alone, only by {' x '.join(self.used)} together"
        text = (
            f"departs at step {self.step}{rows}, in the {self.stage}: {name}, norm"
            f" {leaf.mesh_norm:.9g} instead of {leaf.norm:.9g} (difference {leaf.error:.1e} of it); {axes}"
        )
        if not leaf.copies:
            text += "\n  devices that should hold the same values of it do not: a sum over them is missing"
        rest = [off.name for off in self.off[1:]]
        if rest:
            more = f" and {len(rest) - SHOWN} more" if len(rest) > SHOWN else ""
            text += f"\n  after it: {', '.join(rest[:SHOWN])}{more}"
        return text


@dataclasses.dataclass
class Result:
    """One mesh. leaves: precision -> name -> the worst of all steps; skipped: why it cannot be cut."""

    mesh: str
    strategy: str
    skipped: str = ""
    fault: Fault | None = None
    leaves: dict[str, dict[str, Leaf]] = dataclasses.field(default_factory=dict)

    def add(self, precision: str, found: Mapping[str, Leaf]) -> None:
        """Keeps the worst of each leaf."""
        known = self.leaves.setdefault(precision, {})
        for name, leaf in found.items():
            if name not in known or not leaf.error <= known[name].error:
                known[name] = leaf

    def worst(self, precision: str, group: str) -> float | None:
        """The largest relative difference in a group of GROUPS; None when not compared."""
        errors = [
            x.error for name, x in self.leaves.get(precision, {}).items() if _in(name) == group
        ]
        return max(errors) if errors else None

    @property
    def sound(self) -> bool:
        """Neither skipped nor found to depart."""
        return not self.skipped and self.fault is None

    @property
    def verdict(self) -> str:
        """skipped, departs or proven."""
        return "skipped" if self.skipped else "departs" if self.fault else "proven"


def _in(name: str) -> str:
    top = name.split("/")[0]
    return "loss" if name == "metrics/loss" else top if top in GROUPS else "other"


@dataclasses.dataclass(frozen=True)
class Report:
    """steps: compared. tolerance: of every leaf in float64, which decides. own: the experiment's precision,
    reported beside it, and what its loss should keep to.
    """

    experiment: str
    steps: int
    tolerance: float
    own: str
    own_tolerance: float
    results: list[Result]

    @property
    def proven(self) -> bool:
        """Whether all meshes that can be cut agree, and there is one."""
        verdicts = {result.verdict for result in self.results}
        return "departs" not in verdicts and "proven" in verdicts

    def json(self) -> dict[str, Any]:
        """Everything, every leaf in it, as JSON types; a difference that is not finite is a string."""
        return {
            "experiment": self.experiment,
            "proven": self.proven,
            "steps": self.steps,
            "decides": "float64",
            "tolerance": self.tolerance,
            "own": {"precision": self.own, "tolerance_of_loss": self.own_tolerance},
            "meshes": [
                {
                    "mesh": result.mesh,
                    "strategy": result.strategy,
                    "verdict": result.verdict,
                    "skipped": result.skipped,
                    "fault": _plain_fault(result.fault),
                    "leaves": {
                        precision: {name: _plain(leaf) for name, leaf in leaves.items()}
                        for precision, leaves in result.leaves.items()
                    },
                }
                for result in self.results
            ],
        }

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=110, highlight=False)
        title = f"{self.experiment}, {self.steps} steps against one device: largest relative differences"
        table = Table(title=title, box=None, pad_edge=False, title_justify="left")
        beside = [] if self.own == "float64" else [f"{self.own} loss", "grads"]
        for column in ("mesh", "strategy", "loss", "grads", "params", "opt", "other", *beside, ""):
            table.add_column(column)
        for result in self.results:
            errors = [result.worst("float64", group) for group in GROUPS]
            if beside:
                errors += [result.worst(self.own, group) for group in ("loss", "grads")]
            cells = ["" if e is None else f"{e:.1e}" for e in errors]
            table.add_row(result.mesh, result.strategy, *cells, result.verdict)
        console.print(table)
        for result in self.results:
            if result.fault:
                console.print(f"{result.mesh} {result.fault}", soft_wrap=True)
            if result.skipped:
                console.print(f"{result.mesh} skipped: {result.skipped}", soft_wrap=True)
            if (loss := result.worst(self.own, "loss") or 0.0) > self.own_tolerance:
                console.print(
                    f"{result.mesh}: the {self.own} loss differs by {loss:.1e}, more than the"
                    f" {self.own_tolerance:.0e} that rounding makes",
                    soft_wrap=True,
                )
        if self.tolerance > 1e-9:
            console.print(
                "the model computes in a type of its own beside float64 parameters (a dtype in its"
                f" layers): decided at {self.tolerance:.0e} instead of 1e-9",
                soft_wrap=True,
            )
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _plain(leaf: Leaf) -> dict[str, Any]:
    safe = lambda x: x if abs(x) < float("inf") else str(x)
    return {k: safe(v) if isinstance(v, float) else v for k, v in leaf._asdict().items()}


def _plain_fault(fault: Fault | None) -> dict[str, Any] | None:
    if fault is None:
        return None
    return {
        "step": fault.step,
        "padded": fault.padded,
        "stage": fault.stage,
        "tensor": fault.tensor,
        "axes": fault.axes,
        "off": [{"stage": x.stage, "name": x.name} | _plain(x.leaf) for x in fault.off],
    }
