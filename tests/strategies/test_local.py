"""local: replicas that are trained apart, and what they agree on; the same on every mesh."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spmd
from spmd import optim
from spmd.core import tree
from spmd.models.cnn import CNN
from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import Auto, Federated, Local
from tests.cases import BATCH, KINDS, MODELS, batch_at, parts_for
from tests.command import final_state
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("devices")
SMALL = CNN(features=(4,), dropout=0.3)  # batch norm: of each replica its own statistics
ADAMW = optim.AdamW(learning_rate=1e-2, clip_norm=1.0, warmup_steps=3, ema=0.9)
ONE = (MeshConfig(), 1)
MESHES = {
    "replica8": (MeshConfig(replica=8, data=1), 8),
    "replica4x2": (MeshConfig(replica=4, data=2), 8),
    "replica2fsdp2tensor2": (MeshConfig(replica=2, data=1, fsdp=2, tensor=2), 8),
}


def run(
    model, strategy, where, *, steps=6, optimizer=ADAMW, batch_of=batch_at, first=None, **parts
):
    """(strategy, state, losses) after `steps`, from the parameters `first` where given."""
    config, num = where
    cut = mesh.make(config, jax.devices()[:num])
    dtype = "float64" if jax.config.jax_enable_x64 else "float32"
    built = strategy.build(
        parts_for(model, cut, dtype=dtype, optimizer=optimizer)._replace(**parts)
    )
    state, losses = built.init(jax.random.key(0)), []
    if first is not None:
        state = built.with_params(state, first)
    for step in range(steps):
        state, metrics = built.step(state, jax.device_put(batch_of(step), built.batch_shardings))
        losses.append(float(metrics["loss"]))
    return built, state, losses


def apart(model, inner, num_replicas, period, steps, rate, momentum):
    """DiLoCo by hand (Douillard et al. 2023, algorithm 1): each replica a run of `auto` on one device, the
    outer step in numpy. (Parameters, statistics, parameters before the first step.)
    """
    parts = parts_for(model, mesh.make(ONE[0], jax.devices()[:1]), dtype="float64", optimizer=inner)
    rows = BATCH // num_replicas
    batch = {k: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for k, v in parts.batch.items()}
    auto = Auto().build(parts._replace(batch=batch))
    states = [auto.init(jax.random.key(0)) for _ in range(num_replicas)]
    first = consensus = jax.tree.map(np.array, states[0].params)
    trace = jax.tree.map(np.zeros_like, consensus)
    seen, statistics = np.zeros(num_replicas), None
    for step in range(steps):
        for r in range(num_replicas):
            mine = {k: v[r * rows : (r + 1) * rows] for k, v in batch_at(step).items()}
            seen[r] += mine["weight"].sum()
            states[r], _ = auto.step(states[r], mine)
        if (step + 1) % period:
            continue
        share = seen / seen.sum()
        mean = lambda *xs, share=share: sum(s * np.array(x) for s, x in zip(share, xs, strict=True))
        statistics = jax.tree.map(mean, *[s.model_state for s in states])
        delta = jax.tree.map(
            np.subtract, consensus, jax.tree.map(mean, *[s.params for s in states])
        )
        trace = jax.tree.map(lambda m, d: momentum * m + d, trace, delta)
        move = lambda c, m, d: c - rate * (momentum * m + d)  # Nesterov
        consensus = jax.tree.map(move, consensus, trace, delta)
        given = lambda: jax.tree.map(jnp.asarray, (consensus, statistics))  # noqa: B023
        for r in range(num_replicas):
            params, model_state = given()
            states[r] = dataclasses.replace(states[r], params=params, model_state=model_state)
        seen[:] = 0
    return consensus, statistics, first


def test_equals_replicas_trained_apart():
    """AdamW with clipping inside, batch norm, dropout, replicas of unequal weight; Nesterov outside."""
    inner = optim.AdamW(learning_rate=1e-2, clip_norm=1.0, warmup_steps=3)
    with jax.enable_x64(True):
        *want, first = apart(SMALL, inner, 2, 3, 6, 0.7, 0.9)
        strategy = Local(replicas=2, period=3)
        where = (MeshConfig(replica=2, data=1), 2)
        _, state, _ = run(SMALL, strategy, where, optimizer=inner, first=first)
    got = (state.params, state.model_state)
    for name, leaf in tree.named_leaves(want).items():
        np.testing.assert_allclose(
            tree.named_leaves(got)[name], leaf, rtol=1e-9, atol=1e-12, err_msg=name
        )


OUTERS: Any = {outer: {"outer": outer} for outer in ("average", "nesterov", "adam")}
OUTERS |= {kind: {"compress": compress} for kind, compress in KINDS.items()}


@pytest.mark.parametrize(
    ("where", "how"),
    slow_but(
        [("replica2fsdp2tensor2", "adam"), ("replica2fsdp2tensor2", "int8")],
        [(where, how) for where in MESHES for how in OUTERS],
    ),
)
def test_the_mesh_changes_nothing(where, how):
    """Eight replicas on one device or spread over eight: batch norm, dropout, AdamW, EMA, everything."""
    strategy = Local(replicas=8, period=2, **OUTERS[how])
    with jax.enable_x64(True):
        _, want, losses = run(SMALL, strategy, ONE, steps=5)
        _, got, same = run(SMALL, strategy, MESHES[where], steps=5)
    np.testing.assert_allclose(same, losses, rtol=1e-10)
    assert len({round(loss, 6) for loss in losses}) == 5
    assert ("own" in got.strategy_state["merge"]) == (how in KINDS)
    for name, leaf in tree.named_leaves(want).items():
        np.testing.assert_allclose(
            tree.named_leaves(got)[name], leaf, rtol=1e-8, atol=1e-10, err_msg=name
        )


def test_what_is_evaluated_and_what_stands_between_outer_steps():
    """The consensus stands still for H - 1 steps; replicas differ, and agree after the H-th."""
    strategy = Local(replicas=4, period=3, outer="average")
    where = (MeshConfig(replica=4, data=1), 4)
    apart_R = lambda state: np.ptp(
        np.array(state.strategy_state["params"]["head"]["kernel"]), axis=0
    )
    first, state, _ = run(MODELS["mlp"], strategy, where, steps=0)
    kernel = lambda state: np.array(first.eval_variables(state)[0]["head"]["kernel"])
    start = kernel(state)
    _, state, _ = run(MODELS["mlp"], strategy, where, steps=2, optimizer=optim.AdamW())
    np.testing.assert_array_equal(np.array(state.params["head"]["kernel"]), start)
    assert apart_R(state).max() > 1e-4
    built, state, _ = run(MODELS["mlp"], strategy, where, steps=3, optimizer=optim.AdamW())
    assert (
        apart_R(state).max() == 0
        and abs(np.array(state.params["head"]["kernel"]) - start).max() > 1e-4
    )
    np.testing.assert_array_equal(
        built.eval_variables(state)[0]["head"]["kernel"], state.params["head"]["kernel"]
    )
    assert state.strategy_state["params"]["head"]["kernel"].sharding.spec[0] == "replica"
    assert not state.strategy_state["weight"].any()
    # Other weights reach the replicas too.
    ones = jax.tree.map(lambda p: np.ones(p.shape, p.dtype), state.params)
    state = built.with_params(state, ones)
    assert (np.array(state.strategy_state["params"]["head"]["kernel"]) == 1).all()
    state, _ = built.step(state, jax.device_put(batch_at(9), built.batch_shardings))  # donated


def test_a_replica_that_diverges_is_skipped_alone():
    def batch_of(step):
        batch = batch_at(step)
        if step == 1:
            batch["weight"][:8] = np.inf  # the first of four replicas
        return batch

    strategy, where = (
        Local(replicas=4, period=2, outer="average"),
        (MeshConfig(replica=4, data=1), 4),
    )
    _, state, _ = run(MODELS["mlp"], strategy, where, steps=2, batch_of=batch_of, skip=True)
    assert all(np.isfinite(np.array(x)).all() for x in jax.tree.leaves(state))
    _, alone, _ = run(MODELS["mlp"], strategy, where, steps=2, skip=True)
    assert (
        abs(np.array(state.params["head"]["kernel"]) - alone.params["head"]["kernel"]).max() > 1e-6
    )


def local(*words):
    """The digits experiment with strategy local."""
    return spmd.load("digits", ["--strategy", "local", *map(str, words)])


def test_frozen_parameters_are_held_once():
    words = ("--simulate", 2, "--mesh.replica", 2, "--mesh.data", 1, "--train.steps", 50)
    state = local(*words, "--init.freeze", "layers/*").build().abstract_state()
    assert "frozen" in state.model_state and "frozen" not in state.strategy_state["model_state"]
    assert state.strategy_state["params"].keys() == {"head"}


@pytest.mark.parametrize("kind", slow_but((), ("none", *KINDS), gate=("int8",)))
def test_a_run_goes_on_in_the_middle_of_a_period_on_another_mesh(tmp_path, kind):
    words = ("--strategy.period", 4, "--train.steps", 12, "--strategy.compress.kind", kind)
    words = (*words, "--checkpoint.every", 3, "--checkpoint.keep", 9, "--simulate", 4)
    first, then = tmp_path / "first", tmp_path / "then"
    local(*words, "--mesh.replica", 4, "--mesh.data", 1, "--run.dir", first).train()
    shutil.copytree(first, then)
    (then / "summary.json").unlink()
    for later in (9, 12):
        shutil.rmtree(then / f"checkpoints/{later}")
    local(*words, "--mesh.replica", 2, "--mesh.data", 2, "--run.dir", then).train()
    want, got = (final_state(d, "--strategy", "local", *map(str, words[:6])) for d in (first, then))
    for name, leaf in want.items():
        # Where a float32 lies between two integers, or two entries are alike, it may be sent or kept back.
        off = ~np.isclose(got[name], leaf, rtol=1e-5, atol=1e-6)
        assert off.mean() <= (0 if kind == "none" else 1e-3), name
    with pytest.raises(ValueError, match=r"strategy.replicas.* 4 .*8|strategy.replicas.* 8 .*4"):
        local(*words, "--strategy.replicas", 4, "--run.dir", then).train()


def test_mistakes_are_one_message(run_main):
    with pytest.raises(ValueError, match=r"850 steps .* use --train.steps 800 or 900"):
        local("--strategy.period", 100, "--train.steps", 850).build()
    three = ("--simulate", 3, "--mesh.replica", 3, "--mesh.data", 1, "--data.batch-size", 48)
    with pytest.raises(ValueError, match=r"8 replicas .* mesh.replica=3; .* be 1, 2, 4, 8"):
        local(*three, "--train.steps", 50).build()
    with pytest.raises(ValueError, match=r"batch_size=12 .* 8 replicas .* use 8 or 16"):
        local("--simulate", 1, "--data.batch-size", 12, "--train.steps", 50).build()
    for name, value in {"period": 0, "replicas": 0, "outer_momentum": 1.0}.items():
        with pytest.raises(ValueError, match=f"strategy.{name}"):
            Local(**{name: value})
    with pytest.raises(ValueError, match=r"kind=top-k: .* other clients in each round"):
        Federated(compress=KINDS["top-k"])
    done = run_main("--experiment", "digits", "--strategy", "local", "--train.steps", 10)
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0
    assert "strategy.period=50 must divide them; use --train.steps 50" in done.stderr
