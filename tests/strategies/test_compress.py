"""Compression: nothing is lost by error feedback, every device has the same sum, ranks are what they say."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import tree
from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import (
    AllReduce,
    Compression,
    Local,
    Server,
    allreduce,
    base,
    merge,
    reduce,
    server,
)
from tests.cases import KINDS, MODELS, batch_at, parts_for
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("devices")
N = 4


def layout() -> base.Parts:
    cut = mesh.make(MeshConfig(replica=2, data=2), jax.devices()[:N])
    return parts_for(MODELS["mlp"], cut, dtype="float64")


def pushed(strategy, parts):
    """(state to begin with, (gradients [N, ...], state) -> (sums, state)) of a strategy."""
    axes = ("replica", "data")
    params, _ = base.abstract_params(parts)
    if isinstance(strategy, Local):
        made = merge.build(strategy.compress, parts, N)

        def mean(grads, state):
            given = {"params": jax.tree.map(lambda g: N * g, grads), "statistics": {}}
            found, _, state = made.mean(given, jnp.full(N, 3.0), jax.random.key(0), state)
            return found["params"], state

        return made.init(params), jax.jit(mean)
    if isinstance(strategy, Server):
        owners = strategy.build(parts).state_shardings.params
        reducer = server.build_reducer(parts, strategy, axes, owners)
        specs = jax.tree.map(lambda s: s.spec, owners)
    else:
        reducer, specs = allreduce.build_reducer(parts, strategy, axes), P()
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
    return reduce.init_state(reducer, N, zeros), jax.jit(
        reduce.build_reduction(parts, axes, reducer, specs)
    )


def drawn(parts, seed):
    """A gradient for each device, rank 1 but for noise, of one magnitude for all."""
    params, _ = base.abstract_params(parts)
    rng = np.random.default_rng(seed)
    spread = NamedSharding(parts.mesh, P(("replica", "data")))
    return jax.tree.map(lambda p: jax.device_put(rng.normal(size=(N, *p.shape)), spread), params)


def summed(trees):
    return jax.tree.map(lambda *x: np.sum([np.asarray(y) for y in x], axis=0), *trees)


ALL = [(cls, kind) for cls in (AllReduce, Server, Local) for kind in KINDS]


@pytest.mark.parametrize(
    ("cls", "kind"),
    slow_but([(Local, "int8")], ALL, gate=ALL[:6]),
)
def test_what_is_left_out_is_sent_later(cls, kind):
    """After any number of steps: what has arrived and what is kept back are all that was meant."""
    with jax.enable_x64(True):
        parts = layout()
        state, push = pushed(cls(compress=KINDS[kind]), parts)
        arrived, meant = [], []
        for step in range(4):
            grads = drawn(parts, step)
            sums, state = push(grads, state)
            for leaf in jax.tree.leaves(sums):  # the copies are the same everywhere
                copies = {str(s.index): np.asarray(s.data) for s in leaf.addressable_shards}
                for shard in leaf.addressable_shards:
                    np.testing.assert_array_equal(shard.data, copies[str(shard.index)])
            arrived.append(tree.named_leaves(sums))
            meant.append(tree.named_leaves(jax.tree.map(lambda g: np.asarray(g).sum(0), grads)))
        arrived, meant = summed(arrived), summed(meant)
        own = state["own"]
        kept = {name: np.asarray(error).sum(0) for name, error in own["errors"].items()}
        late = [np.asarray(chunk).reshape(-1) for chunk in own["chunks"]]
    assert kept and (len(late) == 1) == (kind == "int8" and cls is not Server)
    if late:  # the owners' part, end to end as the bucket is
        start = 0
        for name, error in kept.items():
            kept[name] = error + late[0][start : start + error.size].reshape(error.shape)
            start += error.size
    for name, want in meant.items():
        np.testing.assert_allclose(arrived[name] + kept.get(name, 0), want, atol=1e-10)
        if name in kept:
            assert abs(kept[name]).max() > 1e-4  # something was left out


def test_second_quantisation_has_feedback_too():
    """The mean of what arrives for one and the same gradient comes closer as 1 / steps, past what one
    quantisation of the sum leaves.
    """
    with jax.enable_x64(True):
        parts = layout()
        state, push = pushed(AllReduce(compress=KINDS["int8"]), parts)
        grads = drawn(parts, 0)
        want = np.asarray(grads["layers"][1]["kernel"]).sum(0)
        seen = []
        for _ in range(32):
            sums, state = push(grads, state)
            seen.append(np.asarray(sums["layers"][1]["kernel"]))
    error = lambda x: np.linalg.norm(x - want) / np.linalg.norm(want)
    assert 1e-3 < error(seen[0]) < 2e-2
    assert error(np.mean(seen, axis=0)) < error(seen[0]) / 16


def test_powersgd_finds_a_low_rank_at_once():
    """A sum of rank 2 is found in one power iteration, and a later one of other directions as well."""
    with jax.enable_x64(True):
        parts = layout()
        for rank, exact in ((2, True), (1, False)):
            config = AllReduce(compress=Compression(kind="powersgd", rank=rank))
            state, push = pushed(config, parts)
            rng = np.random.default_rng(0)
            thin = lambda m, n, rng=rng: rng.normal(size=(m, 2)) @ rng.normal(size=(2, n))
            for _ in range(2):
                grads = drawn(parts, 0)
                one = thin(64, 64)
                share = rng.normal(size=(N, 1, 1))
                grads["layers"][1]["kernel"] = jnp.asarray(one * share / share.sum())
                sums, state = push(grads, state)
                got = np.asarray(sums["layers"][1]["kernel"])
                if not exact:
                    assert np.linalg.norm(got - one) > 0.1 * np.linalg.norm(one)
                    break
                np.testing.assert_allclose(got, one, atol=1e-9)


def test_bases_survive_a_gradient_of_zero():
    """Full rank stays exact after a step that had no direction at all."""
    with jax.enable_x64(True):
        parts = layout()
        state, push = pushed(AllReduce(compress=Compression(kind="powersgd", rank=999)), parts)
        grads = drawn(parts, 0)
        _, state = push(jax.tree.map(jnp.zeros_like, grads), state)
        sums, state = push(grads, state)
    for got, want in zip(jax.tree.leaves(sums), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(got, np.asarray(want).sum(0), atol=1e-10)


CASES = [(cls, kind) for cls in (AllReduce, Server) for kind in KINDS]


@pytest.mark.parametrize(("cls", "kind"), slow_but([(AllReduce, "int8")], CASES))
def test_a_skipped_step_keeps_the_errors(cls, kind):
    cut = mesh.make(MeshConfig(), jax.devices()[:N])
    built = cls(compress=KINDS[kind]).build(parts_for(MODELS["mlp"], cut)._replace(skip=True))
    state = built.init(jax.random.key(0))
    state, _ = built.step(state, jax.device_put(batch_at(0), built.batch_shardings))
    before = jax.tree.map(np.array, state)
    bad = batch_at(1) | {"weight": np.full(32, np.inf, np.float32)}
    state, metrics = built.step(state, jax.device_put(bad, built.batch_shardings))
    assert metrics["finite"] == 0
    for a, b in zip(
        jax.tree.leaves(dataclasses.replace(before, step=0)),
        jax.tree.leaves(dataclasses.replace(state, step=0)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    errors = before.strategy_state["own"]["errors"]
    assert math.fsum(abs(e).sum() for e in errors.values()) > 0
