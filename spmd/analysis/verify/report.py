"""The result of verify as text, as JSON and as Python objects."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from spmd.analysis.verify.compare import ComparedLeaf, Difference

GROUPS = ("loss", "grads", "params", "opt_state", "other")
SHOWN = 5  # further tensors that differ


@dataclasses.dataclass(frozen=True)
class Fault:
    """The first step that differs. differences: every tensor that differs, in the order of computation.

    axes: those of the `used` mesh axes that each suffice to show it, at their size. padded: whether the batch
    of that step had padding.
    """

    step: int
    padded: bool
    differences: list[Difference]
    axes: list[str]
    used: list[str]

    @property
    def stage(self) -> str:
        """forward, gradient or update."""
        return self.differences[0].stage

    @property
    def tensor(self) -> str:
        """The first tensor that differs: `activation layers/0`, `grads/head/bias`, `ema/head/bias`."""
        return self.differences[0].name

    def __str__(self) -> str:
        name, leaf = self.tensor, self.differences[0].leaf
        rows = ", the first with padded rows" if self.padded and self.step == 2 else ""
        if len(self.used) == 1:
            axes = f"axis {self.used[0]}"
        elif self.axes:
            axes = (
                f"{' and '.join(self.axes)} each suffice"
                if len(self.axes) > 1
                else f"axis {self.axes[0]} suffices"
            )
        else:
            axes = f"no single axis suffices, only {' x '.join(self.used)} together"
        text = (
            f"differs at step {self.step}{rows}, in the {self.stage}: {name}, norm"
            f" {leaf.mesh_norm:.9g} instead of {leaf.norm:.9g} (relative difference {leaf.error:.1e}); {axes}"
        )
        if not leaf.copies:
            text += "\n  its replicas hold different values: an all-reduce over them is missing"
        rest = [difference.name for difference in self.differences[1:]]
        if rest:
            more = f" and {len(rest) - SHOWN} more" if len(rest) > SHOWN else ""
            text += f"\n  after it: {', '.join(rest[:SHOWN])}{more}"
        return text


@dataclasses.dataclass
class MeshResult:
    """Result of one mesh. leaves: precision -> name -> the largest difference of all steps. skipped: why the
    mesh does not fit, "" if it does.
    """

    mesh: str
    strategy: str
    skipped: str = ""
    fault: Fault | None = None
    leaves: dict[str, dict[str, ComparedLeaf]] = dataclasses.field(default_factory=dict)

    def add(self, precision: str, leaves: Mapping[str, ComparedLeaf]) -> None:
        """Records the leaves of a step; keeps the largest difference of each."""
        worst = self.leaves.setdefault(precision, {})
        for name, leaf in leaves.items():
            if name not in worst or not leaf.error <= worst[name].error:
                worst[name] = leaf

    def worst(self, precision: str, group: str) -> float | None:
        """The largest relative difference in a group of GROUPS; None when not compared."""
        errors = [
            leaf.error
            for name, leaf in self.leaves.get(precision, {}).items()
            if _group(name) == group
        ]
        return max(errors) if errors else None

    @property
    def sound(self) -> bool:
        """Neither skipped nor different."""
        return not self.skipped and self.fault is None

    @property
    def verdict(self) -> str:
        """skipped, differs or verified."""
        return "skipped" if self.skipped else "differs" if self.fault else "verified"


def _group(name: str) -> str:
    top = name.split("/")[0]
    return "loss" if name == "metrics/loss" else top if top in GROUPS else "other"


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """The comparison of an experiment with one device.

    steps: number of steps compared. tolerance: bound of every leaf in float64, which decides. precision: the
    one that the experiment trains in, reported as well; loss_tolerance: expected difference of its loss.
    """

    experiment: str
    steps: int
    tolerance: float
    precision: str
    loss_tolerance: float
    results: list[MeshResult]

    @property
    def verified(self) -> bool:
        """Whether at least one mesh fits, and all that fit agree within the tolerance at every step."""
        verdicts = {result.verdict for result in self.results}
        return "differs" not in verdicts and "verified" in verdicts

    @property
    def conclusion(self) -> str:
        """How many meshes were verified, over how many steps and within which bound."""
        counted = [result for result in self.results if not result.skipped]
        sound = sum(result.sound for result in counted)
        title = "verified" if self.verified else "NOT verified"
        return (
            f"{title}: {sound} of {len(counted)} meshes agree with one device over {self.steps} steps, every"
            f" tensor within {self.tolerance:.0e} in float64"
        )

    def json(self) -> dict[str, Any]:
        """Everything, every leaf included, as JSON types; a difference that is not finite is a string."""
        return {
            "experiment": self.experiment,
            "verified": self.verified,
            "steps": self.steps,
            "decides": "float64",
            "tolerance": self.tolerance,
            "precision": {"name": self.precision, "loss_tolerance": self.loss_tolerance},
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
        trained = [] if self.precision == "float64" else [f"{self.precision} loss", "grads"]
        for column in ("mesh", "strategy", "loss", "grads", "params", "opt", "other", *trained, ""):
            table.add_column(column)
        for result in self.results:
            errors = [result.worst("float64", group) for group in GROUPS]
            if trained:
                errors += [result.worst(self.precision, group) for group in ("loss", "grads")]
            cells = ["" if e is None else f"{e:.1e}" for e in errors]
            table.add_row(result.mesh, result.strategy, *cells, result.verdict)
        console.print(table)
        for result in self.results:
            if result.fault:
                console.print(f"{result.mesh} {result.fault}", soft_wrap=True)
            if result.skipped:
                console.print(f"{result.mesh} skipped: {result.skipped}", soft_wrap=True)
            if (loss := result.worst(self.precision, "loss") or 0.0) > self.loss_tolerance:
                console.print(
                    f"{result.mesh}: the {self.precision} loss differs by {loss:.1e}, more than the"
                    f" {self.loss_tolerance:.0e} expected of rounding",
                    soft_wrap=True,
                )
        if self.tolerance > 1e-9:
            console.print(
                "the model computes in a narrower type than its float64 parameters (a dtype in its"
                f" layers): the bound is {self.tolerance:.0e} instead of 1e-9",
                soft_wrap=True,
            )
        console.print(self.conclusion, soft_wrap=True)
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _plain(leaf: ComparedLeaf) -> dict[str, Any]:
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
        "differences": [
            {"stage": x.stage, "name": x.name} | _plain(x.leaf) for x in fault.differences
        ],
    }
