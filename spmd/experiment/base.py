"""The Experiment: what to train and how to shard it; it builds a program, trains and evaluates it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from spmd import optim, strategies
from spmd.core import fields, values
from spmd.core.fields import check, free
from spmd.data import DataConfig
from spmd.experiment.budget import CommsBudget
from spmd.experiment.run import Run
from spmd.parallel import mesh
from spmd.runtime import RuntimeConfig
from spmd.strategies.privacy import Privacy
from spmd.tasks import Task
from spmd.train import CheckpointConfig, EvalConfig, LogConfig, RunConfig, TrainConfig
from spmd.train.evaluations import Evaluation, check_names
from spmd.weights.config import InitConfig

if TYPE_CHECKING:
    from etils import epath

    from spmd.train.program import Program
    from spmd.train.snapshot import Snapshot


# Placeholder number of steps while planning without data; only the schedule reads it.
UNREAD_STEPS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment, which runs unchanged on one CPU, simulated devices, a GPU node or a TPU pod."""

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
    """Differentially private training (DP-SGD): on with an epsilon or a noise multiplier."""
    mesh: mesh.MeshConfig = free(mesh.MeshConfig())
    """Sizes of the mesh axes, which multiply to the device count."""
    budget: CommsBudget = free(CommsBudget())
    """Limits on what the compiled step communicates; checked by `run.py plan --check`."""
    train: TrainConfig = free(TrainConfig())
    """Length of the run, and dispatch of steps."""
    eval: EvalConfig = free(EvalConfig())
    """Cadence of evaluations."""
    evaluations: tuple[Evaluation, ...] = free(())
    """Evaluations beside the task's metrics: other data, or anything that reads the live state."""
    checkpoint: CheckpointConfig = free(CheckpointConfig())
    """Cadence of checkpoints, and which are kept."""
    log: LogConfig = free(LogConfig())
    """Metrics, events and traces that are written."""
    run: RunConfig = free(RunConfig())
    """The run directory, and how it is used."""
    runtime: RuntimeConfig = free(RuntimeConfig())
    """Processes of the run, and time-outs."""
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
            isinstance(self.task, Task),
            f"task={values.shorten(self.task)} must be a task, as spmd.tasks.Classification()",
        )
        check(
            callable(self.model) or callable(getattr(self.model, "build", None)),
            f"model={values.shorten(self.model)} must be a model config, or an NNX module class",
        )
        check_names(self.evaluations)
        check(self.seed >= 0, f"seed={self.seed} must not be negative")
        check(self.simulate >= 0, f"simulate={self.simulate} must not be negative")

    # ---- what it is

    def config(self) -> dict[str, Any]:
        """The resolved configuration as JSON types."""
        return fields.plain(self)

    def identity(self) -> dict[str, Any]:
        """The fields that may not change within a run directory."""
        return fields.identity(self)

    # ---- what it builds

    def setup(self) -> bool:
        """Prepare jax before its backend starts: compilation cache, platforms, the run's other processes,
        simulated devices, x64.

        Returns whether the run has several processes.
        """
        import jax

        from spmd.runtime import compiled, platforms
        from spmd.runtime.join import join

        compiled.use_cache(self.run.compile_cache)
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
        """Values that all processes of a run must share: versions, and all fields except local paths."""
        local_fields = ("runtime.", "data.dir", "data.cache_dir", "run.compile_cache")
        fields_ = {k: v for k, v in fields.flatten(self).items() if not k.startswith(local_fields)}
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
        return versions | fields_

    def build(
        self,
        devices: Sequence[Any] | None = None,
        *,
        source: Any = None,
        training: bool = True,
        share: bool = False,
    ) -> Program:
        """The program: mesh, task, strategy and data.

        Args:
          devices: default: all, or the first `simulate`.
          source: the training data; None opens it, () leaves it unopened.
          training: False for a state that is only read: the batch size need not divide over the mesh.
          share: takes the compiled step of an earlier program of the same shape, which differs in knobs (the
            learning rate, the weight decay) alone.
        """
        from spmd.experiment.building import build
        from spmd.experiment.derive import derive

        exp = derive(self, planned=source is not None)
        return build(exp, devices, source, training=training, share=share)

    # ---- what it does

    def train_run(self) -> Run:
        """Train, or resume the run in the run directory; returns the finished run."""
        from spmd.runtime.stop import catch_signals

        # Other processes may be steps ahead of this one: from here on a signal waits for a common step. A
        # single process exits at once on a signal that arrives before there is a state.
        several = self.setup()
        from spmd.experiment.training import train  # after jax was set up

        with catch_signals(self.runtime.grace) if several else contextlib.nullcontext() as stop:
            return train(self, stop)

    def pipeline_warning(self, stages: int) -> str:
        """Warning about a pipeline that is mostly idle; else ""."""
        from spmd.strategies.grads.pipeline import schedules

        chunks = self.train.virtual_stages if self.train.pipeline == "interleaved" else 1
        return schedules.short(stages, self.train.accumulate, chunks) if stages > 1 else ""

    def target(self, target: str) -> str:
        """Target of a plan: `given`, else `cpu:8` or `simulate`; ValueError when both are given."""
        check(
            not (target and self.simulate),
            f"--target {target} and --simulate {self.simulate} both say how many devices there are; give one",
        )
        return target or f"cpu:{self.simulate or 8}"

    def unread(self, simulate: int = 0) -> Experiment:
        """This experiment with its data unopened, for planning: on simulated devices, or (0) on those that
        `build` receives.
        """
        return dataclasses.replace(
            self,
            simulate=simulate,
            runtime=RuntimeConfig(num_processes=1),  # also on a node of a cluster
            train=dataclasses.replace(self.train, steps=self.train.steps or UNREAD_STEPS),
        )

    def _for_reading(self) -> Experiment:
        """This experiment without the options of a training step, so that any mesh fits."""
        train = dataclasses.replace(
            self.train, steps=UNREAD_STEPS, accumulate=1, noise_scale=False, pipeline="1f1b"
        )
        log = dataclasses.replace(self.log, layers=False)
        return dataclasses.replace(self, train=train, log=log, privacy=Privacy())

    def restore(
        self,
        step: int | None = None,
        same: Sequence[str] = ("eval", "tokenizer"),
        *,
        other_data: bool = False,
    ) -> Snapshot:
        """A checkpoint of the run directory (default: the newest) on this experiment's mesh.

        same: parts of the data whose content must be that of the run ("train", "eval", "tokenizer").
        other_data: allow other settings of `data` than the run's.
        ValueError when there is none, or when the directory holds another run.
        """
        from spmd.experiment.derive import derive
        from spmd.train import rundir

        path = rundir.locate(self.run.dir, self.name)
        check((path / "config.json").exists(), f"no run in {path}; train first, or give --run.dir")
        return derive(self, rundir.read_identity(path))._restore(path, step, same, other_data)

    def initial(self) -> Snapshot:
        """The initial state on this mesh, without a run: random, or the weights of `init.from`."""
        from spmd.experiment.derive import derive
        from spmd.train.snapshot import Snapshot

        exp = derive(self)
        program = exp._for_reading().build(source=(), training=False)
        exp.data.check_model(exp.model)
        return Snapshot(program, program.init())

    def _restore(
        self, path: epath.Path, step: int | None, same: Sequence[str], other_data: bool
    ) -> Snapshot:
        """`restore` of an experiment whose fields are those of the run in `path`."""
        from spmd.train import dataset, rundir, snapshot

        identity, located = self.identity(), fields.located_names(self)
        if other_data:
            located |= {name for name in identity if name.startswith("data.")}
        rundir.check_identity(path, identity, fields.defaults(self), located)
        program = self._for_reading().build(source=(), training=False)
        if same:
            self.data.check_model(self.model)
        sources = {
            split: functools.cache(program.open_evaluation) for split in same if split == "eval"
        }
        contents = dataset.describe_contents(self.data, sources) if same else {}
        dataset.check_unchanged(path, contents, same)

        def accept(about: dict[str, Any]) -> None:
            comparison = {"defaults": fields.defaults(self), "located": located}
            rundir.check_saved(path, about, identity, **comparison)

        return snapshot.restore(program, path, self.checkpoint, step, accept)

    def evaluate(self, step: int | None = None) -> dict[str, float]:
        """Metrics of a checkpoint of the run directory (default: the newest) on the eval split, and what the
        experiment's evaluations measure; those that give nothing are left out.
        """
        snapshot = self.restore(step)
        measured: dict[str, float | None] = dict(snapshot.evaluate())
        for evaluation in self.evaluations:
            evaluation.check(snapshot.program)
            measured |= evaluation.logged(snapshot)
        return {name: value for name, value in measured.items() if value is not None}
