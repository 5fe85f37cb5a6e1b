"""Metrics on disk, written by process 0: JSON lines, and TensorBoard and Weights & Biases beside."""

from __future__ import annotations

import json
import math
import struct
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from spmd.core.storage import is_remote, json_text, list_directory
from spmd.runtime import agree
from spmd.train import LogConfig
from spmd.train.tracker import Tracker

_PICTURE = "eval/predictions"  # the name of a picture in TensorBoard and Weights & Biases
_EVERY = 30.0  # seconds between writes to an object store


class Lines:
    """A file of JSON objects with a `step`; those past `step` (lost work of a killed run) are dropped.

    In an object store, where files cannot be appended to, metrics.jsonl is a folder metrics/ with an object
    for each start, named by its first step and rewritten as it grows: 00000050.jsonl.
    """

    def __init__(self, path: epath.Path, step: int):
        self._kept = truncate(path, step)
        self._file: Any = None
        self._text: list[str] = []  # of the object
        self._sent = 0
        if is_remote(path):
            self._object = _folder(path) / f"{step:08}.jsonl"
            if self._object.exists():  # an earlier start began here too
                self._text = [self._object.read_text()]
        else:
            self._file = open(path, "a", buffering=1)  # noqa: SIM115

    def last(self, prefix: str) -> dict[str, float]:
        """The newest values whose names begin with `prefix`, of the last line that has any."""
        for line in reversed(self._kept):
            values = {k: v for k, v in line.items() if k.startswith(prefix)}
            if values:
                return values
        return {}

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line."""
        text = json_text(line) + "\n"
        if self._file is not None:
            self._file.write(text)
        else:
            self._text.append(text)

    def flush(self) -> None:
        """Send new lines to an object store; a file has them already."""
        if len(self._text) > self._sent:
            self._object.write_text("".join(self._text))
            self._sent = len(self._text)

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def _folder(path: epath.Path) -> epath.Path:
    """The folder of the lines of `path` in an object store."""
    return path.parent / path.name.removesuffix(".jsonl")


def _line_files(path: epath.Path) -> list[epath.Path]:
    """The files that hold the lines of `path`, oldest first."""
    if not is_remote(path):
        return [path] if path.exists() else []
    folder = _folder(path)
    return sorted(folder.iterdir(), key=str) if folder.exists() else []


def truncate(path: epath.Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines past `step` from a file of lines; returns the others."""
    lines: list[dict[str, Any]] = []
    for part in _line_files(path):
        text = part.read_text()
        part_lines = _lines_until(text, step)
        lines += part_lines
        new_text = "".join(json_text(line) + "\n" for line in part_lines)
        if not is_remote(path):
            temporary = path.parent / f"{path.name}.part"
            temporary.write_text(new_text)
            temporary.replace(path)
        elif not part_lines:
            part.unlink()
        elif new_text != text:
            part.write_text(new_text)
    return lines


def _lines_until(text: str, step: int) -> list[dict[str, Any]]:
    """The lines up to `step`."""
    lines: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
            if value["step"] <= step:
                lines.append(value)
        except (ValueError, KeyError, TypeError):
            break  # the torn last line of a killed process
    return lines


