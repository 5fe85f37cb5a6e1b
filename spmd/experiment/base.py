"""The Experiment: what to train and how to shard it; resolved, built, run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from spmd import optim, strategies
from spmd.core import fields, values
from spmd.core.fields import check, closest, free
from spmd.data import DataConfig
from spmd.experiment.budget import CommsBudget
from spmd.experiment.run import Run
from spmd.parallel import mesh
from spmd.runtime import RuntimeConfig
from spmd.strategies.privacy import Privacy
from spmd.train import CheckpointConfig, EvalConfig, LogConfig, RunConfig, TrainConfig
from spmd.weights.config import InitConfig

if TYPE_CHECKING:
    from etils import epath

    from spmd.runtime.stop import Stop
    from spmd.train.claim import Claim
    from spmd.train.program import Program
    from spmd.train.snapshot import Snapshot


# Placeholder number of steps while planning without data; only the schedule reads it.
UNREAD_STEPS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment; unchanged on one CPU, eight simulated devices, a GPU node or a TPU pod."""

    model: Any
    """The model: a model config, or an NNX module class that takes `rngs`."""
    task: Any
    """Loss and metrics."""
    data: DataConfig
    """Input data."""
    optimizer: optim.Optimizer
    """Optimizer, schedule, clipping, decay; --optimizer NAME changes the class."""
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    """Where the weights come from, and which are trained."""
    strategy: strategies.StrategyConfig = dataclasses.field(default_factory=strategies.Auto)
    """How gradients are reduced and parameters updated; --strategy NAME changes the class."""
    privacy: Privacy = dataclasses.field(default_factory=Privacy)
    """Differentially private training (DP-SGD)."""
    mesh: mesh.MeshConfig = free(mesh.MeshConfig())
    """Sizes of the mesh axes."""
    budget: CommsBudget = free(CommsBudget())
    """Limits on what the compiled step communicates; checked by `run.py plan --check`."""
    train: TrainConfig = free(TrainConfig())
    """How long, and how steps are dispatched."""
    eval: EvalConfig = free(EvalConfig())
    """When it is evaluated."""
    checkpoint: CheckpointConfig = free(CheckpointConfig())
    """When the state is saved."""
    log: LogConfig = free(LogConfig())
    """Metrics, events and traces that are written."""
    run: RunConfig = free(RunConfig())
    """Where the run lives."""
    runtime: RuntimeConfig = free(RuntimeConfig())
    """Processes of the run, and how they stop."""
    seed: int = dataclasses.field(default=0, metadata={"most": 2**32 - 1})
    """Seed of parameters, data order and dropout."""
    param_dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Type of parameters; those of bfloat16 have float32 gradients and optimizer state."""
    simulate: int = free(0)
    """Simulated CPU devices of each process; 0 uses the real ones."""
    name: str = free("")
    """Name of the experiment; set when it is loaded."""

    def __post_init__(self) -> None:
        values.check(self)
        check(
            not isinstance(self.task, type) and callable(getattr(self.task, "build", None)),
            f"task={values.shown(self.task)} must be a task, as spmd.tasks.Classification()",
        )
        check(
            callable(self.model) or callable(getattr(self.model, "build", None)),
            f"model={values.shown(self.model)} must be a model config, or an NNX module class",
        )
        check(self.seed >= 0, f"seed={self.seed} must not be negative")
        check(self.simulate >= 0, f"simulate={self.simulate} must not be negative")

    # ---- what it is

    def config(self) -> dict[str, Any]:
        """The resolved configuration as JSON types."""
        return fields.plain(self)

    def identity(self) -> dict[str, Any]:
        """The fields that one run directory holds fixed."""
        return fields.identity(self)

    # ---- what it builds

    def setup(self) -> bool:
        """Prepares jax before its backend starts: compilation cache, platforms, the run's other processes,
        simulated devices, x64.

        Returns whether the run has several processes.
        """
        import jax

        from spmd.runtime import compiled, platforms
        from spmd.runtime.join import join

        compiled.use(self.run.compile_cache)
        if not self.simulate:
            platforms.choose()
        several = join(self.runtime, self._facts())
        if self.simulate:
            mesh.simulate(self.simulate)
        config: Any = jax.config
        if self.param_dtype == "float64" and not config.jax_enable_x64:
            config.update("jax_enable_x64", True)
        return several

    def _facts(self) -> dict[str, Any]:
        """Values that all processes of a run must share: versions, and every field but local paths."""
        own = ("runtime.", "data.dir", "data.cache_dir", "run.compile_cache")
        fields_ = {k: v for k, v in fields.flatten(self).items() if not k.startswith(own)}
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
        return versions | fields_

    def build(
        self,
        devices: Sequence[Any] | None = None,
        *,
        source: Any = None,
        training: bool = True,
    ) -> Program:
        """Mesh, task, strategy and data.

        Args:
          devices: default: all, or the first `simulate`.
          source: the training data; None opens it, () leaves it closed.
          training: False for a state that is only read: the batch size then need not divide over the mesh.
        """
        import jax

        from spmd.core import batches
        from spmd.runtime import platforms
        from spmd.strategies.base import Parts
        from spmd.train.program import Program
        from spmd.weights import adapters
        from spmd.weights import init as weights

        several = self.setup()
        platforms.start()
        if devices is None and self.simulate and not several:
            devices = jax.devices()[: self.simulate]
        cut = mesh.make(self.mesh, devices)
        ways, batch_size = mesh.batch_shards(cut), self.data.batch_size
        rows = ways * self.train.accumulate
        if not training:
            batch_size = ways * self.strategy.copies
        check(
            batch_size % rows == 0,
            f"data.batch_size={batch_size} does not divide over {ways} batch shards"
            f" ({mesh.describe(cut)}) x train.accumulate={self.train.accumulate}; use"
            f" {fields.multiples(batch_size, rows)}",
        )
        parts = self.train.accumulate * (ways if self.strategy.by_device else 1)
        compares = (
            "train.noise_scale compares the gradients of parts of a batch with that of the whole, and"
            " here"
        )
        check(
            not (self.train.noise_scale and self.privacy.on),
            f"{compares} privacy's noise is in it; leave it off",
        )
        check(
            not self.train.noise_scale or parts > 1,
            f"{compares} there is one part: use --train.accumulate 2 or more, or --strategy allreduce on"
            " several devices",
        )
        if source is None:
            source = self.data.opened("train")
            self.data.check_model(self.model)
        self.privacy.check_use(self.strategy, self.data, source)
        replicas = self.strategy.private_parts
        examples = self.privacy.sampled(batch_size, replicas)
        num_steps = self.train.num_steps(examples, len(source))
        if len(source):  # else it is only planned, for a number of steps that nobody has chosen
            self.strategy.check_run(num_steps, len(source))
        private = self.privacy.mechanism(len(source), batch_size, num_steps, replicas)
        task = adapters.adapt(self.task.build(self.model, self.param_dtype), self.init)
        abstract, model_state = jax.eval_shape(task.init, jax.random.key(0))
        mask = optim.decay_mask(abstract, task.dims)
        tx = self.optimizer.build(num_steps, mask, task.dims, examples)
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype)
            for name, (shape, dtype) in self.data.abstract_batch(batch_size).items()
        }
        ranges = batches.ranges(task, (abstract, model_state), batch) if len(source) else {}
        strategy = self.strategy.build(
            Parts(
                task=task,
                tx=tx,
                rate=self.optimizer.rate(num_steps, examples),
                mesh=cut,
                batch=batch,
                accumulate=self.train.accumulate,
                pipeline=self.train.pipeline,
                virtual_stages=self.train.virtual_stages,
                ema=self.optimizer.ema,
                skip=self.train.nonfinite == "skip",
                privacy=private,
                noise_scale=self.train.noise_scale,
            )
        )
        reading = self.strategy.order
        if private:
            reading = functools.partial(self.privacy.order, parts=replicas)
        return Program(
            name=self.name,
            seed=self.seed,
            mesh=cut,
            task=task,
            strategy=strategy,
            num_steps=num_steps,
            data=self.data,
            source=source,
            start=functools.partial(weights.start, self.init, self.model)
            if self.init.from_
            else None,
            order=lambda source: reading(source, self.seed, batch_size),
            privacy=private,
            skips=self.data.skips("training"),
            ranges=ranges,
        )

    # ---- what it does

    def train_run(self) -> Run:
        """Trains, or resumes what is in the run directory; returns the finished run."""
        from spmd.runtime.stop import catching

        # The others may be steps ahead of this process: from here on a signal waits for a common step. Alone,
        # one that comes before there is a state ends the process at once.
        several = self.setup()
        with catching(self.runtime.grace) if several else contextlib.nullcontext() as stop:
            return self._train(stop)

    def _train(self, stop: Stop | None) -> Run:
        from spmd.runtime import agree
        from spmd.train import rundir, tracker
        from spmd.train.claim import Claim

        path = rundir.locate(self.run.dir, self.name)
        known = {"defaults": fields.defaults(self), "located": fields.located_in(self)}
        with contextlib.ExitStack() as held:
            claims: list[Claim] = []  # of process 0

            def open_() -> bool:
                tracker.ready(self.log.wandb)
                options = {"fresh": self.run.fresh, "amend": self.run.amend, "known": known}
                claim = Claim(path, self.name, self.config(), self.identity(), **options)
                claims.append(claim)
                held.callback(claim.release)
                return claim.resumes

            resumes = agree.from_first(open_, "opening the run directory")
            return self._train_in(path, claims, known, stop, resumes=resumes)

    def _train_in(
        self,
        path: epath.Path,
        claims: Sequence[Claim],
        known: dict[str, Any],
        stop: Stop | None,
        *,
        resumes: bool,
    ) -> Run:
        """Trains in a run directory that process 0 holds. claims: its claim, none in other processes."""
        from spmd.runtime import agree, allocator
        from spmd.train import dataset, loop, rundir

        program = self.build()
        if program.mesh.devices.flat[0].platform == "cpu":
            allocator.keep()
        if warning := self.pipeline_warning(program.mesh.shape["stage"]):
            agree.say(warning, sys.stderr)
        program = program._replace(evaluation=self.data.opened("eval"))
        contents = dataset.contents(
            self.data, {"train": lambda: program.source, "eval": lambda: program.evaluation}
        )
        identity = self.identity() | dataset.identity(contents)
        done: dict[str, Any] | None = None
        if resumes:
            agree.from_first(lambda: dataset.check_same(path, contents), "comparing the data")
            done = agree.from_first(lambda: rundir.summary(path), "reading the summary")
        if done and done["steps"] >= program.num_steps:
            agree.say(
                f"{rundir.shown(path)} is finished: {done['steps']} steps. Train on with a larger"
                " --train.steps, or anew with --run.fresh or another --run.dir"
            )
            return Run(self, str(path), done["steps"], done["metrics"], done["seconds"])

        self._check_best(program)

        def begin(step: int) -> None:
            if resumes:
                self._say_stretched(rundir.recorded(path), program, step)
            claims[0].begin(identity, step)
            dataset.record(path, contents)

        def accept(about: dict[str, Any]) -> None:
            for claim in claims:
                claim.same_saved(about, identity, known)

        def holds() -> None:
            for claim in claims:
                claim.check()

        run = loop.Directory(
            path, self.config(), identity, resumes, accept=accept, begin=begin, holds=holds
        )
        settings = loop.Settings(self.train, self.eval, self.checkpoint, self.log, self.runtime)
        summary = loop.fit(program, run, settings, stop)
        return Run(self, str(path), summary["steps"], summary["metrics"], summary["seconds"])

    def _check_best(self, program: Program) -> None:
        """ValueError when no evaluation gives the metric by which the best checkpoint is kept."""
        from spmd.train.evaluate import metric_names

        best = self.checkpoint.best
        if not best:
            return
        names = metric_names(program.task, program.abstract_batch())
        check(
            best in names,
            f"checkpoint.best={best!r} is no metric of an evaluation.{closest(best, names)} There are:"
            f" {', '.join(names)}; '' keeps the newest checkpoints only",
        )

    def _say_stretched(self, recorded: dict[str, Any], program: Program, step: int) -> None:
        """Says so when the run's learning-rate schedule spans another number of steps than before."""
        import numpy as np

        try:
            old = recorded["config"]["train"]
            train = dataclasses.replace(self.train, steps=old["steps"], epochs=old["epochs"])
            before = train.num_steps(program.examples, len(program.source))
        except (KeyError, TypeError, ValueError):
            return  # config.json of another version
        now = program.num_steps
        if before == now or self.optimizer.schedule == "constant":
            return
        rate = lambda n: float(np.asarray(self.optimizer.rate(n, program.examples)(min(step, n))))
        rates = rate(before), rate(now)
        print(
            f"the learning-rate schedule now spans {now} steps (was {before}): at step {step} the rate is"
            f" {rates[1]:.3g} (was {rates[0]:.3g})"
        )

    def pipeline_warning(self, stages: int) -> str:
        """Warning about a pipeline that is mostly idle; else ""."""
        from spmd.strategies.grads.pipeline import schedules

        chunks = self.train.virtual_stages if self.train.pipeline == "interleaved" else 1
        return schedules.short(stages, self.train.accumulate, chunks) if stages > 1 else ""

    def target(self, given: str) -> str:
        """Target of a plan: `given`, else `cpu:8` or `simulate`; ValueError when both are given."""
        check(
            not (given and self.simulate),
            f"--target {given} and --simulate {self.simulate} both say how many devices there are; give one",
        )
        return given or f"cpu:{self.simulate or 8}"

    def unread(self, simulate: int = 0) -> Experiment:
        """This experiment with its data left closed, to be planned: on simulated devices, or (0) on those
        that `build` is handed.
        """
        return dataclasses.replace(
            self,
            simulate=simulate,
            runtime=RuntimeConfig(num_processes=1),  # alone, also on a node of a cluster
            train=dataclasses.replace(self.train, steps=self.train.steps or UNREAD_STEPS),
        )

    def _for_reading(self) -> Experiment:
        """This experiment without the options that only a training step has, so that any mesh takes it."""
        train = dataclasses.replace(
            self.train, steps=UNREAD_STEPS, accumulate=1, noise_scale=False, pipeline="1f1b"
        )
        return dataclasses.replace(self, train=train, privacy=Privacy())

    def restore(
        self, step: int | None = None, same: Sequence[str] = ("eval", "tokenizer")
    ) -> Snapshot:
        """A checkpoint of the run directory (default: the newest) on this experiment's mesh.

        same: which parts of the data must have the content that the run knows ("train", "eval", "tokenizer").
        ValueError when there is none, or when the directory's run is another one.
        """
        from spmd.train import dataset, rundir, snapshot

        path = rundir.locate(self.run.dir, self.name)
        check((path / "config.json").exists(), f"no run in {path}; train first, or give --run.dir")
        rundir.same_identity(path, self.identity(), fields.defaults(self), fields.located_in(self))
        program = self._for_reading().build(source=(), training=False)
        if same:
            self.data.check_model(self.model)
        opened = {
            split: functools.cache(program.open_evaluation) for split in same if split == "eval"
        }
        contents = dataset.contents(self.data, opened) if same else {}
        dataset.check_same(path, contents, same)

        def accept(about: dict[str, Any]) -> None:
            known = {"defaults": fields.defaults(self), "located": fields.located_in(self)}
            rundir.same_saved(path, about, self.identity(), **known)

        return snapshot.restore(program, path, self.checkpoint, step, accept)

    def evaluate(self, step: int | None = None) -> dict[str, float]:
        """Metrics of a checkpoint of the run directory (default: the newest) on the eval split."""
        return self.restore(step).evaluate()
