"""The schedule of a pipeline as text and JSON: its table, its length, how long each stage waits."""

from __future__ import annotations

from typing import Any, NamedTuple

from spmd.strategies.grads.pipeline import schedules


class Schedule(NamedTuple):
    """A pipeline schedule. layers: those of the model. warning: "" unless the stages mostly wait."""

    table: schedules.Timetable
    layers: int
    warning: str

    def json(self) -> dict[str, Any]:
        """JSON types; forward, backward: [ticks][stages] of (microbatch, chunk), -1 where a stage waits."""
        table = self.table
        return {
            "schedule": table.kind,
            "stages": table.stages,
            "microbatches": table.microbatches,
            "virtual_stages": table.virtual,
            "ticks": table.ticks,
            "bubble": schedules.idle(table),
            "kept_inputs": self.kept,
            "forward": table.forward.tolist(),
            "backward": table.backward.tolist(),
        }

    @property
    def kept(self) -> int:
        """Largest number of microbatch inputs that a stage holds."""
        return schedules.program(self.table)[1]

    def __str__(self) -> str:
        table = self.table
        virtual = f", {table.virtual} virtual stages on each" if table.virtual > 1 else ""
        lines = [
            f"{table.kind}: {self.layers} layers on {table.stages} stages{virtual}, {table.microbatches}"
            f" microbatches, {table.ticks} ticks; a stage waits {schedules.idle(table):.1%} of the time and"
            f" keeps the inputs of at most {self.kept}",
            "",
            schedules.draw(table),
        ]
        return "\n".join([*lines, "", self.warning] if self.warning else lines)
