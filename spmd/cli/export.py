"""run.py export --experiment NAME --to DIR: a checkpoint as Hugging Face safetensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from spmd.core.fields import check
from spmd.experiment import registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `run.py export`."""

    to: str = ""
    """New directory for config.json and *.safetensors."""
    step: int = -1
    """Step of the checkpoint; -1 is the newest."""


def run(name: str, words: Sequence[str]) -> int:
    """Write the weights that are evaluated: the moving average where there is one, adapters merged."""
    exp, options = registry.load(name, words, ExportOptions)
    check(bool(options.to), "give the new directory: run.py export --experiment NAME --to DIR")
    from spmd.experiment.derive import derive
    from spmd.runtime import agree
    from spmd.train import rundir
    from spmd.weights.huggingface import names, write

    names.family_of(exp.model)
    snapshot = exp.restore(None if options.step < 0 else options.step, same=())
    check(not agree.has_peers(), "run.py export runs in one process")
    model = derive(exp, rundir.read_identity(rundir.locate(exp.run.dir, exp.name))).model
    files = write.write(options.to, model, *snapshot.program.task.plain(*snapshot.variables))
    print(f"step {snapshot.step} is in {options.to}: config.json, {', '.join(files)}")
    return 0
