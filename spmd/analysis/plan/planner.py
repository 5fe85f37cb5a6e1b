"""Plan an experiment: what it needs on devices that need not be present, and which layout is best.

The entry to this package: `plan` for one layout, `search` for the best ones, `shardings` of the state,
`schedule` of the pipeline, `scaling` over several targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from spmd.analysis.plan import comms, cost, facts, isolated, memory, report
from spmd.analysis.plan import layout as layouts
from spmd.analysis.plan import scaling as curves
from spmd.analysis.plan import search as searching
from spmd.analysis.plan.compile import Failed, check_compiler
from spmd.analysis.plan.facts import Facts
from spmd.analysis.plan.layout import Layout
from spmd.analysis.plan.scaling import Bound, Point
from spmd.analysis.plan.schedule import Schedule
from spmd.analysis.plan.search import Candidate
from spmd.analysis.plan.shardings import ShardingReport
from spmd.analysis.plan.shardings import report as sharding_report
from spmd.core import tree
from spmd.core.fields import check
from spmd.experiment.base import Experiment
from spmd.hardware import targets
from spmd.strategies import AllReduce, Auto, StrategyConfig
from spmd.strategies.grads.pipeline import execute, schedules

PARALLEL_COMPILATIONS = 2  # each takes gigabytes of the host's memory


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
    devices = targets.parse(target)
    exp_facts = facts.from_experiment(exp)
    exp_layout = layouts.from_experiment(exp, devices.num_devices)
    layouts.check_fits(exp_facts, exp_layout)
    closed_form = has_closed_form(exp.strategy, exp_layout)
    if (
        exp_facts.model and exp_facts.gradients > 1
    ):  # those of its activations hold for one backward pass
        closed_form = False
    check(
        closed_form or compiled,
        f"no closed form covers strategy {exp.strategy.name} with these options: drop --no-compile, or add"
        " --strategy auto",
    )
    estimated = report.Plan(
        facts=exp_facts,
        target=devices,
        layout=exp_layout,
        strategy=exp.strategy.name,
        memory=memory.on_chip(
            memory.step_memory(exp_facts, exp_layout), exp_facts, exp_layout, devices.chip
        ),
        collectives=comms.step_collectives(exp_facts, exp_layout) if closed_form else [],
        estimate=cost.estimate(exp_facts, devices, exp_layout)
        if devices.chip and closed_form
        else None,
    )
    if not compiled:
        return estimated
    try:
        step = isolated.compile_step(exp, target)
    except Failed as error:
        return estimated._replace(failed=str(error))
    return _apply_compiled(estimated._replace(compiled=step), exp.strategy, closed_form=closed_form)


def _apply_compiled(
    estimated: report.Plan, strategy: StrategyConfig, *, closed_form: bool
) -> report.Plan:
    """The plan with what its compiled step says, where that is more exact than the closed forms."""
    step, exp_facts, exp_layout = estimated.compiled, estimated.facts, estimated.layout
    assert step is not None
    if closed_form and step.how != "compiled":
        return estimated
    collectives = comms.from_program(
        step.program, exp_layout, () if closed_form else strategy.merges_over
    )
    if not closed_form:
        replicas = max(strategy.copies // exp_layout.size("replica"), 1)
        estimated = estimated._replace(
            memory=memory.with_state(exp_facts, exp_layout, step.state, replicas),
            collectives=collectives,
        )
    if estimated.target.chip is None:
        return estimated
    estimate = cost.estimate(
        exp_facts,
        estimated.target,
        exp_layout,
        collectives,
        memory=estimated.memory,
        program=step.program,
    )
    return estimated._replace(estimate=estimate)


def shardings(exp: Experiment, target: str = "") -> ShardingReport:
    """Shardings of the state on `target` (`h100:64`, `v5p:4x4x4`; default: `cpu:` with `simulate` or 8).

    The program is that of a run, built on as many simulated devices without opening its data. ValueError
    for an unknown target, and for a state that cannot be sharded over the mesh.
    """
    devices = targets.parse(exp.target(target))
    program = exp.unread(devices.num_devices).build(source=())
    return sharding_report(program, devices, exp.strategy)


def schedule(exp: Experiment, target: str) -> Schedule:
    """The pipeline schedule of `exp` on `target`; ValueError if it has none, or an impossible one."""
    task = exp.task.build(exp.model, exp.param_dtype)
    staged = task.staged()
    stages = exp.mesh.resolve(targets.parse(target).num_devices)["stage"]
    train = exp.train
    kind, num = train.pipeline, len(staged.stacks)
    table = schedules.make(kind, stages, train.accumulate, train.virtual_stages, stacks=num)
    execute.check_layers(staged.stacks, stages, table.virtual // num)
    layers = sum(stack.layers for stack in staged.stacks)
    return Schedule(table, layers, exp.pipeline_warning(stages))


def search(
    exp: Experiment, target: str, *, best: int = 0, say: Callable[[str], None] = print
) -> list[Candidate]:
    """Every layout of `exp` on `target`: those that fit, the fastest first, then the rejected ones.

    best: number of the fastest layouts to compile. Those that do not fit by the compiler are rejected, the
    others ranked again with the collectives of the compiled program.
    """
    devices = targets.parse(target)
    check(devices.chip is not None, f"no speed is known for {target}: search on a TPU or a GPU")
    exp_facts = facts.from_experiment(exp)
    candidates = searching.search(exp_facts, devices)
    if best:
        check_compiler(devices)
        with ThreadPoolExecutor(PARALLEL_COMPILATIONS) as pool:
            compiled = pool.map(
                lambda c: _compile_candidate(exp, exp_facts, devices, c, say), candidates[:best]
            )
            candidates = sorted([*compiled, *candidates[best:]], key=searching.rank)
    return candidates


def _compile_candidate(
    exp: Experiment,
    exp_facts: Facts,
    devices: targets.Target,
    candidate: Candidate,
    say: Callable[[str], None],
) -> Candidate:
    """The candidate with the peak and the collectives of its compiled program."""
    chosen = candidate.layout
    try:
        step = isolated.compile_step(layouts.apply(chosen, exp), devices.name)
    except Failed as error:
        say(f"{chosen}: {error}")
        return candidate._replace(reason=f"the compiler: {error}")
    say(f"{chosen}: {step.how} in {step.seconds:.0f} s, peak {tree.human_bytes(step.memory.peak)}")
    if step.how != "compiled":
        return candidate
    collectives = comms.from_program(step.program, chosen)
    estimate = cost.estimate(exp_facts, devices, chosen, collectives, program=step.program)
    return candidate._replace(estimate=estimate, compiled=step.memory.peak)


def scaling(exp: Experiment, names: Sequence[str]) -> tuple[list[Point], list[Bound]]:
    """(points of weak and strong scaling over the targets, each with its fastest layout; the limits at which
    the axes of the first one become bound by communication).
    """
    check(len(names) >= 2, "scaling needs at least two targets: --targets v5p:2x2x2 v5p:4x4x4")
    slices = [targets.parse(name) for name in names]
    exp_facts = facts.from_experiment(exp)
    points = [*curves.curve(exp_facts, slices, "weak"), *curves.curve(exp_facts, slices, "strong")]
    return points, curves.bounds(exp_facts, slices[0], points[0].estimate.layout)


def has_closed_form(strategy: StrategyConfig, layout: Layout) -> bool:
    """Whether the closed forms of plan.comms and plan.memory describe `strategy`."""
    if isinstance(strategy, AllReduce):  # sends 2 (N - 1) / N of the gradients, as auto does
        plain = strategy.reduction != "hierarchical" and strategy.compress.kind == "none"
        # With fsdp, the gradient of a table is made of gathered rows instead of reduce-scattered.
        return plain and layout.size("fsdp") == 1
    return isinstance(strategy, Auto)
