"""run.py plan: how an experiment lies on devices that need not be there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from spmd import experiment
from spmd.fields import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is planned for, and what is shown."""

    target: str = ""
    """cpu:8, h100:64, v5p:4x4x4 (a TPU slice, in chips); empty is cpu:8, or cpu: and --simulate."""
    show: Literal["shardings"] = "shardings"
    """shardings: every array of the state, its cut, and its bytes on each device."""
    plot: str = ""
    """Draws how the largest parameters are cut: terminal, or a FILE.html."""
    json: str = ""
    """File for the result; - prints it instead of the table."""

    def __post_init__(self) -> None:
        check(
            self.plot in ("", "terminal") or self.plot.endswith(".html"),
            f"plot={self.plot!r} must be terminal, or a file that ends in .html",
        )
        check(
            not (self.plot == "terminal" and self.json == "-"),
            "plot=terminal and json=- both print; give one of them a file",
        )


def run(name: str, words: Sequence[str]) -> int:
    """Exit code 0 once the plan is shown; it judges nothing."""
    exp, options = experiment.override(experiment.from_file(experiment.find(name)), words, Options)
    for option, value in (("json", options.json), ("plot", options.plot)):
        folder = Path(value).parent
        check(folder.is_dir(), f"{option}={value}: there is no directory {folder}")
    report = exp.plan(options.target)
    text = json.dumps(report.json(), indent=1)
    print(text if options.json == "-" else report)
    if options.json not in ("", "-"):
        Path(options.json).write_text(f"{text}\n")
    if options.plot:
        from spmd.plan import draw

        draw.plot(report, options.plot)
    return 0
