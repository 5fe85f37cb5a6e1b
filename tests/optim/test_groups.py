"""Groups of parameters: held to optax written by hand, equal on every mesh, stopped and resumed, mistakes."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spmd import optim
from spmd.core import fields, tree
from spmd.experiment import files, registry
from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import Auto
from spmd.train import rundir
from tests.cases import LAYOUTS, MODELS, assert_same_values, data_of, parts_for
from tests.marks import slow_but

GROUPS = (
    optim.Group(match="blocks/attention/*", rate=0.5, decay=0.0),
    optim.Group(
        match="params/blocks/mlp/*", optimizer=optim.SGD(learning_rate=0.2, warmup_steps=2)
    ),
    optim.Group(match="embed/*", optimizer=optim.LAMB(learning_rate=0.01), decay=0.3),
)
OPTIMIZERS = {
    "adamw": optim.AdamW(learning_rate=3e-3, clip_norm=1.0, warmup_steps=3, groups=GROUPS),
    "muon": optim.Muon(learning_rate=1e-2, ema=0.9, groups=GROUPS),
    "optax": optim.Optax(build=lambda rate: optax.adabelief(rate), groups=GROUPS[1:]),
}


def draw(seed, params):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)


def test_equal_optax_written_by_hand():
    params = {
        "a": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
        "b": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
        "c": {"kernel": jnp.ones((3, 2))},
    }
    groups = (
        optim.Group(match="*/bias", decay=0.0, rate=2.0),
        optim.Group(match="b/kernel", decay=0.5),
        optim.Group(
            match="params/c/*", optimizer=optim.SGD(learning_rate=0.3, schedule="constant")
        ),
    )
    config = optim.AdamW(learning_rate=0.1, schedule="constant", clip_norm=0.7, groups=groups)
    ours = config.transformation(10, optim.decay_mask(params, {}), {})
    adamw = lambda rate, decay: optax.adamw(rate, 0.9, 0.95, 1e-8, weight_decay=decay)
    labels = {
        "a": {"kernel": "rest", "bias": "bias"},
        "b": {"kernel": "b", "bias": "bias"},
        "c": {"kernel": "c"},
    }
    by_hand = {
        "rest": adamw(0.1, 0.1),
        "bias": adamw(0.2, 0.0),
        "b": adamw(0.1, 0.5),
        "c": optax.sgd(0.3, 0.9, nesterov=True),
    }
    theirs = optax.chain(optax.clip_by_global_norm(0.7), optax.multi_transform(by_hand, labels))
    got, want = (params, ours.init(params)), (params, theirs.init(params))
    with jax.numpy_dtype_promotion("standard"):
        for step in range(4):
            for state, tx in ((got, ours), (want, theirs)):
                updates, new = tx.update(draw(step, params), state[1], state[0])
                state = (optax.apply_updates(state[0], updates), new)
                got, want = (state, want) if tx is ours else (got, state)
    for name, leaf in tree.named_leaves(want[0]).items():
        np.testing.assert_allclose(tree.named_leaves(got[0])[name], leaf, rtol=1e-6, err_msg=name)


def train(optimizer, strategy, sizes, num, steps=4):
    """(values of the final state, its shardings) by name, in float64."""
    model = MODELS["lm"]
    with jax.enable_x64(True):
        cut = mesh.make(sizes, jax.devices()[:num])
        built = strategy.build(parts_for(model, cut, dtype="float64", optimizer=optimizer))
        state = built.init(jax.random.key(0))
        for step in range(steps):
            batch = jax.device_put(data_of(model)(step), built.batch_shardings)
            state, _ = built.step(state, batch)
        values = {
            name: np.array(leaf)
            for name, leaf in tree.named_leaves(state).items()
            if name.startswith(("params", "opt_state", "ema"))
        }
    return values, tree.named_leaves(built.state_shardings)


@pytest.mark.parametrize(
    ("layout", "name"),
    slow_but(
        [],
        [(x, o) for x in ("fsdp4", "tensor2", "psum4", "server4", "zero1_4") for o in OPTIMIZERS],
        gate=[("tensor2", "optax")],
    ),
)
def test_equal_one_device(devices, layout, name):
    want, _ = train(OPTIMIZERS[name], Auto(), MeshConfig(), 1)
    got, placed = train(OPTIMIZERS[name], *LAYOUTS[layout])
    assert_same_values(got, want)
    if layout == "fsdp4":  # moments are sharded in every group, as their parameters are
        for path, leaf in got.items():
            if leaf.size >= 1024:
                assert not placed[path].is_fully_replicated, path


def test_without_groups_the_transformation_is_what_it_was():
    """The same structure of the state, and no group in the identity of a run from before."""
    params = {"w": jnp.ones((2, 2))}
    state = optim.AdamW(clip_norm=1.0).transformation(5, {"w": True}).init(params)
    assert [type(part).__name__ for part in state] == [
        "EmptyState",
        "ScaleByAdamState",
        "MaskedState",
        "ScaleByScheduleState",
    ]
    exp = registry.from_file(files.find("digits"))
    old = {k: v for k, v in exp.identity().items() if k != "optimizer.groups"}
    same = lambda exp: rundir.find_differences(old, exp.identity(), fields.defaults(exp))
    assert same(exp) == {}
    grouped = dataclasses.replace(exp.optimizer, groups=(optim.Group(match="*/bias", rate=2.0),))
    changed = same(dataclasses.replace(exp, optimizer=grouped))
    assert changed["optimizer.groups.0.match"] == ["(absent)", "*/bias"]


EXPERIMENT = """
import dataclasses
import optax
from spmd.experiment.files import find
from spmd.experiment.registry import from_file
from spmd.optim import SGD, Group, Optax

