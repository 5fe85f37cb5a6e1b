"""The parts of a training run: its state, input, steps, evaluation, checkpoints and end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from spmd.data import loader
from spmd.data.skips import Skips
from spmd.hardware import flops
from spmd.runtime import RuntimeConfig, agree
from spmd.runtime.stop import Stop, Votes
from spmd.runtime.watchdog import Watchdog
from spmd.strategies import base, layers
from spmd.train import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    TrainConfig,
    dataset,
    progress,
    rundir,
)
from spmd.train.checkpoint.store import Checkpoints
from spmd.train.evaluate import Measured, evaluator
from spmd.train.evaluations import Evaluation
from spmd.train.log import Clock, Log, check_finite
from spmd.train.metrics import Writer
from spmd.train.pictures import Pictures
from spmd.train.profile import Profile
from spmd.train.program import Program
from spmd.train.snapshot import Snapshot


class Settings(NamedTuple):
    """Settings of evaluation, checkpoints, logs and stopping; see the config classes."""

    train: TrainConfig
    evals: EvalConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    runtime: RuntimeConfig
    evaluations: tuple[Evaluation, ...] = ()


class Directory(NamedTuple):
    """A run directory, as the loop uses it.

    config, identity: saved with each checkpoint. resumes: whether the directory holds this run already.
    accept: as in Checkpoints.restore. begin: called by process 0 with the first step's number, before
    anything is written. holds: called by process 0 before each save; raises ValueError when the directory
    does not belong to this run any more.
    """

    path: epath.Path
    config: dict[str, Any]
    identity: dict[str, Any]
    resumes: bool
    accept: Callable[[dict[str, Any]], None]
    begin: Callable[[int], None]
    holds: Callable[[], None]


class Stopped(Exception):
    """The run was stopped by a signal, and has saved.

    directory: of the run; None when it had not yet taken a step.
    """

    def __init__(self, signum: int, step: int, directory: epath.Path | None):
        cause = f"stopped by {signal.Signals(signum).name}"
        if directory:
            saved = rundir.short_path(directory)
            text = f"{cause} at step {step}, state saved in {saved}; the same command resumes it"
        elif step:
            text = f"{cause} before the next step; the checkpoint of step {step} is kept"
        else:
            text = f"{cause} before the first step; nothing was written"
        super().__init__(text)
        self.signum = signum


class Trainer:
    """A run while it trains; `loop.fit` calls the public methods in order."""

    def __init__(
        self,
        program: Program,
        run: Directory,
        settings: Settings,
        stop: Stop,
        watchdog: Watchdog,
        closing: contextlib.ExitStack,
    ):
        self.program, self.run, self.settings = program, run, settings
        self.stop, self.watchdog, self.closing = stop, watchdog, closing
        self.step = 0
        self.votes = Votes(program.mesh) if agree.has_peers() else None
        self.clock = Clock(self._enter)
        self.measured: Measured = {}  # by the evaluation of this step, if there was one
        self.compiled: set[int] = set()  # numbers of steps for which a dispatch has been compiled
        self.first: tuple[int, dict[str, np.ndarray], base.Metrics] | None = None

    def _enter(self, phase: str) -> contextlib.AbstractContextManager[None]:
        self.stop.phase = phase
        self.watchdog.beat(phase, self.step)
        return self.watchdog.pause() if phase == "compile" else contextlib.nullcontext()

    # ---- before the first step

    def open_state(self) -> None:
        """Restore the newest checkpoint on this mesh, or initialise; prints the header of the run."""
        program, strategy = self.program, self.program.strategy
        self.checkpoints = Checkpoints(
            self.run.path / "checkpoints", self.settings.checkpoint, writing=self.run.resumes
        )
        self.closing.callback(self.checkpoints.close)
        abstract, shardings = program.abstract_state(), strategy.state_shardings
        steps = program.num_steps
        progress.print_header(
            program.name, program.mesh, abstract, shardings, steps, program.examples
        )
        if program.privacy:
            agree.say(program.privacy.about(steps))
        if not (self.run.resumes and self.checkpoints.exist()):
            with self.clock("compile"):
                self.state = program.init()
            return
        with self.clock("checkpoint"):
            self.state = self.checkpoints.restore(abstract, shardings, accept=self.run.accept)
        self.step = int(self.state.step)
        if program.privacy:
            metadata = self.checkpoints.about(self.step)
            program.privacy.same_noise(metadata.get("noise_multiplier"))
        agree.say(f"resuming at step {self.step} of {steps}")
        if self.step:
            self.stop.outcome = f"the checkpoint of step {self.step} is kept"

    def open_input(self) -> None:
        """Open training batches from the current step on, and the evaluation."""
        program, train, log = self.program, self.settings.train, self.settings.log
        # With several steps per dispatch the strategy's step is a scan over them.
        is_scanned = train.steps_per_dispatch > 1
        self.strategy = base.scanned(program.strategy) if is_scanned else program.strategy
        self.batch_sharding = jax.tree.leaves(self.strategy.batch_shardings)[0]
        self.batches = program.host_batches(self.step, program.num_steps, train.steps_per_dispatch)
        eval_source = program.open_evaluation()
        skips = {"train": program.skips or Skips(), "eval": program.data.skips("evaluation")}
        self.skipped = dataset.Skipped({"train": program.source, "eval": eval_source}, skips)
        self.evaluate = evaluator(program, eval_source, skips["eval"])
        self.pictures = Pictures(program, eval_source, log.pictures)
        steps = self.step, program.num_steps, train.steps_per_dispatch
        self.profile = Profile(log.profile, self.run.path, *steps)

    def take_first_steps(self) -> None:
        """Run the first dispatch and wait for it: a run that fails does so before anything is written."""
        if self.step < self.program.num_steps:
            self.closing.callback(self.profile.discard)
            self.profile.start_at(self.step, lambda: None)
            self.first = self._dispatch()
            num, _, on_device = self.first
            with self.clock("step"):  # running out of memory shows here
                metrics = {k: np.atleast_1d(np.asarray(v)) for k, v in on_device.items()}
            if self.settings.train.nonfinite == "stop":
                check_finite(self.step + num, metrics)
        if self._should_stop("the first step"):
            raise Stopped(self.stop_signal(), self.step, None)
        agree.from_first(lambda: self.run.begin(self.step), "writing config.json")

    def open_output(self) -> None:
        """Open metrics and progress bar, and set when to evaluate and save."""
        program, settings, step = self.program, self.settings, self.step
        self.closing.callback(self.profile.close)
        self.writer = Writer(self.run.path, step, settings.log, self.run.config)
        self.closing.callback(self.writer.close)
        untimed = self.first[0] if self.first else 0
        self.bar = progress.Bar(program.num_steps, step, program.examples, program.mesh, untimed)
        self.closing.callback(self.bar.close)
        nonfinite = settings.train.nonfinite
        more: dict[str, Any] = {"consumed": self._consumed()}
        if settings.log.layers:
            shapes = program.abstract_state().params
            more["layer_names"] = layers.layer_names(shapes, program.task.dims)
        self.logs = Log(self.writer, self.bar, settings.log, nonfinite, step, self.votes, **more)
        epoch = max(1, round(len(program.source) / program.examples))
        self.eval_every = settings.evals.every or epoch
        self.save_every = settings.checkpoint.every or epoch

    def _consumed(self) -> Callable[[int], Mapping[str, float]] | None:
        """Metrics by step of what each part of the data has given; None of data without parts."""
        program = self.program
        of_source = getattr(program.source, "consumed", None)
        if of_source is None or program.privacy or program.order(program.source) is not None:
            return None  # the examples are drawn in another order
        return lambda step: of_source(step * program.examples)

    # ---- steps

    def _dispatch(self) -> tuple[int, dict[str, np.ndarray], base.Metrics]:
        """Start the next steps: (how many, their batch on the host, their metrics)."""
        program = self.program
        with self.clock("input"):
            host: Any = next(self.batches)
            # The step's jit places a host batch far faster than put, but only within one process.
            batch = host
            if self.votes is not None:
                batch = loader.put(host, self.batch_sharding, program.data.batch_size)
        num = host["weight"].shape[0] if self.settings.train.steps_per_dispatch > 1 else 1
        # jit returns once it has compiled.
        annotation = jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1)
        with self.clock("step" if num in self.compiled else "compile"), annotation:
            self.compiled.add(num)
            self.state, metrics = self.strategy.step(self.state, batch)
            if self.votes is not None:
                metrics = metrics | self.votes.cast(self.stop.signum)
        return num, host, metrics

    def take_steps(self) -> None:
        """Dispatch the next steps and hand their metrics to the log."""
        self.measured = {}
        if self.first is None:
            self.profile.start_at(self.step, self.logs.drain)
        (num, host, metrics), self.first = self.first or self._dispatch(), None
        if self.bar.chip and not self.bar.work:  # 0.2 s, while the devices run their first step
            self.bar.work = flops.count_step(self.program.task, self.program.abstract_batch())
        self.before, self.step = self.step, self.step + num
        self.writer.examples(self.before, host["example_id"])
        with self.clock("step"):
            self.logs.add(self.step, metrics, self.settings.train.steps_in_flight)
        with self.bar.away():
            self.profile.stop_at(self.step, self.logs.drain)

    def evaluate_and_save_when_due(self) -> None:
        """Evaluate, then save, where the last dispatch has passed a multiple of their cadence."""
        eval_due, save_due = self._passed(self.eval_every), self._passed(self.save_every)
        others = [e for e in self.settings.evaluations if self._passed(e.every or self.eval_every)]
        if eval_due or save_due or others:
            self.logs.drain()
        with self.bar.away():
            if eval_due:
                self._measure()
            self._measure_others(others)
            if save_due:
                self._save()

    def _passed(self, every: int) -> bool:
        """Whether the last dispatch has passed a multiple of a cadence."""
        return self.step // every > self.before // every

    def stop_signal(self) -> int:
        """The signal to stop for, the same in all processes at the same step; 0 for none."""
        if self.votes is None:
            return self.stop.signum
        self.stop.begin_stopping(self.votes.agreed)
        return self.votes.agreed

    def _should_stop(self, phase: str = "evaluation") -> bool:
        """Whether to abandon an evaluation: called between its batches, by all processes."""
        self.watchdog.beat(phase, self.step)
        if self.votes is not None:
            self.votes.ask(self.stop.signum)
        return bool(self.stop_signal())

    def _measure(self) -> None:
        self.logs.drain()
        self.logs.flush(self.step)
        with self.clock("evaluation"):
            variables = self.strategy.eval_variables(self.state)
            metrics = self.evaluate(*variables, self.state.tables, self._should_stop)
            if metrics is None:
                return
            self.writer.picture(self.step, self.pictures.draw(*variables, self.state.tables))
        self.measured = metrics | self.skipped.count()
        if self.program.privacy:
            self.measured["privacy/epsilon"] = self.program.privacy.epsilon(self.step)
        self.writer.write(self.step, self.measured)
        self.bar.show_evaluation(self.step, self.measured)

    def _measure_others(self, evaluations: Sequence[Evaluation]) -> None:
        """Run these evaluations on the live state, and log their values."""
        for evaluation in evaluations:
            if self._should_stop():
                return
            with self.clock("evaluation"):
                values = evaluation.logged(Snapshot(self.program, self.state))
            self.measured = self.measured | values
            self.writer.write(self.step, values)
            self.bar.show_evaluation(self.step, values)

    def _save(self) -> None:
        program, run = self.program, self.run
        self.logs.drain()  # a step is saved only once its metrics are known to be finite
        self.writer.flush()
        self.skipped.count()
        with self.clock("checkpoint"):
            agree.from_first(run.holds, "looking at the run directory")
            extra = {
                "data": loader.position(self.step, program.examples, len(program.source)),
                "config": run.config,
                "identity": run.identity,
            }
            if program.privacy:
                extra["noise_multiplier"] = program.privacy.noise_multiplier
            self.checkpoints.save(self.state, self.step, self.measured, extra)
            self.stop.outcome = "the last complete checkpoint is kept"

    # ---- the end

    def finish(self) -> dict[str, Any]:
        """Evaluate, save, write the summary and return it; raises Stopped where a signal came first."""
        with self.clock("step"):
            self.logs.drain()
        if not self.stop_signal():
            self._measure()
            self._measure_others(self.settings.evaluations)
        self._save()
        with self.clock("checkpoint"):
            self.checkpoints.wait()
        self.stop.outcome = f"the checkpoint of step {self.step} is kept"
        if self.stop_signal() and not (self.step == self.program.num_steps and self.measured):
            self.logs.flush(self.step)
            raise Stopped(self.stop_signal(), self.step, self.run.path)
        summary = {
            "experiment": self.program.name,
            "steps": self.step,
            "metrics": self.logs.last | self.measured,
            "seconds": self.clock.summary(),
        }
        path = self.run.path
        agree.from_first(self.run.holds, "looking at the run directory")
        agree.from_first(lambda: rundir.write_summary(path, summary), "writing the summary")
        return summary
