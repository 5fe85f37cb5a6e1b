"""run.py eval: evaluates a checkpoint of a run, on any mesh."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from spmd import registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Which checkpoint."""

    step: int = -1
    """Step of the checkpoint; -1 is the newest."""


def run(name: str, words: Sequence[str]) -> int:
    """Prints the metrics as one line of JSON."""
    exp, options = registry.load(name, words, Options)
    print(json.dumps(exp.evaluate(None if options.step < 0 else options.step)))
    return 0
