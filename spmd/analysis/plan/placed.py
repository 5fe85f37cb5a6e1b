"""plan --show shardings of an experiment: how its state lies on devices that need not be there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spmd.analysis.plan import shardings
from spmd.hardware import targets

if TYPE_CHECKING:
    from spmd.experiment.base import Experiment


def placed(exp: Experiment, target: str = "") -> shardings.ShardingReport:
    """Shardings of the state on `target` (`h100:64`, `v5p:4x4x4`; default: `cpu:` with `simulate` or 8).

    The program is that of a run, built on as many simulated devices without opening its data. ValueError
    for an unknown target, and for a state that cannot be sharded over the mesh.
    """

    parsed = targets.parse(exp.target(target))
    program = exp.unread(parsed.num_devices).build(source=())
    return shardings.report(program, parsed, exp.strategy)
