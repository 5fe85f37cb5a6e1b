"""run.py verify: the step on the mesh against the step on one device."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from spmd import registry
from spmd.experiment import ONE_PROCESS, Experiment
from spmd.fields import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared, and where the result goes."""

    steps: int = 20
    """Steps compared, each from the state that one device has reached."""
    all_meshes: bool = False
    """Every way to cut the devices over the axes that the model has, instead of the mesh given."""
    json: str = ""
    """File for the result, every leaf in it; - prints it instead of the table."""

    def __post_init__(self) -> None:
        check(self.steps >= 1, f"steps={self.steps} must be at least 1")


def run(name: str, words: Sequence[str]) -> int:
    """Exit code 0 when every mesh that can be cut agrees in float64, 1 when one departs."""
    exp, options = registry.load(name, words, Options)
    from spmd.runtime import EXIT_FAILED

    folder = Path(options.json).parent
    check(folder.is_dir(), f"json={options.json}: there is no directory {folder}")
    check(not exp.setup(), ONE_PROCESS)
    report = simulated(exp).verify(options.steps, all_meshes=options.all_meshes)
    text = json.dumps(report.json(), indent=1)
    if options.json == "-":
        print(text)
    else:
        print(report)
        if options.json:
            Path(options.json).write_text(f"{text}\n")
    return 0 if report.proven else EXIT_FAILED


def simulated(exp: Experiment) -> Experiment:
    """The experiment on eight simulated devices where there is one device only."""
    if exp.simulate or not _alone():
        return exp
    print("one device only: simulating 8", file=sys.stderr)
    return dataclasses.replace(exp, simulate=8)


def _alone() -> bool:
    """Whether JAX finds a single device; leaves it as if it had not been started."""
    import jax
    from jax.extend.backend import clear_backends

    from spmd.runtime import platforms

    platforms.choose()
    platforms.start()
    alone = jax.device_count() == 1
    if alone:
        clear_backends()
    return alone
