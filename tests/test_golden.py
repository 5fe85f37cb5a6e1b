"""Every experiment's resolved configuration, parameter shapes and specs, as files that a diff shows.

`make golden` writes them anew.
"""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest

from spmd.core import tree
from spmd.data.sources import ArraySource
from spmd.experiment import files, overrides, registry
from spmd.strategies import Auto

GOLDEN = pathlib.Path(__file__).parent / "golden"
EXAMPLES = 10_000  # the data is not read: a golden file must not depend on what is prepared
ENCODED = 1_281_167  # of encoded images: ImageNet, whose experiments warm up for 5 epochs
# Golden file -> (experiment, command line), beside the experiments themselves.
VARIANTS = {
    "mnist-ring": (
        "mnist",
        "--simulate 8 --strategy allreduce --strategy.reduction ring --strategy.bidirectional",
    ),
    "mnist-server": ("mnist", "--simulate 8 --strategy server"),
}


def described(name: str) -> dict:
    experiment, words = VARIANTS.get(name, (name, ""))
    exp, _ = registry.load(experiment, words.split())
    data = 2 if exp.data.batch_size % 8 == 0 else 1
    second, size = ("fsdp", 4) if isinstance(exp.strategy, Auto) else ("replica", 2)
    exp, _ = overrides.override(exp, ["--mesh.data", str(data), f"--mesh.{second}", str(size)])
    encoded = any(dtype == "bytes" for _, dtype in exp.data.features.values())
    num = ENCODED if encoded else EXAMPLES
    source = ArraySource(
        {
            k: [b""] * num if dtype == "bytes" else np.zeros((num, *shape), dtype)
            for k, (shape, dtype) in exp.data.features.items()
        }
    )
    program = exp.build(jax.devices()[: size * data], source=source)
    placed = tree.named_leaves(program.strategy.state_shardings)
    return {
        "config": exp.config(),
        "identity": exp.identity(),
        "state": {
            path: f"{leaf.dtype}{list(leaf.shape)} {list(placed[path].spec)}"
            for path, leaf in tree.named_leaves(program.abstract_state()).items()
        },
    }


@pytest.mark.parametrize("name", [*files.available(), *VARIANTS])
def test_golden(name, request):
    with jax.enable_x64(False):  # whatever a test before it left
        text = json.dumps(described(name), indent=1) + "\n"
    file = GOLDEN / f"{name}.json"
    if request.config.getoption("--update"):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text)
    assert file.exists(), f"no golden file for {name}; run: make golden"
    assert text == file.read_text(), f"{name} resolves to something else; if meant: make golden"
