"""verify of an experiment: its step on its mesh against that of one device."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from spmd import strategies
from spmd.analysis.verify import Precision, Sizes, run
from spmd.core.fields import check
from spmd.parallel import mesh

if TYPE_CHECKING:
    from spmd.analysis.verify import VerifyReport
    from spmd.experiment.base import Experiment
    from spmd.train.program import Program

ONE_PROCESS = "verify compares with one device and runs in one process; there, use --simulate 8"


def verify(exp: Experiment, steps: int = 20, *, all_meshes: bool = False) -> VerifyReport:
    """Compares the step on the experiment's mesh, or on every mesh of its devices, with one device.

    ValueError in a run of several processes, for a mesh that does not fit, or with a single device.
    """
    import jax

    from spmd.runtime import platforms

    check(steps >= 1, f"steps={steps} must be at least 1")
    check(not exp.setup(), ONE_PROCESS)
    platforms.start()
    devices = jax.devices()[: exp.simulate or None]
    check(
        len(devices) > 1,
        f"there is one device ({devices[0].device_kind}), and nothing to compare it with: use"
        " --simulate 8",
    )
    source = exp.data.open_checked("train")

    def build(precision: Precision, sizes: Sizes | None) -> Program:
        model = exp.model
        if precision.decides and getattr(model, "dtype", ""):
            model = dataclasses.replace(model, dtype="")
        cut = mesh.MeshConfig(**({"data": 1} | dict(sizes or {})))
        num = math.prod(cut.sizes().values())
        # Replicas each add their own noise, which no other strategy does.
        alike = exp.privacy.on and exp.strategy.private_parts > 1
        other = dataclasses.replace(
            exp,
            model=model,
            mesh=cut,
            param_dtype=precision.param_dtype,
            strategy=exp.strategy if alike or sizes is not None else strategies.Auto(),
        )
        return other.build(devices[:num], source=source)

    precision = Precision.of_experiment(exp.param_dtype, getattr(exp.model, "dtype", ""))
    sizes = exp.mesh.resolve(len(devices))
    return run(
        build,
        [sizes] if not all_meshes else None,
        precision,
        steps,
        len(devices),
        exp.strategy.name,
    )
