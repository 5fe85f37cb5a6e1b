"""The training loop: resume, step, log one step late, evaluate, save, stop cleanly."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from spmd.data import DataConfig, loader
from spmd.strategies import base
from spmd.train import CheckpointConfig, EvalConfig, LogConfig, TrainConfig, progress, rundir
from spmd.train.checkpoint import Checkpoints
from spmd.train.evaluate import evaluator
from spmd.train.metrics import Writer


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

    def abstract_state(self) -> base.TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self.strategy.init, jax.random.key(0))


class Stopped(Exception):
    """The run was asked to stop and has saved; `signal` says by what."""

    def __init__(self, signum: int, step: int, directory: epath.Path):
        super().__init__(
            f"stopped by {signal.Signals(signum).name} at step {step}, state saved in"
            f" {directory}; the same command resumes it"
        )
        self.signum = signum


class NonFinite(ArithmeticError):
    """Loss or gradient became NaN or infinite."""


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Catches SIGINT and SIGTERM: the yielded function tells which came first (0: none). A second
    SIGINT leaves at once.
    """
    got = {"signum": 0}

    def handler(signum: int, frame: Any) -> None:
        del frame
        got["signum"] = got["signum"] or signum

    # Python's handlers wait while the main thread compiles; the wake-up pipe and its thread do not.
    read, write = os.pipe()
    os.set_blocking(write, False)
    previous: dict[int, Any] = {}
    woken = -1
    with contextlib.suppress(ValueError):  # not in the main thread: signals are the caller's
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, handler)
        woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch_signals, args=(read,), daemon=True)
    watcher.start()
    try:
        yield lambda: got["signum"]
    finally:
        if previous:
            signal.set_wakeup_fd(woken)
        for signum, old in previous.items():
            signal.signal(signum, old)
        os.write(write, b"\0")
        watcher.join()
        os.close(write)
        os.close(read)


def _watch_signals(read: int) -> None:
    """Reads signal numbers until 0: the first one is announced, a SIGINT after it ends the process."""
    asked = False
    while signum := os.read(read, 1)[0]:
        if asked and signum == signal.SIGINT:
            os.write(2, b"\nleft at once; the last checkpoint stands\n")
            os._exit(130)
        if not asked and signum in (signal.SIGINT, signal.SIGTERM):
            asked = True
            os.write(2, b"\nstopping: saving the state (Ctrl-C again leaves at once)\n")


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = dict.fromkeys(
            ("compile", "input", "step", "evaluation", "checkpoint"), 0.0
        )

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    def summary(self) -> dict[str, float]:
        """Seconds by phase, what is left over, and in all."""
        total = time.perf_counter() - self._began
        seconds = self.seconds | {"other": total - sum(self.seconds.values()), "total": total}
        return {phase: round(value, 3) for phase, value in seconds.items()}


class _Log:
    """Metrics of dispatches under way; fetched late, so that the host never waits for the newest."""

    def __init__(
        self, writer: Writer, bar: progress.Bar, config: LogConfig, nonfinite: str, step: int
    ):
        self._writer, self._bar, self._every = writer, bar, config.every
        self._stop_on_nonfinite = nonfinite == "stop"
        self._pending: collections.deque[tuple[int, base.Metrics]] = collections.deque()
        self._window: list[dict[str, np.ndarray]] = []
        self._reported = step
        self.last: dict[str, float] = {}

    def add(self, step: int, metrics: base.Metrics, in_flight: int) -> None:
        """Metrics of the dispatch that ends at `step`; waits for the oldest when too many are out."""
        self._pending.append((step, metrics))
        while len(self._pending) > in_flight:
            self._fetch()

    def drain(self) -> None:
        """Waits for all; what was dispatched is then known to be finite."""
        while self._pending:
            self._fetch()

    def _fetch(self) -> None:
        step, device = self._pending.popleft()
        # Not jax.device_get, which takes ten times as long for a few scalars.
        host = {k: np.atleast_1d(np.asarray(v)) for k, v in device.items()}
        bad = np.flatnonzero(host["finite"] == 0)
        if len(bad) and self._stop_on_nonfinite:
            at = step - len(host["finite"]) + int(bad[0]) + 1
            raise NonFinite(
                f"loss or gradient is not finite at step {at} (loss {host['loss'][bad[0]]}, gradient norm"
                f" {host['grad_norm'][bad[0]]}); nothing of that step was saved. Lower"
                " --optimizer.learning-rate, set --optimizer.clip-norm, or skip such steps with"
                " --train.nonfinite skip"
            )
        self._window.append(host)
        if step // self._every > self._reported // self._every:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Reports the mean of the window."""
        if not self._window:
            return
        columns = {k: np.concatenate([h[k] for h in self._window]) for k in self._window[0]}
        self._window = []
        values = {
            f"train/{k}": float(v[-1] if k == "learning_rate" else v.mean())
            for k, v in columns.items()
            if k != "finite"
        }
        values["train/skipped_steps"] = float((columns["finite"] == 0).sum())
        self.last = values
        self._reported = step
        self._writer.write(step, values | self._bar.report(step, values))