def build(rate):
    return optax.adabelief(rate, b1=0.8)  # any comment

def config():
    groups = (
        Group(match="layers/0/*", freeze=True),
        Group(match="layers/1/kernel", rate=0.1),
        Group(match="*/bias", optimizer=SGD()),
    )
    groups = (*groups[:2], Group(match="layers/[12]/bias", optimizer=SGD(schedule="constant")))
    optimizer = Optax(build=build, learning_rate=0.01, clip_norm=1.0, schedule="constant", groups=groups)
    return dataclasses.replace(from_file(find("digits")), optimizer=optimizer)
"""


@pytest.mark.gate
def test_a_run_is_stopped_resumed_planned_and_verified(run_main, tmp_path):
    (tmp_path / "grouped.py").write_text(EXPERIMENT)
    words = ("--experiment", "grouped.py", "--simulate", 4, "--mesh.data", 2, "--mesh.fsdp", 2)

    def trained(directory, steps, *more):
        done = run_main(*words, "--train.steps", steps, "--run.dir", directory, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    trained("cut", 12, "--log.every", 20)
    # Comments are no part of what a run is recognised by.
    (tmp_path / "grouped.py").write_text(EXPERIMENT.replace("any comment", "another one"))
    resumed = trained("cut", 20, "--log.every", 20)
    assert "resuming at step 12" in resumed
    summary = lambda name: json.loads((tmp_path / name / "summary.json").read_text())["metrics"]
    trained("straight", 20, "--log.every", 20)
    assert summary("cut")["eval/loss"] == summary("straight")["eval/loss"]
    (tmp_path / "grouped.py").write_text(EXPERIMENT.replace("b1=0.8", "b1=0.7"))
    other = run_main(*words, "--train.steps", 30, "--run.dir", "cut", "--run.amend")
    assert other.returncode == 2 and "optimizer.digest" in other.stderr
    plan = run_main("plan", *words[:2], "--target", "cpu:4", "--mesh.data", 2, "--mesh.fsdp", 2)
    assert plan.returncode == 0, plan.stderr
    verified = run_main("verify", *words, "--steps", 3)
    assert verified.returncode == 0 and "verified" in verified.stdout, verified.stdout


CLAIMS = [
    (("*/kernel", "layers/0/*"), r"'\*/kernel' and 'layers/0/\*' both claim layers/0/kernel"),
    (("layer/0/kernel",), r"no array matches 'layer/0/kernel'. Did you mean 'layers/0/kernel'"),
]


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(("patterns", "message"), CLAIMS)
def test_a_parameter_has_one_group_and_a_pattern_parameters(patterns, message, freeze):
    exp = registry.from_file(files.find("digits"))
    groups = tuple(optim.Group(match=pattern, freeze=freeze) for pattern in patterns)
    exp = dataclasses.replace(
        exp,
        optimizer=dataclasses.replace(exp.optimizer, groups=groups),
        train=dataclasses.replace(exp.train, steps=3),
    )
    with pytest.raises(ValueError, match=message):
        exp.build(jax.devices()[:1], source=())


MISTAKES = [
    ({"match": ""}, "match='' must be a pattern"),
    ({"rate": -1.0}, "the group 'w' has rate=-1.0"),
    ({"decay": -1.0}, "the group 'w' has decay=-1.0"),
    ({"freeze": True, "decay": 0.0}, "freezes its parameters"),
    ({"optimizer": optim.SGD(clip_norm=1.0)}, "an optimizer with clip_norm"),
    ({"optimizer": optim.SGD(ema=0.5)}, "an optimizer with ema"),
    ({"optimizer": optim.SGD(groups=(optim.Group(match="w"),))}, "an optimizer with groups"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_name_the_group(options, message):
    with pytest.raises(ValueError, match=message):
        optim.Group(**({"match": "w"} | options))
