"""A comparison as a table, as CSV, and as three pictures: loss against steps, bytes and seconds."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
from typing import TYPE_CHECKING, Any, NamedTuple

from etils import epath
from rich.markup import escape

from spmd.analysis.compare.cost import Charge
from spmd.analysis.plan import report
from spmd.analysis.plan.shardings import new_table
from spmd.core import tree
from spmd.core.storage import write_atomically
from spmd.train import rundir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS, EVAL = "train/loss", "eval/"
INSTALL = "pip install matplotlib, or spmd[plot]"


class StrategyResult(NamedTuple):
    """Result of a strategy. lines: logged metrics by step. failed: why the run ended early, else ""."""

    entry: str
    dir: str
    lines: list[dict[str, float]]
    charge: Charge
    failed: str

    def last(self, name: str) -> float | None:
        """The last logged value of a metric."""
        values = [line[name] for line in self.lines if name in line]
        return values[-1] if values else None


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Strategies that trained with the same budget. compute: seconds of a step's computation. measured:
    whether it was measured on this machine, not given. The network is modelled.
    """

    name: str
    directory: str
    network: str
    num_devices: int
    num_steps: int
    compute: float
    measured: bool
    results: list[StrategyResult]

    @property
    def complete(self) -> bool:
        """Whether no strategy diverged."""
        return not any(result.failed for result in self.results)

    def step_seconds(self, result: StrategyResult) -> float:
        """Seconds of a step on the network."""
        return self.compute + result.charge.seconds(self.network)

    def on(self, network: str) -> Comparison:
        """The same runs on another network; writes nothing."""
        return dataclasses.replace(self, network=network)

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the CSV: one per strategy and logged step."""
        rows = []
        for result in self.results:
            charge, step_seconds = result.charge, self.step_seconds(result)
            for line in result.lines:
                step = int(line["step"])
                metrics = {k: v for k, v in line.items() if k == LOSS or k.startswith(EVAL)}
                if metrics:
                    total = {"sent_bytes": step * charge.sent_bytes, "seconds": step * step_seconds}
                    by_axis = {f"sent_bytes[{k}]": step * v for k, v in charge.sent.items()}
                    rows.append(
                        {"strategy": result.entry, "step": step} | total | by_axis | metrics
                    )
        return rows

    def csv(self) -> str:
        """The rows as CSV: `strategy,step,sent_bytes,seconds,...`, of a device, up to each step."""
        rows, out = self.rows(), io.StringIO()
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(out, [*names], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def table(self) -> str:
        """A line per strategy: its last metrics, and the cost of a step."""
        metrics = dict.fromkeys(
            name for r in self.results for line in r.lines for name in line if name.startswith(EVAL)
        )
        columns = [LOSS, *metrics]
        table = new_table(
            "strategy",
            *(f">{name}" for name in columns),
            ">sent per step",
            "over",
            ">communication",
            ">step",
            ">total",
        )
        for result in self.results:
            charge, step_seconds = result.charge, self.step_seconds(result)
            values = [result.last(name) for name in columns]
            over = ", ".join(f"{k} {tree.human_bytes(v)}" for k, v in charge.sent.items())
            table.add_row(
                escape(result.entry),
                *("-" if value is None else f"{value:.4g}" for value in values),
                tree.human_bytes(charge.sent_bytes),
                over if len(charge.sent) > 1 else ", ".join(charge.sent) or "-",
                report.seconds(charge.seconds(self.network)),
                report.seconds(step_seconds),
                "diverged" if result.failed else report.seconds(step_seconds * self.num_steps),
            )
        return report.render(table)

    def __str__(self) -> str:
        origin = "measured on one device with its shard of the batch" if self.measured else "given"
        lines = [
            f"{self.name}: {self.num_steps} steps on {self.num_devices} devices; bytes that a device sends,"
            " from the compiled step",
            f"step = {report.seconds(self.compute)} of computation ({origin}) + communication on"
            f" {self.network} (modelled, not overlapped)",
            "",
            self.table(),
            *(f"{r.entry}: {r.failed}" for r in self.results if r.failed),
            "",
        ]
        files = "compare.csv, compare.png" if drawable() else f"compare.csv; compare.png: {INSTALL}"
        lines.append(
            f"files: {rundir.short_path(epath.Path(self.directory))}/ ({files}, a run each)"
        )
        return "\n".join(lines)

    __repr__ = __str__  # a notebook shows it beside the picture

    def figure(self) -> Figure:
        """Loss against steps, bytes sent by a device, and seconds on the network; needs matplotlib."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter

        figure = Figure(figsize=(12, 4.4), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        rows = [row for row in self.rows() if row.get(LOSS) is not None]
        curves = {
            r.entry: points
            for r in self.results
            if (points := [x for x in rows if x["strategy"] == r.entry])
        }
        labels = {
            "step": ("step", ""),
            "sent_bytes": ("bytes sent by a device", "B"),
            "seconds": (f"seconds on {self.network} (modelled)", "s"),
        }
        for ax, (name, (label, unit)) in zip(axes, labels.items(), strict=True):
            for i, (entry, points) in enumerate(curves.items()):
                # Curves of equal strategies cover each other: later ones are thinner.
                width = 1.2 + 3 * (len(curves) - 1 - i) / len(curves)
                xs = [row[name] for row in points]
                ax.plot(xs, [row[LOSS] for row in points], label=entry, linewidth=width)
            ends = [points[-1][name] for points in curves.values()]
            spread = ends and min(ends) > 0 and max(ends) > 10 * min(ends)
            ax.set(xlabel=label, xscale="log" if spread else "linear", yscale="log")
            if unit:
                ax.xaxis.set_major_formatter(EngFormatter(unit=unit))
            ax.grid(alpha=0.3)
        axes[0].set_ylabel("training loss")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle(
            f"{self.name} on {self.num_devices} devices,"
            f" {report.seconds(self.compute)} of computation per step",
            fontsize="medium",
        )
        return figure

    def png(self) -> bytes:
        """The figure as PNG."""
        out = io.BytesIO()
        self.figure().savefig(out, format="png", dpi=100)
        return out.getvalue()

    _repr_png_ = png  # a notebook shows it

    def write(self) -> None:
        """Writes compare.csv, and compare.png if matplotlib is installed."""
        folder = epath.Path(self.directory)
        write_atomically(folder / "compare.csv", self.csv())
        if drawable():
            (folder / "compare.png").write_bytes(self.png())


def drawable() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None
