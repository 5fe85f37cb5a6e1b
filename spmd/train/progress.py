"""Console output of a run: its header, a progress bar or plain lines, the summary."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from spmd.core import tree
from spmd.core.storage import is_remote
from spmd.hardware import chips
from spmd.parallel import mesh as meshes
from spmd.runtime import agree
from spmd.tasks import is_frozen
from spmd.train import rundir

SHOWN = 8  # arrays in the table of the largest


def _console() -> Console:
    """A console with colours on a terminal only: rich would print HTML into a notebook."""
    return Console(
        highlight=False,
        markup=False,  # a path is no markup: `runs [1]`, `:bug:`
        emoji=False,
        soft_wrap=not sys.stdout.isatty(),
        quiet=not agree.is_first(),
        force_terminal=sys.stdout.isatty(),
        force_jupyter=False,
    )


def print_header(
    name: str, mesh: jax.sharding.Mesh, state: Any, shardings: Any, num_steps: int, batch_size: int
) -> None:
    """Print devices, mesh, parameters, bytes per device, and the largest arrays with their shardings."""
    console = _console()
    device = mesh.devices.flat[0]
    console.print(
        f"{name}: {mesh.size} x {device.device_kind} ({device.platform})"
        + (f" in {num} processes" if (num := agree.process()[1]) > 1 else "")
        + f", mesh {meshes.describe(mesh)}"
    )
    frozen = tree.num_elements({k: x for k, x in state.model_state.items() if is_frozen(k)})
    console.print(
        f"{tree.num_elements(state.params):,} parameters"
        + (f" to train, {frozen:,} frozen" if frozen else "")
        + "; per device"
        f" {tree.human_bytes(tree.bytes_per_device(state.params, shardings.params))} of parameters,"
        f" {tree.human_bytes(tree.bytes_per_device(state.opt_state, shardings.opt_state))} of optimizer"
        f" state; {num_steps} steps of {batch_size} examples"
    )
    shardings_by_name = tree.named_leaves(shardings)
    largest = sorted(tree.named_leaves(state).items(), key=lambda item: -tree.num_bytes(item[1]))
    table = Table(box=None, pad_edge=False)
    for column in ("array", "shape", "dtype", "sharding", "per device"):
        table.add_column(column)
    for path, leaf in largest[:SHOWN]:
        spec = [
            " ".join(s) if isinstance(s, tuple) else s or "-" for s in shardings_by_name[path].spec
        ]
        table.add_row(
            path,
            str(list(leaf.shape)),
            str(leaf.dtype),
            ", ".join(spec) if any(s != "-" for s in spec) else "replicated",
            tree.human_bytes(tree.bytes_per_device(leaf, shardings_by_name[path])),
        )
    console.print(table)


def utilisation(
    work: Mapping[str, int], seconds: float, devices: Sequence[Any]
) -> dict[str, float]:
    """Utilisation of the devices, as far as it is known.

    work: model FLOPs of a step, by dtype. train/mfu: the share of the step's time that they would take at the
    peak of the chip. train/memory_gb: peak memory of a device of this process, in GB of 1e9 bytes.
    """
    metrics: dict[str, float] = {}
    num = len(devices)
    if work:
        metrics["train/tflops_per_device"] = sum(work.values()) / num / seconds / 1e12
        chip = chips.chip(devices[0].device_kind)
        if chip is not None and all(dtype in chip.flops for dtype in work):
            ideal = sum(flops / chip.flops[dtype] for dtype, flops in work.items()) / num
            metrics["train/mfu"] = ideal / seconds
    local = [d.memory_stats() for d in devices if d.process_index == jax.process_index()]
    peaks = [stats["peak_bytes_in_use"] for stats in local if stats]
    if peaks:
        metrics["train/memory_gb"] = max(peaks) / 1e9
    return metrics


def format_metric(value: float | None, form: str = ".4f") -> str:
    """A metric as text; `null`, as in the files, where there is none."""
    return "null" if value is None else f"{value:{form}}"


class Bar:
    """A rich progress bar on a terminal, one plain line for each report elsewhere.

    first: steps of the first dispatch, which ran before the bar was created and is not timed.
    chip: the device, if it is in the table. work: model FLOPs of a step, by dtype, once they are counted.
    """

    def __init__(
        self, num_steps: int, step: int, batch_size: int, mesh: jax.sharding.Mesh, first: int = 0
    ):
        self._num_steps, self._batch_size = num_steps, batch_size
        self._devices = list(mesh.devices.flat)
        self.chip = chips.chip(self._devices[0].device_kind)
        self.work: Mapping[str, int] = {}
        self._at, self._time = step + first, time.perf_counter()
        self._eval = ""
        self._bar: Progress | None = None
        if agree.is_first() and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task(
                "train", total=num_steps, completed=step, text="compiling"
            )
            self._bar.start()

    def report(self, step: int, metrics: Mapping[str, float | None]) -> dict[str, float]:
        """Show the metrics of the steps since the last report; returns metrics of speed, {} if no step was
        timed.
        """
        time_now = time.perf_counter()
        elapsed, num = time_now - self._time, step - self._at
        self._at, self._time = step, time_now
        text, speed, eta = f"loss {format_metric(metrics['train/loss'])}", {}, ""
        if metrics["train/loss"] is None:
            text += f" (no step since the last line counts: {self._uncounted(metrics)})"
        elif skipped := metrics.get("train/skipped_steps"):
            text += f" ({skipped:.0f} steps skipped, not finite)"
        if elapsed > 0 and num > 0:
            seconds = elapsed / num
            speed = {
                "train/examples_per_second": self._batch_size / seconds,
                "train/step_seconds": seconds,
            } | utilisation(self.work, seconds, self._devices)
            text += f"  {speed['train/examples_per_second']:,.0f} examples/s  {seconds * 1e3:.2f} ms/step"
            eta = f"  ETA {(self._num_steps - step) * seconds:.0f} s"
        if "train/mfu" in speed:
            text += f"  MFU {speed['train/mfu']:.1%}"
        if "train/memory_gb" in speed:
            text += f"  {speed['train/memory_gb']:.1f} GB"
        if (scale := metrics.get("train/noise_scale")) is not None:
            text += f"  noise scale {scale:,.0f} examples"
        text += self._eval
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        else:
            agree.say(f"step {step}/{self._num_steps}  {text}{eta}")
        return speed

    def _uncounted(self, metrics: Mapping[str, float | None]) -> str:
        skipped = metrics.get("train/skipped_steps")
        return f"{skipped:.0f} skipped, not finite" if skipped else "their examples weigh nothing"

    def show_evaluation(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Show the metrics of an evaluation."""
        text = "  ".join(f"{name} {format_metric(value)}" for name, value in metrics.items())
        if None in metrics.values():
            text += "  (null: no example of the evaluation split has a weight there)"
        self._eval = f"  {text}"
        self.say(f"step {step}  {text}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar:
            self._bar.console.print(text, highlight=False)
        else:
            agree.say(text)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Exclude the time of the body (evaluation, saving) from the speed."""
        began = time.perf_counter()
        try:
            yield
        finally:  # a report in the body has counted the time before it
            self._time += time.perf_counter() - max(began, self._time)

    def close(self) -> None:
        """Restore the terminal."""
        if self._bar:
            self._bar.stop()


SLOW_INPUT = 10.0  # seconds of waiting for batches, from which a run is told


def advise_input(seconds: Mapping[str, float]) -> str:
    """Advice where a run waited longer for its batches than for its steps; "" elsewhere."""
    waited, computed = seconds.get("input", 0.0), seconds.get("step", 0.0)
    if waited < SLOW_INPUT or waited < computed:
        return ""
    return (
        f"the steps waited {waited:.0f} s for batches: raise --data.threads and --data.buffer, put the files"
        " on a faster disk, or make them quicker to read (simplejpeg for JPEG, smaller images, Arrow IPC for"
        " tables; docs/data.md)"
    )


def print_summary(summary: dict[str, Any], directory: Any) -> None:
    """Print metrics, seconds by phase and the files of a finished run."""
    console = _console()
    metrics = "  ".join(
        f"{name} {format_metric(value, '.4g')}"
        for name, value in summary["metrics"].items()
        if name.split("/")[-1] in ("loss", "accuracy")
    )
    seconds = "  ".join(f"{name} {value:.1f}" for name, value in summary["seconds"].items())
    console.print(f"done: {summary['steps']} steps  {metrics}")
    if (scale := summary["metrics"].get("train/noise_scale")) is not None:
        console.print(
            f"noise scale of the last steps: {scale:,.0f} examples; batches up to about that size are advised"
        )
    console.print(f"seconds: {seconds}")
    if advice := advise_input(summary["seconds"]):
        console.print(advice)
    lines = "metrics/" if is_remote(directory) else "metrics.jsonl"
    console.print(
        f"files: {rundir.short_path(directory)}/ (config.json, {lines}, tensorboard/, checkpoints/,"
        " summary.json)"
    )