class Writer:
    """Writes `{step, time, metrics}` lines, TensorBoard events, and the examples of each process.

    experiment: the resolved configuration as JSON types, for Weights & Biases.
    last: the newest train/ metrics in the directory when it was opened, for a run that was killed late.
    """

    def __init__(
        self, directory: epath.Path, step: int, config: LogConfig, experiment: dict[str, Any]
    ):
        self.last: dict[str, float] = {}
        self._lines: Lines | None = None
        self._events: Any = None
        self._tracker: Tracker | None = None
        self._examples: Lines | None = None
        self._directory, self._sent = directory, time.monotonic()
        self._local: tempfile.TemporaryDirectory[str] | None = None  # of events for an object store
        agree.from_first(
            lambda: self._open(directory, step, config, experiment), "opening the metrics"
        )
        if config.examples:  # after process 0 has truncated them all
            index, _ = agree.process()
            self._examples = Lines(directory / f"examples-{index}.jsonl", step)

    def _open(
        self, directory: epath.Path, step: int, config: LogConfig, experiment: dict[str, Any]
    ) -> None:
        example_files = [p for p in list_directory(directory) if p.name.startswith("examples-")]
        if is_remote(directory):
            example_files = [p.parent / f"{p.name}.jsonl" for p in example_files]
        for path in example_files:
            truncate(path, step)
        self._lines = Lines(directory / "metrics.jsonl", step)
        self.last = self._lines.last("train/")
        if config.tensorboard:
            event_directory = str(directory / "tensorboard")
            if is_remote(directory):
                self._local = tempfile.TemporaryDirectory(prefix="spmd-tensorboard-")
                event_directory = self._local.name
            # Its thread ends when the disk is full; a bounded queue would then block the loop for ever.
            self._events = _summary_writer()(
                event_directory, purge_step=step + 1, flush_secs=10, max_queue=0
            )
        if config.wandb:
            self._tracker = Tracker(directory, config.wandb, experiment)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Write a line of metrics.jsonl, and the values that are finite as events."""
        if self._lines is None:
            return
        self._lines.write({"step": step, "time": round(time.time(), 3)} | {**metrics})
        metrics = {k: v for k, v in metrics.items() if v is not None and math.isfinite(v)}
        if self._events is not None:
            # One event for all: add_scalar takes 0.6 ms for ten.
            self._events.file_writer.add_summary(_summary(metrics), step)
        if self._tracker is not None:
            self._tracker.write(step, metrics)
        if time.monotonic() - self._sent > _EVERY:
            self.flush()

    def picture(self, step: int, png: bytes) -> None:
        """Write a picture of predictions, pictures/STEP.png and events; nothing where it is empty."""
        if not png or self._lines is None:
            return
        folder = self._directory / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{step:08}.png").write_bytes(png)
        if self._events is not None:
            self._events.file_writer.add_summary(_summary({}, {_PICTURE: png}), step)
        if self._tracker is not None:
            self._tracker.picture(step, _PICTURE, png)

    def flush(self) -> None:
        """Send new lines and events to an object store; on a disk they are written already."""
        self._sent = time.monotonic()
        for file in (self._lines, self._examples):
            if file is not None:
                file.flush()
        if self._local is not None:
            self._events.flush()
            for file in Path(self._local.name).iterdir():
                (self._directory / "tensorboard" / file.name).write_bytes(file.read_bytes())

    def examples(self, step: int, ids: np.ndarray) -> None:
        """Write the example ids [b] or [steps, b] of the steps after `step`, of this process's rows."""
        if self._examples is not None:
            for i, row in enumerate(np.atleast_2d(ids)):
                self._examples.write({"step": step + i + 1, "examples": row.tolist()})

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        for file in (self._lines, self._events, self._tracker, self._examples):
            if file is not None:
                file.close()
        if self._local is not None:
            self._local.cleanup()


def _summary_writer() -> Any:
    """tensorboardX's writer, imported without PyTorch, whose import would take seconds."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # an ImportError, which it expects
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


def _summary(metrics: Mapping[str, float], pictures: Mapping[str, bytes] = {}) -> Any:
    """The event of some metrics and PNGs."""
    from tensorboardX.proto import summary_pb2

    messages: Any = summary_pb2  # protobuf makes its classes at run time
    values = [messages.Summary.Value(tag=name, simple_value=x) for name, x in metrics.items()]
    for name, png in pictures.items():
        width, height = struct.unpack(">II", png[16:24])  # of its header
        image = messages.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=png
        )
        values.append(messages.Summary.Value(tag=name, image=image))
    return messages.Summary(value=values)


def read_lines(directory: epath.Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, or of its objects in an object store."""
    parts = _line_files(directory / "metrics.jsonl")
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]
