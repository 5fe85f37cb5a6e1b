"""The training loop, evaluation, checkpoints, metrics, progress; with their configuration."""

from __future__ import annotations

import dataclasses
from typing import Literal

from spmd.core.fields import check, free
from spmd.core.values import MOST


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of the run, and dispatch of steps. All free: a run resumes with other values."""

    steps: int | None = free(None)
    """Optimizer steps of the run, resumed parts included; overrides epochs."""
    epochs: float = free(1.0)
    """Passes over the training split, when steps is not given."""
    accumulate: int = free(1)
    """Microbatches whose gradients a step sums, to save memory; also those of a pipeline."""
    pipeline: Literal["gpipe", "1f1b", "interleaved"] = free("1f1b")
    """Schedule of a pipeline (mesh.stage > 1); see it with plan --show schedule."""
    virtual_stages: int = free(2)
    """Parts of the layers on each stage, with train.pipeline=interleaved."""
    steps_per_dispatch: int = free(1)
    """Steps scanned in one dispatch; small models are bound by dispatch."""
    steps_in_flight: int = free(2)
    """Dispatches in flight before the host waits for the oldest (at most 8)."""
    nonfinite: Literal["stop", "skip"] = free("stop")
    """On a non-finite loss or gradient: stop and name the step, or skip that update."""
    noise_scale: bool = free(False)
    """Measure the gradient noise scale, the batch size beyond which larger ones gain little
    (McCandlish et al. 2018); needs accumulate or --strategy allreduce."""

    def __post_init__(self) -> None:
        check(self.steps is None or self.steps >= 1, f"train.steps={self.steps} must be at least 1")
        check(self.epochs > 0, f"train.epochs={self.epochs} must be more than 0")
        for name in ("accumulate", "virtual_stages", "steps_per_dispatch", "steps_in_flight"):
            value = getattr(self, name)
            check(value >= 1, f"train.{name}={value} must be at least 1")
        check(
            self.steps_in_flight <= 8,
            f"train.steps_in_flight={self.steps_in_flight} must be at most 8:"
            " more can deadlock simulated devices and gains nothing",
        )

    def num_steps(self, batch_size: int, num_examples: int) -> int:
        """Steps of the run, resumed parts included."""
        steps = self.steps or max(1.0, self.epochs * num_examples / batch_size)
        check(
            steps <= MOST,
            f"train.epochs={self.epochs} is {steps:.3g} steps, more than the {MOST} that are counted",
        )
        return round(steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Cadence of evaluations."""

    every: int = free(0)
    """Steps between evaluations; 0 is once per epoch; always at the end."""

    def __post_init__(self) -> None:
        check(self.every >= 0, f"eval.every={self.every} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Cadence of checkpoints, and which are kept."""

    every: int = free(0)
    """Steps between checkpoints; 0 is once per epoch; always at the end and when stopped."""
    keep: int = free(2)
    """Newest checkpoints kept; with 1 there is no older one if that is damaged."""
    best: str = free("eval/accuracy")
    """Also keep the best by this metric of the evaluation; '' keeps the newest only."""
    best_is: Literal["highest", "lowest"] = free("highest")
    """Which value of that metric is best."""

    def __post_init__(self) -> None:
        check(self.every >= 0, f"checkpoint.every={self.every} must not be negative")
        check(self.keep >= 1, f"checkpoint.keep={self.keep} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Metrics, events and traces that are written while training."""

    every: int = free(50)
    """Steps between lines of metrics (means over those steps)."""
    tensorboard: bool = free(True)
    """Write TensorBoard events too."""
    examples: bool = free(False)
    """Write which examples each step was trained on: examples-PROCESS.jsonl."""
    layers: bool = free(False)
    """Write the norms of each layer's gradient, parameters and update with each line of metrics."""
    pictures: int = free(0)
    """Evaluation examples drawn beside their predictions, of tasks on images: RUN/pictures/STEP.png, and in
    TensorBoard and Weights & Biases; the same ones at each evaluation. 0 draws none."""
    wandb: str = free("")
    """Project of Weights & Biases to send metrics to as well (pip install wandb; honours WANDB_MODE)."""
    profile: str = free("")
    """Steps to trace with the profiler, FIRST:LAST, into RUN/profile."""

    def __post_init__(self) -> None:
        check(self.every >= 1, f"log.every={self.every} must be at least 1")
        check(self.pictures >= 0, f"log.pictures={self.pictures} must not be negative")
        first, _, last = self.profile.partition(":")
        check(
            not self.profile
            or (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)),
            f"log.profile={self.profile!r} must be FIRST:LAST, steps from 1 on, for example 20:30",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run directory, and how it is used."""

    dir: str = free("")
    """Run directory; empty is runs/NAME."""
    fresh: bool = free(False)
    """Move an existing run aside and start anew."""
    amend: bool = free(False)
    """Continue with another learning rate, clipping, schedule or decay; the run records the change."""
    compile_cache: str = free("")
    """Directory of compiled programs; empty is $JAX_COMPILATION_CACHE_DIR, else ~/.cache/spmd/compiled;
    off keeps none."""
