"""An experiment planned: what it needs on devices that need not be there, and which layout is best."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from spmd import ahead, mesh
from spmd.experiment import Experiment
from spmd.fields import check
from spmd.plan import targets
from spmd.strategies import AllReduce, Auto, StrategyConfig

if TYPE_CHECKING:
    from spmd.plan import report
    from spmd.plan.facts import Facts
    from spmd.plan.layout import Layout
    from spmd.plan.scaling import Bound, Point
    from spmd.plan.schedule import Schedule
    from spmd.plan.search import Candidate

AT_ONCE = 2  # compilations side by side: each takes gigabytes of the host's memory


def facts(exp: Experiment) -> Facts:
    """What is known of `exp` before it is cut; touches no device and reads no data."""
    from spmd.plan import facts as known

    alone = dataclasses.replace(
        exp.unread(1),
        mesh=mesh.MeshConfig(data=1),
        train=dataclasses.replace(exp.unread(1).train, accumulate=1),
    )
    return known.of(alone.build(source=()), exp.model, chunks=getattr(exp.task, "chunks", 1))


def planned(strategy: StrategyConfig, cut: Layout) -> bool:
    """Whether the closed forms of plan.comms and plan.memory are those of `strategy`."""
    if isinstance(strategy, AllReduce):  # each sends twice (N - 1) / N of the gradients
        plain = strategy.reduction != "hierarchical" and strategy.compress.kind == "none"
        # A table's gradient is made of the rows of all devices, gathered, and not scattered as a sum.
        return plain and cut.size("fsdp") == 1
    return isinstance(strategy, Auto)


def layout(exp: Experiment, num_devices: int) -> Layout:
    """How `exp` is cut on so many devices."""
    from spmd.plan.layout import Layout

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
    """`exp` on `target`: estimated, and (compiled) its own step compiled for it, in a process of its own.

    Of a strategy whose traffic has no closed form here, the compiled step tells it. ValueError for what
    cannot be cut so, when a TPU's compiler is not installed, or when such a strategy is not to be compiled.
    """
    from spmd.plan import comms, cost, memory, report
    from spmd.plan import layout as layouts
    from spmd.plan.compile import Failed

    on = targets.parse(target)
    known, cut = facts(exp), layout(exp, on.num_devices)
    layouts.check_fits(known, cut)
    by_form = planned(exp.strategy, cut)
    check(
        by_form or compiled,
        f"of strategy {exp.strategy.name} as it is set, only the compiled program tells what moves: leave out"
        " --no-compile, or add --strategy auto",
    )
    made = report.Plan(
        facts=known,
        target=on,
        layout=cut,
        strategy=exp.strategy.name,
        memory=memory.of(known, cut),
        collectives=comms.of(known, cut) if by_form else [],
        estimate=cost.estimate(known, on, cut) if on.chip and by_form else None,
    )
    if not compiled:
        return made
    try:
        program = ahead.compiled(exp, target)
    except Failed as error:
        return made._replace(failed=str(error))
    made = made._replace(compiled=program)
    if by_form and program.how != "compiled":
        return made
    merges_over = () if by_form else exp.strategy.merges_over
    found = comms.compiled(program.program, cut, merges_over)
    if not by_form:
        replicas = max(exp.strategy.copies // cut.size("replica"), 1)
        held = memory.of_program(known, cut, program.state, replicas)
        made = made._replace(memory=held, collectives=found)
    if on.chip is None:
        return made
    return made._replace(estimate=cost.estimate(known, on, cut, found, held=made.memory))


def schedule(exp: Experiment, target: str) -> Schedule:
    """The pipeline of `exp` on `target`; ValueError where it has none, or one that cannot be."""
    import jax

    from spmd.pipeline import execute, schedules
    from spmd.plan.schedule import Schedule

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
    """Every layout of `exp` on `target`, those that fit first, the fastest first.

    best: so many of the first are compiled: those that do not fit by the compiler are rejected, and the rest
    ranked anew by the collectives that it made.
    """
    from spmd.plan import search as searching

    on = targets.parse(target)
    check(
        on.chip is not None, f"nothing is known of the speed of {target}: search on a TPU or a GPU"
    )
    known = facts(exp)
    found = searching.search(known, on)
    if best:
        ahead.ready(on)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            judged = pool.map(lambda c: _judged(exp, known, on, c, say), found[:best])
            found = sorted([*judged, *found[best:]], key=searching.rank)
    return found


def _judged(
    exp: Experiment,
    known: Facts,
    on: targets.Target,
    candidate: Candidate,
    say: Callable[[str], None],
) -> Candidate:
    """As the compiler has it: it may not fit, and communicate otherwise."""
    from spmd import tree
    from spmd.plan import comms, cost
    from spmd.plan.compile import Failed

    cut = candidate.layout
    try:
        made = ahead.compiled(arranged(exp, cut), on.name)
    except Failed as error:
        say(f"{cut}: {error}")
        return candidate._replace(reason=f"the compiler: {error}")
    say(
        f"{cut}: {made.how} in {made.seconds:.0f} s, {tree.human_bytes(made.memory.peak)} at the peak"
    )
    if made.how != "compiled":
        return candidate
    again = cost.estimate(known, on, cut, comms.compiled(made.program, cut))
    return candidate._replace(estimate=again, compiled=made.memory.peak)


def arranged(exp: Experiment, cut: Layout) -> Experiment:
    """`exp` with the layout of a search."""
    sizes = {"data": 1} | dict(cut.mesh)
    model = exp.model
    if hasattr(model, "remat"):
        model = dataclasses.replace(model, remat=cut.remat)
    if cut.size("context") > 1:
        model = dataclasses.replace(model, context=cut.context)
    train = dataclasses.replace(exp.train, accumulate=cut.accumulate)
    if cut.stages > 1:
        train = dataclasses.replace(
            train,
            pipeline=cut.pipeline,
            virtual_stages=cut.virtual if cut.virtual > 1 else train.virtual_stages,
        )
    return dataclasses.replace(
        exp,
        model=model,
        mesh=mesh.MeshConfig(**sizes),
        strategy=Auto(zero=3 if cut.zero == 3 else 1, sequence_parallel=cut.sequence_parallel),
        train=train,
    )


def scaling(exp: Experiment, names: Sequence[str]) -> tuple[list[Point], list[Bound]]:
    """Weak and strong scaling over targets, each with its fastest layout; where the first one's axes become
    bound by communication.
    """
    from spmd.plan import scaling as curves

    check(len(names) >= 2, "scaling needs two targets at least: --targets v5p:2x2x2 v5p:4x4x4")
    on = [targets.parse(name) for name in names]
    known = facts(exp)
    points = [*curves.curve(known, on, "weak"), *curves.curve(known, on, "strong")]
    return points, curves.bounds(known, on[0], points[0].estimate.layout)
