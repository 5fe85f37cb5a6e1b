"""The training loop: resume, step, log one step late, evaluate, save, stop cleanly."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from spmd import flops
from spmd.batches import Expected, Ranges
from spmd.data import DataConfig, augment, loader
from spmd.data.skips import Skips
from spmd.privacy import Mechanism
from spmd.runtime import RuntimeConfig, agree
from spmd.runtime.stop import Stop, Votes, catching
from spmd.runtime.watchdog import Watchdog
from spmd.strategies import base
from spmd.train import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    TrainConfig,
    dataset,
    progress,
    rundir,
)
from spmd.train.checkpoint import Checkpoints, disk_full
from spmd.train.evaluate import evaluator
from spmd.train.log import Clock, Log, check_finite
from spmd.train.metrics import Writer
from spmd.train.profile import Profile


class Program(NamedTuple):
    """A built experiment: what the loop, verify, plan and compare are handed."""

    name: str
    seed: int
    mesh: jax.sharding.Mesh
    task: Any
    strategy: base.Strategy
    num_steps: int
    data: DataConfig
    source: Any  # training source
    start: Callable[[Any, base.TrainState], base.TrainState] | None = None  # (self, state) -> state
    order: Callable[[Any], Any] = lambda source: None  # source -> its order; None is its own
    privacy: Mechanism | None = None
    evaluation: Any = None  # evaluation source, where it is open already
    skips: Skips | None = None  # bad training records that may pass
    ranges: Ranges = MappingProxyType({})  # of the features that are indices

    def open_evaluation(self) -> Any:
        """The source of the evaluation split."""
        return self.data.open("eval") if self.evaluation is None else self.evaluation

    def expected(self, split: str) -> Expected:
        """What each batch of a split (`training`, `evaluation`) is checked against."""
        return Expected(split, self.data.features, self.ranges)

    def init(self) -> base.TrainState:
        """The state before the first step, every array born on the mesh with its sharding."""
        state = self.strategy.init(jax.random.key(self.seed))
        return self.start(self, state) if self.start else state

    @property
    def examples(self) -> int:
        """Examples of a step; under privacy on average, some rows being empty."""
        return self.privacy.examples if self.privacy else self.data.batch_size

    def abstract_state(self) -> base.TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self.strategy.init, jax.random.key(0))

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the global batch."""
        shapes = self.data.abstract_batch(self.data.batch_size)
        return {name: jax.ShapeDtypeStruct(*leaf) for name, leaf in shapes.items()}

    def host_batches(
        self, start: int, stop: int, steps_per_dispatch: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of the training batches of steps [start, stop); see loader.train_batches."""
        placed = jax.tree.leaves(self.strategy.batch_shardings)[0]
        return loader.train_batches(
            self.source,
            batch_size=self.data.batch_size,
            seed=self.seed,
            start=start,
            stop=stop,
            steps_per_dispatch=steps_per_dispatch,
            rows=loader.process_rows(placed, self.data.batch_size),
            threads=self.data.threads,
            buffer=self.data.buffer,
            transform=augment.transform(self.data, self.source, self.seed, self.skips),
            order=self.order(self.source),
            skips=self.skips,
            expected=self.expected("training"),
        )


class Stopped(Exception):
    """The run was asked to stop and has saved; `signal` says by what.

    directory: where it has saved; None when it had not yet taken a step.
    """

    def __init__(self, signum: int, step: int, directory: epath.Path | None):
        by = f"stopped by {signal.Signals(signum).name}"
        if directory:
            saved = rundir.shown(directory)
            text = f"{by} at step {step}, state saved in {saved}; the same command resumes it"
        elif step:
            text = f"{by} before the next step; the checkpoint of step {step} stands"
        else:
            text = f"{by} before the first step; nothing was written"
        super().__init__(text)
        self.signum = signum


def _first_state(
    program: Program,
    checkpoints: Checkpoints,
    clock: Clock,
    accept: Callable[[dict[str, Any]], None],
    *,
    resumes: bool,
) -> base.TrainState:
    """The newest checkpoint on this mesh, or a fresh state; prints what the run consists of."""
    abstract, strategy = program.abstract_state(), program.strategy
    progress.start(
        program.name,
        program.mesh,
        abstract,
        strategy.state_shardings,
        program.num_steps,
        program.examples,
    )
    if program.privacy:
        agree.say(program.privacy.about(program.num_steps))
    if not (resumes and checkpoints.exist()):
        with clock("compile"):
            return program.init()
    with clock("checkpoint"):
        state = checkpoints.restore(abstract, strategy.state_shardings, accept=accept)
    if program.privacy:
        program.privacy.same_noise(checkpoints.about(int(state.step)).get("noise_multiplier"))
    agree.say(f"resuming at step {int(state.step)} of {program.num_steps}")
    return state


def fit(
    program: Program,
    directory: epath.Path,
    *,
    train: TrainConfig,
    evals: EvalConfig,
    checkpoint: CheckpointConfig,
    log: LogConfig,
    runtime: RuntimeConfig,
    config: dict[str, Any],
    identity: dict[str, Any],
    resumes: bool,
    accept: Callable[[dict[str, Any]], None],
    begin: Callable[[int], None],
    holds: Callable[[], None],
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Trains to program.num_steps from the newest checkpoint in `directory`; returns the summary.

    Nothing is written before the first dispatch has run, so that what cannot run leaves no trace.

    config, identity: saved with each checkpoint. resumes: whether `directory` holds this run. accept: as
    Checkpoints.restore takes it. begin: called by process 0 with the step at which the run goes on, before
    anything is written. holds: called by process 0 before each save; ValueError when the directory is not
    this run's any more. stop: of signals that are caught already; None catches them here. Raises Stopped
    after a signal to any process, NonFinite when the loss diverges, SaveFailed when the disk is full; in all
    processes, at the same step.
    """
    with (
        contextlib.nullcontext(stop) if stop else catching(runtime.grace) as stop,
        Watchdog(runtime.hang_timeout) as watchdog,
        disk_full(directory),
        contextlib.ExitStack() as closing,
        agree.peers(),
    ):
        strategy, data, step = program.strategy, program.data, 0
        votes = Votes(program.mesh) if agree.joined() else None

        def entering(phase: str) -> contextlib.AbstractContextManager[None]:
            stop.phase = phase
            watchdog.beat(phase, step)
            return watchdog.paused() if phase == "compile" else contextlib.nullcontext()

        clock = Clock(entering)
        # ---- state: born sharded, or the newest checkpoint, on whatever mesh this is
        checkpoints = Checkpoints(directory / "checkpoints", checkpoint, writing=resumes)
        closing.callback(checkpoints.close)
        state = _first_state(program, checkpoints, clock, accept, resumes=resumes)
        step = int(state.step)
        if step:
            stop.stands = f"the checkpoint of step {step} stands"
        # ---- input
        if train.steps_per_dispatch > 1:
            strategy = base.scanned(strategy)
        placed = jax.tree.leaves(strategy.batch_shardings)[0]
        batches = program.host_batches(step, program.num_steps, train.steps_per_dispatch)
        opened = program.open_evaluation()
        skips = {"train": program.skips or Skips(), "eval": data.skips("evaluation")}
        skipped = dataset.Skipped({"train": program.source, "eval": opened}, skips)
        evaluate = evaluator(
            program.task,
            program.mesh,
            opened,
            data.eval_batch_size,
            skips["eval"],
            program.expected("evaluation"),
        )
        profile = Profile(log.profile, directory, step, program.num_steps, train.steps_per_dispatch)
        compiled: set[int] = set()

        def dispatch() -> tuple[int, dict[str, np.ndarray], base.Metrics]:
            """Starts the next steps: (how many, their batch on the host, their metrics)."""
            nonlocal state
            with clock("input"):
                host: Any = next(batches)
                # The step's jit places a host batch far faster than put, but only within one process.
                batch = host if votes is None else loader.put(host, placed, data.batch_size)
            num = host["weight"].shape[0] if train.steps_per_dispatch > 1 else 1
            # jit returns once it has compiled
            traced = jax.profiler.StepTraceAnnotation("train", step_num=step + 1)
            with clock("step" if num in compiled else "compile"), traced:
                compiled.add(num)
                state, metrics = strategy.step(state, batch)
                if votes is not None:
                    metrics = metrics | votes.cast(stop.signum)
            return num, host, metrics

        def stopping() -> int:
            """The signal to stop for, the same in all processes at the same step; 0 for none."""
            if votes is None:
                return stop.signum
            stop.agreed(votes.agreed)
            return votes.agreed

        def interrupted(phase: str = "evaluation") -> bool:
            """Whether to leave an evaluation: asked between its batches, by all."""
            watchdog.beat(phase, step)
            if votes is not None:
                votes.ask(stop.signum)
            return bool(stopping())

        # ---- the first dispatch: what cannot run ends here, before anything is written
        first = None
        if step < program.num_steps:
            closing.callback(profile.discard)
            profile.start_at(step, lambda: None)
            first = dispatch()
            with clock(
                "step"
            ):  # the one time that the host waits: for want of memory, it fails here
                metrics = {k: np.atleast_1d(np.asarray(v)) for k, v in first[2].items()}
            if train.nonfinite == "stop":
                check_finite(step + first[0], metrics)
        if interrupted("the first step"):
            raise Stopped(stopping(), step, None)
        agree.from_first(lambda: begin(step), "writing config.json")
        closing.callback(profile.close)
        # ---- output
        writer = Writer(directory, step, log, config)
        closing.callback(writer.close)
        bar = progress.Bar(program.num_steps, step, program.examples, program.mesh)
        closing.callback(bar.close)
        logs = Log(writer, bar, log, train.nonfinite, step, votes)
        epoch = max(1, round(len(program.source) / program.examples))
        eval_every, save_every = evals.every or epoch, checkpoint.every or epoch
        measured: dict[str, float] = {}

        def save() -> None:
            logs.drain()  # a step is saved only once its metrics are known to be finite
            writer.flush()
            skipped.count()
            with clock("checkpoint"):
                agree.from_first(holds, "looking at the run directory")
                extra = {
                    "data": loader.position(step, program.examples, len(program.source)),
                    "config": config,
                    "identity": identity,
                }
                if program.privacy:
                    extra["noise_multiplier"] = program.privacy.noise_multiplier
                checkpoints.save(state, step, measured, extra)
                stop.stands = "the last complete checkpoint stands"

        def measure() -> None:
            nonlocal measured
            logs.drain()
            logs.flush(step)
            with clock("evaluation"):
                found = evaluate(*strategy.eval_variables(state), interrupted)
            if found is not None:
                measured = found | skipped.count()
                if program.privacy:
                    measured["privacy/epsilon"] = program.privacy.epsilon(step)
                writer.write(step, measured)
                bar.evaluated(step, measured)

        # ---- the loop
        while step < program.num_steps:
            measured = {}
            if first is None:
                profile.start_at(step, logs.drain)
            (num, host, metrics), first = first or dispatch(), None
            if bar.chip and not bar.work:  # costs 0.2 s, while the devices are at their first step
                bar.work = flops.of_step(program.task, program.abstract_batch())
            before, step = step, step + num
            writer.examples(before, host["example_id"])
            with clock("step"):
                logs.add(step, metrics, train.steps_in_flight)
            if profile.stop_at(step, logs.drain):
                bar.restart_clock()
            if stopping():
                break
            if step < program.num_steps:
                eval_due = step // eval_every > before // eval_every
                save_due = step // save_every > before // save_every
                if eval_due:
                    measure()
                if save_due:
                    save()
                if eval_due or save_due:
                    bar.restart_clock()
                if stopping():
                    break
        with clock("step"):
            logs.drain()
        # ---- the end
        if not stopping():
            measure()
        save()
        with clock("checkpoint"):
            checkpoints.wait()
        stop.stands = f"the checkpoint of step {step} stands"
        if stopping() and not (step == program.num_steps and measured):
            logs.flush(step)
            raise Stopped(stopping(), step, directory)
        summary = {
            "experiment": program.name,
            "steps": step,
            "metrics": logs.last | measured,
            "seconds": clock.summary(),
        }
        agree.from_first(holds, "looking at the run directory")
        agree.from_first(lambda: rundir.write_summary(directory, summary), "writing the summary")
    progress.end(summary, directory)
    sys.stdout.flush()
    return summary
