"""run.py export --experiment NAME --to DIR: a checkpoint as Hugging Face safetensors."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spmd.core.fields import check
from spmd.experiment import registry

if TYPE_CHECKING:
    from spmd.experiment.base import Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `run.py export`."""

    to: str = ""
    """New directory for config.json, *.safetensors and the files of the tokenizer."""
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
    tokens, beside = _tokenizer(exp, model)
    variables = snapshot.program.task.plain(*snapshot.variables)
    files = write.write(options.to, model, *variables, tokens=tokens, beside=beside)
    print(f"step {snapshot.step} is in {options.to}: config.json, {', '.join(files)}")
    return 0


def _tokenizer(exp: Experiment, model: Any) -> tuple[Mapping[str, Any], Mapping[str, bytes]]:
    """(fields of config.json about special tokens, the tokenizer's files); none of data that have none."""
    from spmd.data import DataConfig
    from spmd.data.text import handoff

    if type(exp.data).open_tokenizer is DataConfig.open_tokenizer:
        return {}, {}
    try:
        tokenizer = exp.data.open_tokenizer()
    except ValueError as error:  # weights can be exported where the text is not
        print(f"note: no tokenizer is written: {error}", file=sys.stderr)
        return {}, {}
    return handoff.token_ids(tokenizer), handoff.transformers_files(tokenizer, model.length)
