"""run.py plan: what an experiment needs on devices that need not be there, and which layout is best."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from spmd import registry
from spmd.experiment import Experiment
from spmd.fields import check
from spmd.runtime import platforms
from spmd.storage import json_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is planned for, and what is shown."""

    target: str = ""
    """cpu:8, h100:64, v5p:4x4x4 (a TPU slice, in chips); empty is cpu:8, or cpu: and --simulate."""
    show: Literal["summary", "memory", "comms", "shardings", "schedule", "scaling"] = "summary"
    """summary: all of it in short; memory: bytes of a device by part; comms: every collective, with its mesh
    axis and its line; shardings: every array of the state and its cut; schedule: which microbatch each
    stage of a pipeline works on at which tick; scaling: over --targets."""
    compile: bool = True
    """Compiles the step: by the TPU's own compiler, which need not have one, else on simulated devices;
    without, everything is estimated."""
    check: bool = False
    """Holds the experiment's budget (what the step may communicate): exit code 1 and the collectives when the
    compiled program breaks it."""
    search: bool = False
    """Tries every mesh, ZeRO level, accumulation, remat policy, sequence parallelism, pipeline schedule and
    kind of context."""
    best: int = 0
    """So many of the best that --search finds are compiled."""
    targets: tuple[str, ...] = ()
    """Targets for --show scaling, the smallest first."""
    plot: str = ""
    """Draws how the largest parameters are cut (--show shardings): terminal, or a FILE.html."""
    html: str = ""
    """FILE.html: the plan, or the search, as one page with its pictures."""
    json: str = ""
    """File for the result; - prints it instead of the table."""

    def __post_init__(self) -> None:
        check(
            self.plot in ("", "terminal") or self.plot.endswith(".html"),
            f"plot={self.plot!r} must be terminal, or a file that ends in .html",
        )
        check(
            not self.plot or self.show == "shardings",
            "plot draws how arrays are cut: give --show shardings",
        )
        check(
            not self.html or self.html.endswith(".html"),
            f"html={self.html!r} must be a file that ends in .html",
        )
        check(
            not self.html or self.show in ("summary", "memory", "comms"),
            f"html is of a plan or a search, not of --show {self.show}",
        )
        check(
            not (self.plot == "terminal" and self.json == "-"),
            "plot=terminal and json=- both print; give one of them a file",
        )
        check(
            not self.check
            or (self.compile and not self.search and self.show not in ("shardings", "schedule")),
            "--check reads the compiled program: give it without --no-compile, --search, and --show shardings"
            " or schedule",
        )
        check(self.best >= 0, f"best={self.best} must not be negative")
        check(
            not self.best or self.search, "best says how many of --search are compiled: give both"
        )
        check(
            bool(self.targets) == (self.show == "scaling"),
            "--show scaling and --targets v5p:2x2x2 v5p:4x4x4 go together: give both",
        )


def run(name: str, words: Sequence[str]) -> int:
    """Exit code 0 once the plan is shown, 1 when it does not fit or nothing does."""
    exp, options = registry.load(name, words, Options)
    for option in ("json", "plot", "html"):
        folder = Path(value := getattr(options, option)).parent
        check(folder.is_dir(), f"{option}={value}: there is no directory {folder}")
    platforms.use_cpu()
    text, plain, fits = _made(exp, options)
    shown = json_text(plain, indent=1)
    print(shown if options.json == "-" else text)
    if options.json not in ("", "-"):
        Path(options.json).write_text(f"{shown}\n")
    return 0 if fits else 1


def _made(exp: Experiment, options: Options) -> tuple[str, Any, bool]:
    """(text, JSON, whether it fits)."""
    from spmd import planner
    from spmd.plan import budget, html, report, targets

    if options.show == "shardings":
        placed = exp.plan(options.target)
        if options.plot:
            from spmd.plan import draw

            draw.plot(placed, options.plot)
        return str(placed), placed.json(), True
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
        found = planner.search(exp, target, best=options.best, say=say)
        if options.html:
            html.write_search(found, targets.parse(target), exp.name, options.html)
        text = report.search_view(found, targets.parse(target))
        return text, [c.json() for c in found], found[0].fits
    check(
        not options.check or exp.budget.asks,
        "--check: the experiment has no budget; give it one, as budget=CommsBudget(forbid=('all-to-all',)),"
        " or --budget.forbid all-to-all",
    )
    plan = planner.plan(exp, target, compiled=options.compile)
    if options.html:
        html.write(plan, options.html)
    views = {"memory": report.memory_view, "comms": report.comms_view, "summary": report.summary}
    text, plain, holds = views[options.show](plan), plan.json(), plan.fits
    if options.check and plan.compiled is not None:
        lines = budget.broken(exp.budget, plan.compiled.program)
        said = ["the budget is broken:", *lines] if lines else ["the budget holds"]
        text, plain, holds = (
            "\n".join([text, "", *said]),
            plain | {"broken": lines},
            holds and not lines,
        )
    return text, plain, holds
