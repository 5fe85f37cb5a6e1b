"""run.py [train]: trains or resumes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spmd import experiment


def run(name: str, words: Sequence[str]) -> int:
    """Exit code 0 when finished, 128 + signal when stopped, 1 when the loss diverged."""
    exp, _ = experiment.override(experiment.from_file(experiment.find(name)), words)
    from spmd.train.loop import NonFinite, Stopped

    try:
        exp.train_run()
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
