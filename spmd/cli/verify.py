"""run.py verify: compare the step on the mesh with the step on one device."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from spmd.analysis.verify.experiment import ONE_PROCESS, verify
from spmd.core.fields import check
from spmd.core.storage import json_text
from spmd.experiment import registry
from spmd.experiment.base import Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Steps and meshes to compare, and where the result goes."""

    steps: int = 20
    """Steps to compare, each from the state that one device has reached."""
    all_meshes: bool = False
    """Compare all factorisations of the devices over the axes that can shard the model, not only the mesh
    given."""
    json: str = ""
    """File for the result with every leaf; - prints it instead of the table."""

    def __post_init__(self) -> None:
        check(self.steps >= 1, f"steps={self.steps} must be at least 1")


def run(name: str, words: Sequence[str]) -> int:
    """Exit code 0 when every mesh that fits agrees in float64, 1 when one differs."""
    exp, options = registry.load(name, words, VerifyOptions)
    from spmd.runtime import EXIT_FAILED

    folder = Path(options.json).parent
    check(folder.is_dir(), f"json={options.json}: there is no directory {folder}")
    check(not exp.setup(), ONE_PROCESS)
    report = verify(simulate_devices(exp), options.steps, all_meshes=options.all_meshes)
    text = json_text(report.json(), indent=1)
    if options.json == "-":
        print(text)
    else:
        print(report)
        if options.json:
            Path(options.json).write_text(f"{text}\n")
    return 0 if report.verified else EXIT_FAILED


def simulate_devices(exp: Experiment) -> Experiment:
    """The experiment on eight simulated devices, if the machine has only one device."""
    if exp.simulate or not _single_device():
        return exp
    print("one device only: simulating 8", file=sys.stderr)
    return dataclasses.replace(exp, simulate=8)


def _single_device() -> bool:
    """Whether JAX finds a single device; shuts its backend down again if so, since only a backend that has
    not been started can simulate devices.
    """
    import jax
    from jax.extend.backend import clear_backends

    from spmd.runtime import platforms

    platforms.choose()
    platforms.start()
    single = jax.device_count() == 1
    if single:
        clear_backends()
    return single
