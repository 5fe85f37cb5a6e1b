"""--log.layers: norms by layer against numpy, on one device and on meshes, and as they are written."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from spmd.core import tree
from spmd.data import Arrays
from spmd.data.text import Mixture, Text
from spmd.experiment.base import Experiment
from spmd.models.moe import Experts
from spmd.models.transformer import Transformer
from spmd.optim import SGD
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import AllReduce, Local, layers
from spmd.tasks import LanguageModel
from spmd.train import LogConfig, RunConfig, TrainConfig

RATE, TIME = 0.1, 8
MODEL = Transformer(vocab=256, length=TIME, layers=2, embed=32, heads=4, mlp=64)


def examples():
    tokens = np.random.default_rng(0).integers(0, 256, (16, TIME)).astype(np.int32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1)}


def experiment(model=MODEL, **more):
    features: Any = dict.fromkeys(("tokens", "targets"), ((TIME,), "int32"))
    data = Arrays(train=examples, eval=examples, batch_size=8, features=features)
    fields = {"model": model, "task": LanguageModel(), "data": data, "name": "tiny"}
    fields |= {"optimizer": SGD(learning_rate=RATE, momentum=0.0, schedule="constant")}
    fields |= {"log": LogConfig(every=2, layers=True), "train": TrainConfig(steps=4)}
    return Experiment(**(fields | more))


def steps_of(exp, num_devices):
    """[(arrays of the parameters before a step, those after it, its norms)] of two steps; and the program."""
    program = exp.build(jax.devices()[:num_devices])
    state, found = program.init(), []
    named = lambda params: {
        n: np.array(x, np.float64) for n, x in tree.named_leaves(params).items()
    }
    for batch in program.host_batches(0, 2):
        before = named(state.params)
        state, metrics = program.strategy.step(state, batch)
        found.append((before, named(state.params), np.asarray(metrics["layers"])))
    return found, program


def norm_of(name, arrays):
    """The norm of a layer's arrays; its number, if it has one, is that in a stack."""
    top, *numbers = name.split("/")
    group = "/".join([top, *numbers[:-1]]) + "/"
    leaves = [
        x[int(numbers[-1])] if numbers else x for n, x in arrays.items() if n.startswith(group)
    ]
    assert leaves
    return np.sqrt(sum((leaf**2).sum() for leaf in leaves))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(MODEL, id="alike"),
        pytest.param(
            dataclasses.replace(MODEL, experts=Experts(num=2, every=2)),
            id="in turn",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_norms_are_those_of_numpy_on_every_mesh(model, devices):
    ((_, _, unmeasured), (before, after, norms)), program = steps_of(experiment(model), 1)
    assert (unmeasured == layers.UNMEASURED).all()
    names = layers.layer_names(program.abstract_state().params, program.task.dims)
    kinds = ("blocks/0/0", "blocks/1/0") if model.experts.num else ("blocks/0", "blocks/1")
    assert names == [*kinds, "embed", "head", "norm"]
    for g, name in enumerate(names):
        update = norm_of(name, {n: after[n] - before[n] for n in after})
        want = [update / RATE, norm_of(name, after), update]
        np.testing.assert_allclose(norms[:, g], want, rtol=1e-4)
    for mesh, strategy in (
        ({"mesh": MeshConfig(fsdp=2, tensor=2)}, {}),
        ({}, {"strategy": AllReduce()}),
    ):
        (_, (_, _, elsewhere)), _ = steps_of(experiment(model, **mesh, **strategy), 4)
        np.testing.assert_allclose(elsewhere, norms, rtol=1e-5)


def test_replicas_have_no_update_of_one_model(devices):
    with pytest.raises(ValueError, match=r"log\.layers measures the update of one model"):
        experiment(strategy=Local(replicas=2, period=2)).build(jax.devices()[:2])


def test_a_run_writes_norms_and_what_its_parts_have_given(devices, tmp_path):
    """A mixture whose weights change at step 3, two steps in a dispatch; the last one is not logged."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"Some text of {name}, and then more of it.\n" * 20)
    texts = tuple(Text(files=(str(tmp_path / f"{name}.txt"),)) for name in "ab")
    size = {"sequence_length": TIME, "batch_size": 8, "cache_dir": str(tmp_path / "cache")}
    data = Mixture(parts=texts, weights=(3, 1), schedule=((3, (0, 1)),), **size)
    run = RunConfig(dir=str(tmp_path / "run"))
    train = TrainConfig(steps=5, steps_per_dispatch=2)
    experiment(data=data, run=run, train=train, simulate=1).train_run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    lines = {line["step"]: line for line in lines if "train/loss" in line}
    measured = [step for step, line in lines.items() if "layers/blocks/1/update_norm" in line]
    assert measured == [2, 4] and 5 in lines
    assert [lines[s]["data/part_0/tokens"] / TIME for s in (2, 4, 5)] == [12, 18, 18]
    assert [lines[s]["data/part_1/tokens"] / TIME for s in (2, 4, 5)] == [4, 14, 22]
    assert [lines[s]["data/part_1/share"] for s in (2, 4)] == [0.25, 1.0]
    assert all(0 < line["data/part_1/epochs"] < 1 for line in lines.values())
