"""Build an experiment: its mesh, task, strategy and data, checked against each other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from spmd import optim
from spmd.core import batches, fields, tree
from spmd.core.fields import check
from spmd.data import DataConfig, Split
from spmd.experiment import shared
from spmd.parallel import mesh
from spmd.runtime import platforms
from spmd.strategies.base import Parts
from spmd.strategies.privacy import Mechanism
from spmd.tasks import Objective
from spmd.train.program import Program
from spmd.weights import adapters, init

if TYPE_CHECKING:
    from spmd.experiment.base import Experiment


def build(
    exp: Experiment,
    devices: Sequence[Any] | None,
    source: Any,
    *,
    training: bool,
    share: bool = False,
) -> Program:
    """The program of an experiment; arguments as in Experiment.build."""
    several = exp.setup()
    platforms.start()
    if devices is None and exp.simulate and not several:
        devices = jax.devices()[: exp.simulate]
    devices_mesh = mesh.make(exp.mesh, devices)
    batch_size = exp.data.batch_size
    if not training:
        batch_size = mesh.batch_shards(devices_mesh) * exp.strategy.copies
    check_batch_size(exp, devices_mesh, batch_size)
    check_noise_scale(exp, devices_mesh)
    if source is None:
        source = exp.data.open_checked("train")
        exp.data.check_model(exp.model)
    exp.privacy.check_use(exp.strategy, exp.data, source)
    replicas = exp.strategy.private_parts
    examples = exp.privacy.sampled(batch_size, replicas)
    num_steps = exp.train.num_steps(examples, len(source))
    if len(source):  # a plan without data has a placeholder for its number of steps
        exp.strategy.check_run(num_steps, len(source))
    mechanism = exp.privacy.mechanism(len(source), batch_size, num_steps, replicas)
    task = adapted_task(exp)
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    batch = abstract_batch(exp.data, batch_size)
    ranges: batches.Ranges = {}
    if len(source) or not training:  # a plan without data reads no batch
        ranges = batches.index_ranges(task, (params, model_state), batch)
        if exp.data.eval_transforms or exp.data.transforms:  # shapes in evaluation may be others
            evaluated = abstract_batch(exp.data, batch_size, "eval")
            batches.index_ranges(task, (params, model_state), evaluated)
    private = functools.partial(exp.privacy.order, parts=replicas)
    order = private if mechanism else exp.strategy.order
    parts = strategy_parts(exp, task, devices_mesh, batch, num_steps, examples, mechanism)
    make = shared.strategy_of if share else shared.new_strategy
    task, strategy = make(exp, parts, num_steps, examples)  # a shared one has its own task
    return Program(
        name=exp.name,
        seed=exp.seed,
        mesh=devices_mesh,
        task=task,
        strategy=strategy,
        num_steps=num_steps,
        data=exp.data,
        source=source,
        start=functools.partial(init.load_weights, exp.init, exp.task, exp.model)
        if init.needed(exp.init, exp.task)
        else None,
        order=lambda source: order(source, exp.seed, batch_size),
        privacy=mechanism,
        skips=exp.data.skips("training"),
        ranges=ranges,
    )


def adapted_task(exp: Experiment) -> Objective:
    """The objective of the task and the model, without the parameters that init or a group freezes."""
    task = exp.task.build(exp.model, exp.param_dtype)
    groups = exp.optimizer.groups
    if not any(group.freeze for group in groups):
        return adapters.adapt(task, exp.init)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    frozen = optim.frozen_names(groups, tree.named_leaves(params))
    check(
        not exp.init.lora or not frozen,
        "optimizer.groups freeze parameters, and init.lora trains only its adapters: give one of them",
    )
    freeze = (*exp.init.freeze, *frozen)
    return adapters.adapt(task, dataclasses.replace(exp.init, freeze=freeze))


def abstract_batch(
    data: DataConfig, batch_size: int, split: Split = "train"
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a global batch after its transforms."""
    return {
        name: jax.ShapeDtypeStruct(shape, dtype)
        for name, (shape, dtype) in data.abstract_batch(batch_size, split).items()
    }


