"""run.py eval: evaluate a checkpoint of a run, on any mesh."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence

from spmd.core.storage import json_text
from spmd.experiment import registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of `run.py eval`."""

    step: int = -1
    """Step of the checkpoint; -1 is the newest."""


def run(name: str, words: Sequence[str]) -> int:
    """Print the metrics as one line of JSON."""
    exp, options = registry.load(name, words, EvalOptions)
    metrics = exp.evaluate(None if options.step < 0 else options.step)
    print(json_text(metrics))
    if nonfinite := [name for name, value in metrics.items() if not math.isfinite(value)]:
        print(f"note: {', '.join(nonfinite)}: not finite, null in JSON", file=sys.stderr)
    return 0
