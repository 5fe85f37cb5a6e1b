"""Metrics on disk: JSON lines as the core, TensorBoard and Weights & Biases beside. Process 0 writes them."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
from etils import epath

from spmd.runtime import agree
from spmd.train import LogConfig
from spmd.train.tracker import Tracker


class Lines:
    """A file of JSON objects with a `step`; those past the given step (lost work of a killed run) are cut."""

    def __init__(self, path: epath.Path, step: int):
        self._kept = cut(path, step)
        self._file: Any = open(path, "a", buffering=1)  # noqa: SIM115

    def last(self, prefix: str) -> dict[str, float]:
        """The newest kept values under names that begin so, of the last line that has any."""
        for line in reversed(self._kept):
            found = {k: v for k, v in line.items() if k.startswith(prefix)}
            if found:
                return found
        return {}

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line."""
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


def cut(path: epath.Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines past `step` from a file of lines; returns the others."""
    kept: list[dict[str, Any]] = []
    if not path.exists():
        return kept
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
            if line["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break  # the torn last line of a killed process
    part = path.parent / f"{path.name}.part"
    part.write_text("".join(json.dumps(line) + "\n" for line in kept))
    part.replace(path)
    return kept


class Writer:
    """Writes `{step, time, metrics}` lines and TensorBoard events, and each process's examples.

    experiment: the resolved configuration as JSON types, for Weights & Biases.
    last: the newest train/ metrics that the directory held when opened, for a run that was killed late.
    """

    def __init__(
        self, directory: epath.Path, step: int, config: LogConfig, experiment: dict[str, Any]
    ):
        self.last: dict[str, float] = {}
        self._lines: Lines | None = None
        self._events: Any = None
        self._tracker: Tracker | None = None
        self._examples: Lines | None = None
        agree.from_first(
            lambda: self._open(directory, step, config, experiment), "opening the metrics"
        )
        if config.examples:  # after process 0 has cut them all
            index, _ = agree.process()
            self._examples = Lines(directory / f"examples-{index}.jsonl", step)

    def _open(
        self, directory: epath.Path, step: int, config: LogConfig, experiment: dict[str, Any]
    ) -> None:
        for path in directory.glob("examples-*.jsonl"):
            cut(path, step)
        self._lines = Lines(directory / "metrics.jsonl", step)
        self.last = self._lines.last("train/")
        if config.tensorboard:
            # Its thread ends when the disk is full; a bounded queue would then block the loop for ever.
            self._events = _summary_writer()(
                str(directory / "tensorboard"), purge_step=step + 1, flush_secs=10, max_queue=0
            )
        if config.wandb:
            self._tracker = Tracker(directory, config.wandb, experiment)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line, one set of events."""
        if self._lines is None:
            return
        self._lines.write({"step": step, "time": round(time.time(), 3)} | metrics)
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.write(step, metrics)

    def examples(self, before: int, ids: np.ndarray) -> None:
        """The example ids [b] or [steps, b] of the steps after `before`, of this process's rows."""
        if self._examples is not None:
            for i, row in enumerate(np.atleast_2d(ids)):
                self._examples.write({"step": before + i + 1, "examples": row.tolist()})

    def close(self) -> None:
        """Flushes and closes."""
        for file in (self._lines, self._events, self._tracker, self._examples):
            if file is not None:
                file.close()


def _summary_writer() -> Any:
    """tensorboardX's writer, without PyTorch: it imports that wherever it is installed, for some seconds."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # an ImportError, which it expects
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


def read(directory: epath.Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