def strategy_parts(
    exp: Experiment,
    task: Objective,
    devices_mesh: Mesh,
    batch: dict[str, jax.ShapeDtypeStruct],
    num_steps: int,
    examples: int,
    mechanism: Mechanism | None,
) -> Parts:
    """The parts that a strategy builds its step from.

    Args:
        exp: the experiment.
        task: what it trains, with its adapters.
        devices_mesh: the mesh.
        batch: shapes and dtypes of a global batch.
        num_steps: length of the run, for the learning-rate schedule.
        examples: examples of an optimizer step (the expected number under privacy).
        mechanism: clipping and noise of differentially private training.
    """
    check_combine(exp, task)
    check_tables(exp, task)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    decayed = optim.decay_mask(params, task.dims)
    return Parts(
        task=task,
        tx=exp.optimizer.transformation(num_steps, decayed, task.dims, examples),
        rate=exp.optimizer.rate(num_steps, examples),
        mesh=devices_mesh,
        batch=batch,
        accumulate=exp.train.accumulate,
        pipeline=exp.train.pipeline,
        virtual_stages=exp.train.virtual_stages,
        ema=exp.optimizer.ema,
        skip=exp.train.nonfinite == "skip",
        privacy=mechanism,
        noise_scale=exp.train.noise_scale,
        layers=exp.log.every if exp.log.layers else 0,
        knobs=exp.optimizer.knobs(examples) if has_knobs(exp.optimizer) else {},
        rows=exp.optimizer.rows,
        row_rates=optim.row_rates(exp.optimizer.groups, task.tables),
    )


def has_knobs(optimizer: optim.Optimizer) -> bool:
    """Whether rate and decay can be arguments of the step: those of the library read them as that alone. An
    optimizer of the user's may read the fields, and a function of Optax the rate, as constants.
    """
    chosen = [optimizer, *(group.optimizer for group in optimizer.groups if group.optimizer)]
    return all(type(each) in optim.OPTIMIZERS.values() for each in chosen)


def check_batch_size(exp: Experiment, devices_mesh: Mesh, batch_size: int) -> None:
    """ValueError when the batch shards and microbatches do not divide the batch."""
    shards = mesh.batch_shards(devices_mesh)
    rows = shards * exp.train.accumulate
    check(
        batch_size % rows == 0,
        f"data.batch_size={batch_size} does not divide over {shards} batch shards"
        f" ({mesh.describe(devices_mesh)}) x train.accumulate={exp.train.accumulate}; use"
        f" {fields.multiples(batch_size, rows)}",
    )


def check_combine(exp: Experiment, task: Objective) -> None:
    """ValueError where the gradients of the loss terms are combined, and cannot be taken one by one."""
    if task.combine is None:
        return
    takes = (
        f"task {type(exp.task).__name__} combines the gradients of its loss terms"
        f" ({type(task.combine).__name__})"
    )
    why = exp.strategy.not_by_term()
    check(
        not why,
        f"{takes}, and {why}; use --strategy auto, or allreduce or server without compression",
    )
    check(not exp.privacy.on, f"{takes}, and privacy clips the gradient of their sum; leave it off")
    check(
        not exp.train.noise_scale,
        f"{takes}, and train.noise_scale measures the gradient of their sum; leave it off",
    )


def check_tables(exp: Experiment, task: Objective) -> None:
    """ValueError where a model has sparse tables, and the experiment something that they do not take."""
    if not task.tables:
        return
    has = f"model {type(exp.model).__name__} has sparse tables ({', '.join(task.tables)}), and"
    why = exp.strategy.not_sparse()
    check(not why, f"{has} {why}; use --strategy auto, or allreduce or server without compression")
    for used, reason in (
        (exp.privacy.on, "privacy clips the gradient of each example, rows included; leave it off"),
        (
            exp.optimizer.ema,
            "optimizer.ema averages every row in every step; use --optimizer.ema 0",
        ),
        (exp.train.noise_scale, "train.noise_scale measures parameters alone; leave it off"),
        (
            exp.init.from_,
            "init.from reads parameters alone, and the rows would be random; leave it out",
        ),
        (task.combine, "the task combines gradients by loss term, which rows have only in sum"),
        (exp.mesh.stage > 1, "a pipeline does not pass rows to its stages; use --mesh.stage 1"),
    ):
        check(not used, f"{has} {reason}")


def check_noise_scale(exp: Experiment, devices_mesh: Mesh) -> None:
    """ValueError when the gradient noise scale is asked for and a batch has no parts to compare."""
    if not exp.train.noise_scale:
        return
    compares = (
        "train.noise_scale compares the gradients of parts of a batch with that of the batch, and"
    )
    check(not exp.privacy.on, f"{compares} privacy adds noise to it; leave it off")
    shards = mesh.batch_shards(devices_mesh) if exp.strategy.by_device else 1
    check(
        exp.train.accumulate * shards > 1,
        f"{compares} this batch has one part: use --train.accumulate 2 or more, or --strategy allreduce on"
        " several devices",
    )
