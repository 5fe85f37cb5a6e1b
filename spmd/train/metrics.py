"""Metrics on disk: JSON lines as the core, TensorBoard events beside them."""

from __future__ import annotations

import json
import time
from typing import Any

from etils import epath


class Writer:
    """Writes `{step, time, metrics}`; lines past `step` (lost work of a killed run) are cut on opening."""

    def __init__(self, directory: epath.Path, step: int, *, tensorboard: bool):
        self._path = directory / "metrics.jsonl"
        kept = []
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    break  # the torn last line of a killed process
            part = directory / "metrics.jsonl.part"
            part.write_text("".join(kept))
            part.replace(self._path)
        self._file: Any = open(self._path, "a", buffering=1)  # noqa: SIM115
        self._events: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(
                str(directory / "tensorboard"), purge_step=step + 1, flush_secs=10
            )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line, one set of events."""
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3)} | metrics) + "\n")
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read(directory: epath.Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
