"""Dims of a user's own model, sharded as the base dims that they follow, from an experiment file."""

from __future__ import annotations

import json
import re

import pytest

import spmd
from spmd.core import tree
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("devices")

FILE = '''"""A table of items, whose kind is to be learned."""

import dataclasses

import numpy as np
from flax import nnx
from jax.nn.initializers import normal

from spmd import Experiment
from spmd.data import Arrays
from spmd.models.layers.initial import param
from spmd.optim import AdamW
from spmd.parallel import scope
from spmd.tasks import Classification
from spmd.train import TrainConfig


class Net(nnx.Module):
    def __init__(self, rngs):
        self.table = param(rngs, (64, 32), ("rows", "embed"), normal(0.1))
        self.head = param(rngs, (32, 4), ("embed", "kinds"), normal(0.1))

    def __call__(self, item):
        table = scope.constrain(self.table[...], "rows", "embed")
        return scope.constrain(table[item] @ self.head[...], "batch", "kinds")


@dataclasses.dataclass(frozen=True)
class Items:
    follows = {"rows": "vocab", "kinds": "classes"}

    def build(self, rngs):
        return Net(rngs)


def items(num):
    item = np.arange(num, dtype=np.int32) % 64
    return {"item": item, "label": item % 4}


def config():
    return Experiment(
        model=Items(),
        task=Classification(input="item"),
        data=Arrays(train=lambda: items(640), eval=lambda: items(64), batch_size=64,
                    features={"item": ((), "int32"), "label": ((), "int32")}),
        optimizer=AdamW(learning_rate=3e-2),
        train=TrainConfig(steps=50),
    )
'''
FOLLOWS = '{"rows": "vocab", "kinds": "classes"}'


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda text=FILE, name="items.py": (tmp_path / name).write_text(text)


@pytest.mark.gate
def test_trains_plans_and_verifies(run_main, write, tmp_path):
    write()
    words = ("--experiment", "items.py", "--simulate", 4, "--mesh.data", 2, "--mesh.tensor", 2)
    done = run_main("train", *words)
    assert done.returncode == 0, done.stderr
    (row,) = [x for x in done.stdout.splitlines() if x.startswith("params/table")]
    assert "tensor" in row
    summary = json.loads((tmp_path / "runs/items/summary.json").read_text())
    assert summary["metrics"]["eval/accuracy"] == 1.0
    done = run_main("plan", *words[:-2], "--mesh.fsdp", 2)  # without closed forms, no mesh.tensor
    assert done.returncode == 0, done.stderr
    done = run_main("verify", *words, "--steps", 2)
    assert done.returncode == 0, done.stderr


STRATEGIES = (
    "auto",
    "allreduce",
    "server",
    "local --strategy.replicas 2 --mesh.replica 2 --mesh.data 1",
)


@pytest.mark.parametrize("strategy", slow_but(("auto",), STRATEGIES, gate=STRATEGIES[1:]))
def test_a_dim_is_sharded_as_the_one_that_it_follows(write, strategy):
    """The program is that of a model with the base dims."""
    words = ["--simulate", "4", "--mesh.data", "2", "--mesh.tensor", "2", "--strategy"]

    def lowered(file):
        program = spmd.load(file, [*words, *strategy.split()]).experiment.build()
        state = program.abstract_state()
        return program, program.strategy.step.lower(state, program.abstract_batch()).as_text()

    write()
    program, text = lowered("items.py")
    table = tree.named_leaves(program.strategy.state_shardings.params)["table"]
    assert "tensor" in table.spec
    base = FILE.replace(FOLLOWS, "{}").replace('"rows"', '"vocab"').replace('"kinds"', '"classes"')
    write(base, "based.py")
    assert lowered("based.py")[1] == text


@pytest.mark.parametrize(
    "old,new,message",
    [
        (
            '"rows": "vocab"',
            '"row": "vocab"',
            r"table: unknown logical dim 'rows'. Did you mean 'row'",
        ),
        ('"vocab"', '"vocap"', r"dim 'rows' follows 'vocap', .* Did you mean 'vocab'"),
        (FOLLOWS, '{"embed": "vocab"}', "'embed' is a base dim, and cannot follow 'vocab'"),
        ("    follows = " + FOLLOWS, "", "unknown logical dim 'kinds'.*follows = ..kinds.: .vocab"),
    ],
)
def test_a_dim_that_follows_nothing_known(run_main, write, old, new, message):
    assert old in FILE
    write(FILE.replace(old, new))
    done = run_main("train", "--experiment", "items.py", "--simulate", 1)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    text = " ".join(done.stderr.split())
    assert re.search(message, text), text
