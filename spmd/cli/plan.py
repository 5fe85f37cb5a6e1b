"""run.py plan: what an experiment needs on devices that need not be present, and which layout is best."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from spmd.core.fields import check
from spmd.core.storage import json_text
from spmd.experiment import registry
from spmd.experiment.base import Experiment
from spmd.runtime import platforms


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Target of the plan, and what to show."""

    target: str = ""
    """cpu:8, h100:64, v5p:4x4x4 (a TPU slice in chips); empty: cpu:8, or cpu: with --simulate devices."""
    show: Literal["summary", "memory", "comms", "kernels", "shardings", "schedule", "scaling"] = (
        "summary"
    )
    """summary: all in short; memory: bytes of a device by part; comms: every collective with its mesh axes
    and source line; kernels: what a TPU computes, by its compiler's cycles; shardings: every array of the
    state and its sharding; schedule: the microbatch of each pipeline stage at each tick; scaling: over
    --targets."""
    compile: bool = True
    """Compile the step: with the TPU compiler, which needs no TPU, else for simulated devices. Without it,
    everything is estimated."""
    check: bool = False
    """Check the experiment's communication budget: if the compiled program exceeds it, print the collectives
    and exit with code 1."""
    search: bool = False
    """Try every mesh, ZeRO level, accumulation, remat policy, sequence parallelism, pipeline schedule and
    kind of context."""
    best: int = 0
    """Number of the fastest layouts of --search to compile."""
    targets: tuple[str, ...] = ()
    """Targets for --show scaling, the smallest first."""
    plot: str = ""
    """Draw the shards of the largest parameters (--show shardings): terminal, or FILE.html."""
    html: str = ""
    """FILE.html: the plan or the search as a page with pictures."""
    json: str = ""
    """File for the result; - prints it instead of the table."""

    def __post_init__(self) -> None:
        check(
            self.plot in ("", "terminal") or self.plot.endswith(".html"),
            f"plot={self.plot!r} must be terminal, or a file that ends in .html",
        )
        check(
            not self.plot or self.show == "shardings",
            "plot draws the shards of arrays: give --show shardings",
        )
        check(
            not self.html or self.html.endswith(".html"),
            f"html={self.html!r} must be a file that ends in .html",
        )
        check(
            not self.html or self.show in ("summary", "memory", "comms", "kernels"),
            f"html shows a plan or a search, not --show {self.show}",
        )
        check(
            not (self.plot == "terminal" and self.json == "-"),
            "plot=terminal and json=- both print; give a file for one of them",
        )
        check(
            not self.check
            or (self.compile and not self.search and self.show not in ("shardings", "schedule")),
            "--check reads the compiled program: drop --no-compile, --search, and --show shardings"
            " or schedule",
        )
        check(self.best >= 0, f"best={self.best} must not be negative")
        check(
            not self.best or self.search,
            "best is the number of layouts of --search to compile: give both",
        )
        check(
            bool(self.targets) == (self.show == "scaling"),
            "--show scaling and --targets v5p:2x2x2 v5p:4x4x4 go together: give both",
        )


def run(name: str, words: Sequence[str]) -> int:
    """Exit code 0 if the plan fits, 1 if it does not, or no layout of a search does."""
    exp, options = registry.load(name, words, PlanOptions)
    for option in ("json", "plot", "html"):
        folder = Path(value := getattr(options, option)).parent
        check(folder.is_dir(), f"{option}={value}: there is no directory {folder}")
    platforms.use_cpu()
    text, plain, fits = _result(exp, options)
    plain_text = json_text(plain, indent=1)
    print(plain_text if options.json == "-" else text)
    if options.json not in ("", "-"):
        Path(options.json).write_text(f"{plain_text}\n")
    return 0 if fits else 1


def _result(exp: Experiment, options: PlanOptions) -> tuple[str, Any, bool]:
    """(text, JSON, whether it fits)."""
    from spmd.analysis.plan import html, kernels, planner, report
    from spmd.experiment import budget
    from spmd.hardware import targets

    if options.show == "shardings":
        shardings = planner.shardings(exp, options.target)
        if options.plot:
            from spmd.analysis.plan import draw

            draw.plot(shardings, options.plot)
        return str(shardings), shardings.json(), True
    if options.show == "scaling":
        points, bounds = planner.scaling(exp, options.targets)
        plain = {"points": [p.json() for p in points], "bounds": [b.json() for b in bounds]}
        return report.scaling_view(points, bounds), plain, True
    target = exp.target(options.target)
    if options.show == "schedule":
        pipeline = planner.schedule(exp, target)
        return str(pipeline), pipeline.json(), True
    if options.search:
        say = lambda text: print(text, file=sys.stderr)  # stdout may be the JSON's
        candidates = planner.search(exp, target, best=options.best, say=say)
        if options.html:
            html.write_search(candidates, targets.parse(target), exp.name, options.html)
        text = report.search_view(candidates, targets.parse(target))
        return text, [c.json() for c in candidates], candidates[0].fits
    check(
        not options.check or exp.budget.limits,
        "--check: the experiment has no budget; give it one, for example"
        " budget=CommsBudget(forbid=('all-to-all',)),"
        " or --budget.forbid all-to-all",
    )
    plan = planner.plan(exp, target, compiled=options.compile)
    if options.html:
        html.write(plan, options.html)
    views = {"memory": report.memory_view, "comms": report.comms_view, "summary": report.summary}
    views["kernels"] = kernels.kernels_view
    text, plain, fits = views[options.show](plan), plan.json(), plan.fits
    if options.check and plan.compiled is not None:
        lines = budget.find_violations(exp.budget, plan.compiled.program)
        verdict = ["the budget is exceeded:", *lines] if lines else ["the budget holds"]
        text = "\n".join([text, "", *verdict])
        plain, fits = plain | {"violations": lines}, fits and not lines
    return text, plain, fits
