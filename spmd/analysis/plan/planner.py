"""Plan an experiment: what it needs on devices that need not be present, and which layout is best."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from spmd.analysis.plan import ahead
from spmd.core.fields import check
from spmd.experiment.base import Experiment
from spmd.hardware import targets
from spmd.parallel import mesh
from spmd.strategies import AllReduce, Auto, StrategyConfig

if TYPE_CHECKING:
    from spmd.analysis.plan import report
    from spmd.analysis.plan.facts import Facts
    from spmd.analysis.plan.layout import Layout
    from spmd.analysis.plan.scaling import Bound, Point
    from spmd.analysis.plan.schedule import Schedule
    from spmd.analysis.plan.search import Candidate

PARALLEL_COMPILATIONS = 2  # each takes gigabytes of the host's memory


def facts(exp: Experiment) -> Facts:
    """The facts of `exp` that do not depend on its mesh; touches no device and reads no data."""
    from spmd.analysis.plan.facts import from_program

    unread = exp.unread(1)
    single = dataclasses.replace(
        unread,
        mesh=mesh.MeshConfig(data=1),
        train=dataclasses.replace(unread.train, accumulate=1),
    )
    return from_program(single.build(source=()), exp.model, chunks=getattr(exp.task, "chunks", 1))


def has_closed_form(strategy: StrategyConfig, layout: Layout) -> bool:
    """Whether the closed forms of plan.comms and plan.memory describe `strategy`."""
    if isinstance(strategy, AllReduce):  # sends 2 (N - 1) / N of the gradients, as auto does
        plain = strategy.reduction != "hierarchical" and strategy.compress.kind == "none"
        # With fsdp, the gradient of a table is made of gathered rows instead of reduce-scattered.
        return plain and layout.size("fsdp") == 1
    return isinstance(strategy, Auto)


def layout(exp: Experiment, num_devices: int) -> Layout:
    """The layout of `exp` on `num_devices` devices."""
    from spmd.analysis.plan.layout import Layout

    auto = exp.strategy if isinstance(exp.strategy, Auto) else Auto()
    model: Any = exp.model
    train = exp.train
    sizes = {axis: n for axis, n in exp.mesh.resolve(num_devices).items() if n > 1}
    pipeline = train.pipeline if "stage" in sizes else "1f1b"
    return Layout(
        sizes,
        zero=auto.zero,
        sequence_parallel=auto.sequence_parallel,
        accumulate=train.accumulate,
        remat=getattr(model, "remat", "none"),
        saved=getattr(model, "saved", ()),
        pipeline=pipeline,
        virtual=train.virtual_stages if pipeline == "interleaved" else 1,
        context=getattr(model, "context", "ring") if "context" in sizes else "ring",
    )


def plan(exp: Experiment, target: str, *, compiled: bool = True) -> report.Plan:
    """Plans `exp` on `target`.

    Args:
        exp: the experiment.
        target: the devices, for example `h100:64`.
        compiled: also compile the experiment's own step for it, in a process of its own. A strategy without
            closed forms is described by the compiled step alone.

    Raises:
        ValueError: the experiment does not fit the target's mesh, the TPU compiler is not installed, or
            compilation is off for a strategy that needs it.
    """
    from spmd.analysis.plan import comms, cost, memory, report
    from spmd.analysis.plan import layout as layouts
    from spmd.analysis.plan.compile import Failed

    on = targets.parse(target)
    exp_facts, exp_layout = facts(exp), layout(exp, on.num_devices)
    layouts.check_fits(exp_facts, exp_layout)
    closed_form = has_closed_form(exp.strategy, exp_layout)
    check(
        closed_form or compiled,
        f"no closed form covers strategy {exp.strategy.name} with these options: drop --no-compile, or add"
        " --strategy auto",
    )
    result = report.Plan(
        facts=exp_facts,
        target=on,
        layout=exp_layout,
        strategy=exp.strategy.name,
        memory=memory.step_memory(exp_facts, exp_layout),
        collectives=comms.step_collectives(exp_facts, exp_layout) if closed_form else [],
        estimate=cost.estimate(exp_facts, on, exp_layout) if on.chip and closed_form else None,
    )
    if not compiled:
        return result
    try:
        step = ahead.compiled(exp, target)
    except Failed as error:
        return result._replace(failed=str(error))
    result = result._replace(compiled=step)
    if closed_form and step.how != "compiled":
        return result
    merges_over = () if closed_form else exp.strategy.merges_over
    collectives = comms.from_program(step.program, exp_layout, merges_over)
    if not closed_form:
        replicas = max(exp.strategy.copies // exp_layout.size("replica"), 1)
        result = result._replace(
            memory=memory.with_state(exp_facts, exp_layout, step.state, replicas),
            collectives=collectives,
        )
    if on.chip is None:
        return result
    estimate = cost.estimate(exp_facts, on, exp_layout, collectives, memory=result.memory)
    return result._replace(estimate=estimate)


def schedule(exp: Experiment, target: str) -> Schedule:
    """The pipeline schedule of `exp` on `target`; ValueError if it has none, or an impossible one."""
    import jax

    from spmd.analysis.plan.schedule import Schedule
    from spmd.strategies.grads.pipeline import execute, schedules

    task = exp.task.build(exp.model, exp.param_dtype)
    task.staged()
    stages = exp.mesh.resolve(targets.parse(target).num_devices)["stage"]
    train = exp.train
    table = schedules.make(train.pipeline, stages, train.accumulate, train.virtual_stages)
    layers = execute.num_layers(jax.eval_shape(task.init, jax.random.key(0))[0], task.dims)
    execute.check_layers(layers, stages, table.virtual)
    return Schedule(table, layers, exp.pipeline_warning(stages))


def search(
    exp: Experiment, target: str, *, best: int = 0, say: Callable[[str], None] = print
) -> list[Candidate]:
    """Every layout of `exp` on `target`: those that fit, the fastest first, then the rejected ones.

    best: number of the fastest layouts to compile. Those that do not fit by the compiler are rejected, the
    others ranked again with the collectives of the compiled program.
    """
    from spmd.analysis.plan import search as searching

    on = targets.parse(target)
    check(on.chip is not None, f"no speed is known for {target}: search on a TPU or a GPU")
    exp_facts = facts(exp)
    candidates = searching.search(exp_facts, on)
    if best:
        ahead.check_compiler(on)
        with ThreadPoolExecutor(PARALLEL_COMPILATIONS) as pool:
            compiled = pool.map(lambda c: _compiled(exp, exp_facts, on, c, say), candidates[:best])
            candidates = sorted([*compiled, *candidates[best:]], key=searching.rank)
    return candidates


def _compiled(
    exp: Experiment,
    exp_facts: Facts,
    on: targets.Target,
    candidate: Candidate,
    say: Callable[[str], None],
) -> Candidate:
    """The candidate with the peak and the collectives of its compiled program."""
    from spmd.analysis.plan import comms, cost
    from spmd.analysis.plan.compile import Failed
    from spmd.core import tree

    chosen = candidate.layout
    try:
        step = ahead.compiled(with_layout(exp, chosen), on.name)
    except Failed as error:
        say(f"{chosen}: {error}")
        return candidate._replace(reason=f"the compiler: {error}")
    say(f"{chosen}: {step.how} in {step.seconds:.0f} s, peak {tree.human_bytes(step.memory.peak)}")
    if step.how != "compiled":
        return candidate
    collectives = comms.from_program(step.program, chosen)
    estimate = cost.estimate(exp_facts, on, chosen, collectives)
    return candidate._replace(estimate=estimate, compiled=step.memory.peak)


def with_layout(exp: Experiment, chosen: Layout) -> Experiment:
    """`exp` with a layout of a search."""
    sizes = {"data": 1} | dict(chosen.mesh)
    model = exp.model
    if hasattr(model, "remat"):
        model = dataclasses.replace(model, remat=chosen.remat)
    if chosen.size("context") > 1:
        model = dataclasses.replace(model, context=chosen.context)
    train = dataclasses.replace(exp.train, accumulate=chosen.accumulate)
    if chosen.stages > 1:
        train = dataclasses.replace(
            train,
            pipeline=chosen.pipeline,
            virtual_stages=chosen.virtual if chosen.virtual > 1 else train.virtual_stages,
        )
    return dataclasses.replace(
        exp,
        model=model,
        mesh=mesh.MeshConfig(**sizes),
        strategy=Auto(
            zero=3 if chosen.zero == 3 else 1, sequence_parallel=chosen.sequence_parallel
        ),
        train=train,
    )


def scaling(exp: Experiment, names: Sequence[str]) -> tuple[list[Point], list[Bound]]:
    """(points of weak and strong scaling over the targets, each with its fastest layout; the limits at which
    the axes of the first one become bound by communication).
    """
    from spmd.analysis.plan import scaling as curves

    check(len(names) >= 2, "scaling needs at least two targets: --targets v5p:2x2x2 v5p:4x4x4")
    on = [targets.parse(name) for name in names]
    exp_facts = facts(exp)
    points = [*curves.curve(exp_facts, on, "weak"), *curves.curve(exp_facts, on, "strong")]
    return points, curves.bounds(exp_facts, on[0], points[0].estimate.layout)