def _first_state(program: Program, checkpoints: Checkpoints, clock: Clock) -> base.TrainState:
    """The newest checkpoint on this mesh, or a fresh state; prints what the run consists of."""
    abstract, strategy = program.abstract_state(), program.strategy
    progress.start(
        program.name,
        program.mesh,
        abstract,
        strategy.state_shardings,
        program.num_steps,
        program.data.batch_size,
    )
    if not checkpoints.steps():
        with clock("compile"):
            return strategy.init(jax.random.key(program.seed))
    with clock("checkpoint"):
        state = checkpoints.restore(abstract, strategy.state_shardings)
    print(f"resuming at step {int(state.step)} of {program.num_steps}")
    return state


def _batches(program: Program, train: TrainConfig, start: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the batches from step `start` on."""
    data = program.data
    placed = jax.tree.leaves(program.strategy.batch_shardings)[0]
    return loader.train_batches(
        program.source,
        batch_size=data.batch_size,
        seed=program.seed,
        start=start,
        stop=program.num_steps,
        steps_per_dispatch=train.steps_per_dispatch,
        rows=loader.process_rows(placed, data.batch_size),
        threads=data.threads,
        buffer=data.buffer,
    )


def fit(
    program: Program,
    directory: epath.Path,
    *,
    train: TrainConfig,
    evals: EvalConfig,
    checkpoint: CheckpointConfig,
    log: LogConfig,
    config: dict[str, Any],
) -> dict[str, Any]:
    """Trains to program.num_steps from the newest checkpoint in `directory`; returns the summary.

    Raises Stopped after a signal, NonFinite when the loss diverges.
    """
    clock, strategy, data = Clock(), program.strategy, program.data
    with stop_signals() as stopped, contextlib.ExitStack() as closing:
        # ---- state: born sharded, or the newest checkpoint, on whatever mesh this is
        checkpoints = Checkpoints(directory / "checkpoints", checkpoint)
        closing.callback(checkpoints.close)
        state = _first_state(program, checkpoints, clock)
        step = int(state.step)
        # ---- input
        if train.steps_per_dispatch > 1:
            strategy = base.scanned(strategy)
        placed = jax.tree.leaves(strategy.batch_shardings)[0]
        batches = _batches(program, train, step)
        # ---- output
        writer = Writer(directory, step, tensorboard=log.tensorboard)
        closing.callback(writer.close)
        bar = progress.Bar(program.num_steps, step, data.batch_size)
        closing.callback(bar.close)
        logs = _Log(writer, bar, log, train.nonfinite, step)
        evaluate = evaluator(program.task, program.mesh, data.open("eval"), data.eval_batch_size)
        epoch = max(1, round(len(program.source) / data.batch_size))
        eval_every, save_every = evals.every or epoch, checkpoint.every or epoch
        measured: dict[str, float] = {}

        def save() -> None:
            logs.drain()  # a step is saved only once its metrics are known to be finite
            with clock("checkpoint"):
                extra = {
                    "data": loader.position(step, data.batch_size, len(program.source)),
                    "config": config,
                }
                checkpoints.save(state, step, measured, extra)

        def measure() -> None:
            nonlocal measured
            logs.drain()
            logs.flush(step)
            with clock("evaluation"):
                measured = evaluate(*strategy.eval_variables(state))
            writer.write(step, measured)
            bar.evaluated(step, measured)

        # ---- the loop
        compiled: set[int] = set()
        while step < program.num_steps:
            measured = {}
            with clock("input"):
                batch: Any = next(batches)
                # The step's jit places a host batch far faster than put, but only within one process.
                if jax.process_count() > 1:
                    batch = loader.put(batch, placed, data.batch_size)
            num = batch["weight"].shape[0] if train.steps_per_dispatch > 1 else 1
            with clock(
                "step" if num in compiled else "compile"
            ):  # jit returns once it has compiled
                compiled.add(num)
                state, metrics = strategy.step(state, batch)
            before, step = step, step + num
            with clock("step"):
                logs.add(step, metrics, train.steps_in_flight)
            if stopped():
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
        with clock("step"):
            logs.drain()
        # ---- the end
        if stopped() and step < program.num_steps:
            save()
            with clock("checkpoint"):
                checkpoints.wait()
            raise Stopped(stopped(), step, directory)
        measure()
        save()
        with clock("checkpoint"):
            checkpoints.wait()
        summary = {
            "experiment": program.name,
            "steps": step,
            "metrics": logs.last | measured,
            "seconds": clock.summary(),
        }
        rundir.write_summary(directory, summary)
    progress.end(summary, directory)
    sys.stdout.flush()
    return summary
