"""DP-SGD: the gradient by a loop over examples, the noise on every mesh, the sample, and epsilon."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

import spmd
from spmd import optim
from spmd.core import tree
from spmd.models.cnn import CNN
from spmd.models.mlp import MLP
from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import AllReduce, Compression, Federated, Local, StrategyConfig, privacy
from spmd.strategies.grads import direct
from spmd.strategies.privacy import Mechanism, Poisson, Privacy
from tests.cases import LAYOUTS, MODELS, batch_at, data_of, parts_for, task_of
from tests.marks import slow_but

MECHANISM = Mechanism(
    num_examples=60000, expected=24, rows=32, clip_norm=0.5, noise_multiplier=1.5, delta=1e-5
)

# ---- the gradient


@pytest.mark.parametrize(
    ("name", "dtype", "accumulate"),
    slow_but(
        [("mlp", "float32", 4)],
        [(n, d, m) for n in ("mlp", "lm") for d in ("float32", "float64") for m in (1, 4)],
        gate=[("lm", "float64", 1)],
    ),
)
def test_gradient_is_that_of_a_loop_over_examples(name, dtype, accumulate):
    with jax.enable_x64(dtype == "float64"):
        model = MODELS[name]
        task = task_of(model).build(model, dtype)
        params, state = task.init(jax.random.key(0))
        batch, key = data_of(model)(3), jax.random.key(7)
        one = jax.jit(jax.grad(task.loss, has_aux=True))
        each = []
        for i in range(32):
            row = {k: jnp.asarray(v[i : i + 1]) for k, v in batch.items()}
            grads, _ = one(params, state, row, key, task.scale(task.weigh(row)))
            each.append(jax.tree.map(lambda g: np.asarray(g, np.float64), grads))
        norm = lambda grads: math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        norms = np.array([norm(grads) for grads in each])
        clip = float(np.median(norms[norms > 0]) * 1.001)  # half are clipped; 9 weigh nothing
        factors = np.minimum(1, clip / np.maximum(norms, 1e-30)) / 24
        total = jax.tree.map(lambda *g: sum(f * x for f, x in zip(factors, g, strict=True)), *each)
        grads_of = direct.accumulate(direct.per_example(task, clip, 24), accumulate)
        (got, _), sums, _ = jax.jit(grads_of)(direct.Trained(params, {}), state, batch, key, None)
    assert [float(x) for x in sums["clipped"]] == [11, 23]
    rtol = 1e-5 if dtype == "float32" else 1e-10
    for leaf, want in tree.named_leaves(total).items():
        atol = rtol * abs(want).max()
        np.testing.assert_allclose(
            tree.named_leaves(got)[leaf], want, rtol=rtol, atol=atol, err_msg=leaf
        )


# ---- the noise

WIDE = MLP(inputs=64, hidden=(256, 256))


@functools.cache
def noise_of(layout, accumulate, one_device=False):
    """What two steps without any example add to the parameters, each leaf by name."""
    strategy, sizes, num = LAYOUTS[layout]
    sizes, num = (MeshConfig(), 1) if one_device else (sizes, num)
    optimizer = optim.SGD(learning_rate=1.0, momentum=0.0, schedule="constant")
    cut = mesh.make(sizes, jax.devices()[:num])
    parts = parts_for(WIDE, cut, accumulate=accumulate, optimizer=optimizer)
    built = strategy.build(parts._replace(privacy=MECHANISM))
    state, found = built.init(jax.random.key(0)), []
    empty = batch_at(0) | {"weight": np.zeros(32, np.float32)}
    for _ in range(2):
        before = jax.tree.map(np.array, state.params)
        state, metrics = built.step(state, jax.device_put(empty, built.batch_shardings))
        found.append(jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, state.params, before))
        assert metrics["finite"] == 1
    return {f"{i}/{k}": v for i, s in enumerate(found) for k, v in tree.named_leaves(s).items()}


IN_THE_GATE = [("psum1", 1), ("hsdp2x4", 4), ("tensor2", 1), ("local4x2x2", 4)]


@pytest.mark.parametrize(
    "layout,accumulate",
    slow_but([("psum2x4", 4)], [(name, n) for name in LAYOUTS for n in (1, 4)], gate=IN_THE_GATE),
)
def test_noise_is_added_once_with_the_right_deviation(layout, accumulate):
    found, strategy = noise_of(layout, accumulate), LAYOUTS[layout][0]
    # Of replicas the mean of as many noises.
    deviation = MECHANISM.deviation / math.sqrt(strategy.private_parts)
    flat = np.concatenate([x.ravel() for x in found.values()]) / deviation
    assert flat.size > 1e5
    assert abs(flat.std() - 1) < 0.01
    assert abs(flat.mean()) < 4 / math.sqrt(flat.size)
    assert abs((abs(flat) < 1).mean() - 0.6827) < 0.005  # a normal one
    first, second = (found[f"{i}/layers/1/kernel"].ravel() for i in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02  # anew in each step
    same = (layout, 1, True) if isinstance(strategy, Local) else ("psum1", 1)
    for leaf, want in noise_of(*same).items():  # and the same on every mesh
        np.testing.assert_allclose(found[leaf], want, atol=1e-6, err_msg=leaf)


def test_the_deviation_is_that_of_the_sum_over_the_expected_number():
    assert MECHANISM.deviation == pytest.approx(1.5 * 0.5 / 24)


@pytest.mark.gate
def test_each_replica_has_noise_of_its_own():
    """Between two outer steps they are as far apart as their noise; an empty sample shows in none of them."""
    optimizer = optim.SGD(learning_rate=1.0, momentum=0.0, schedule="constant")
    cut = mesh.make(MeshConfig(replica=2, data=1, fsdp=2), jax.devices()[:4])
    parts = parts_for(WIDE, cut, optimizer=optimizer)._replace(privacy=MECHANISM)
    built = Local(replicas=4, period=3, outer="average").build(parts)
    state = built.init(jax.random.key(0))
    start = np.array(state.params["layers"][1]["kernel"], np.float64)
    weight = np.repeat([1.0, 0.0], 16).astype(
        np.float32
    )  # two replicas have an example each, at most
    weight[1:9] = 0
    batch = jax.device_put(batch_at(0) | {"weight": weight}, built.batch_shardings)
    state, _ = built.step(state, batch)
    found = np.array(state.strategy_state["params"]["layers"][1]["kernel"], np.float64) - start
    noise_RX = found.reshape(4, -1) / MECHANISM.deviation
    np.testing.assert_allclose(noise_RX[2:].std(1), 1, rtol=0.02)
    assert abs(np.corrcoef(noise_RX) - np.eye(4)).max() < 0.02
    assert np.ptp(np.array(state.strategy_state["weight"])) == 0


@pytest.mark.gate
@pytest.mark.parametrize(
    ("where", "accumulate"),
    slow_but(
        [("replica2fsdp2tensor2", 2)],
        [(where, n) for where in ("one", "replica4", "replica2fsdp2tensor2") for n in (1, 2)],
    ),
)
def test_private_replicas_are_a_loop_over_examples(where, accumulate):
    """One local step, plain SGD, averaging: the mean over replicas of clipped sums and noises."""
    sizes, num = {
        "one": (MeshConfig(), 1),
        "replica4": (MeshConfig(replica=4, data=1), 4),
        "replica2fsdp2tensor2": (MeshConfig(replica=2, data=1, fsdp=2, tensor=2), 8),
    }[where]
    replicas, rate, held = 4, 0.5, 90
    made = Mechanism(-(-held // replicas), 5, 8, 0.5, 1.5, 1e-5, replicas)
    order = Poisson(3, held, 5 * replicas, 8 * replicas, replicas)
    source = {k: np.concatenate([batch_at(i)[k] for i in range(3)])[:held] for k in batch_at(0)}
    optimizer = optim.SGD(learning_rate=rate, momentum=0.0, schedule="constant")
    with jax.enable_x64(True):
        how = {"dtype": "float64", "optimizer": optimizer, "accumulate": accumulate}
        cut = mesh.make(sizes, jax.devices()[:num])
        parts = parts_for(MODELS["mlp"], cut, **how)._replace(privacy=made)
        built = Local(replicas=replicas, period=1, outer="average").build(parts)
        state = built.init(jax.random.key(0))
        params = jax.tree.map(np.array, state.params)
        one = jax.jit(jax.grad(parts.task.loss, has_aux=True))
        for step in range(3):
            chosen = order[np.arange(32) + 32 * step]
            chosen[8:16] = np.where(step == 1, -1, chosen[8:16])  # an empty sample
            batch = {k: v[np.maximum(chosen, 0)] for k, v in source.items()}
            batch["example_id"] = chosen.astype(np.int32)
            batch["weight"] = (chosen >= 0).astype(np.float32)
            state, _ = built.step(state, jax.device_put(batch, built.batch_shardings))
            key = jax.random.fold_in(jax.random.key(0), step)
            moves = []
            for r in range(replicas):
                total = jax.tree.map(lambda p: np.zeros(p.shape), params)
                for i in range(8 * r, 8 * r + 8):
                    row = {k: jnp.asarray(v[i : i + 1]) for k, v in batch.items()}
                    grads, _ = one(params, {}, row, key, parts.task.scale(parts.task.weigh(row)))
                    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
                    factor = min(1, 0.5 / norm) / 5 if norm else 0
                    total = jax.tree.map(lambda t, g, f=factor: t + f * g, total, grads)
                mine = jax.random.fold_in(jax.random.fold_in(key, jnp.int32(direct.NOISE)), r)
                leaves, structure = jax.tree.flatten(total)
                keys = jax.random.split(mine, len(leaves))
                leaves = [
                    g + 1.5 * 0.5 / 5 * jax.random.normal(k, g.shape, "float64")
                    for k, g in zip(keys, leaves, strict=True)
                ]
                moves.append(jax.tree.unflatten(structure, leaves))
            mean = jax.tree.map(lambda *m: sum(m) / replicas, *moves)
            params = jax.tree.map(lambda p, m: p - rate * m, params, mean)
    for leaf, want in tree.named_leaves(params).items():
        got = tree.named_leaves(state.params)[leaf]
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11, err_msg=leaf)


# ---- the sample


def test_each_example_is_sampled_on_its_own_with_one_probability():
    num, expected, rows, steps = 200, 20, 64, 4000
    order = Poisson(3, num, expected, rows)
    indices = order[np.arange(steps * rows)].reshape(steps, rows)
    taken = np.zeros((steps, num))
    for step, row in enumerate(indices):
        found = row[row >= 0]
        assert len(np.unique(found)) == len(found)
        assert (row[len(found) :] == -1).all()
        taken[step, found] = 1
    q = expected / num
    assert abs(taken.mean() - q) < 4 * math.sqrt(q * (1 - q) / taken.size)
    sizes = taken.sum(1)
    assert abs(sizes.var() / (num * q * (1 - q)) - 1) < 0.1  # a fixed size would have none
    each = (taken.mean(0) - q) / math.sqrt(q * (1 - q) / steps)
    assert abs(each).max() < 4.5 and abs(each.std() - 1) < 0.2
    pairs = np.corrcoef(taken.T)[np.triu_indices(num, 1)] * math.sqrt(steps)
    assert abs(pairs.std() - 1) < 0.05 and abs(pairs).max() < 6
    # Any part of the stream, in any order, by another object.
    some = np.random.default_rng(0).permutation(steps * rows)[:500]
    np.testing.assert_array_equal(Poisson(3, num, expected, rows)[some], indices.ravel()[some])
    assert (Poisson(4, num, expected, rows)[np.arange(rows)] != indices[0]).any()


def test_what_is_beyond_the_rows_is_left_out_at_random():
    num, rows, steps = 100, 8, 3000
    indices = Poisson(0, num, 20, rows)[np.arange(steps * rows)].reshape(steps, rows)
    full = indices[(indices >= 0).all(1)]
    assert len(full) > 0.99 * steps
    counts = np.bincount(full.ravel(), minlength=num)
    assert stats.chisquare(counts).pvalue > 1e-4  # no example is more often among those kept


def test_replicas_take_turns():
    """In a step no example can come to two replicas, and each comes to any with the same probability."""
    num, rows, steps, parts = 203, 64, 4000, 4
    order = Poisson(3, num, 24, rows, parts)
    found = order[np.arange(steps * rows)].reshape(steps, parts, rows // parts)
    turn = (np.arange(parts) + np.arange(steps)[:, None])[..., None] % parts
    assert ((found % parts == turn) | (found < 0)).all()
    counts = np.bincount(found[found >= 0], minlength=num)
    q = 6 / 51  # of a part's examples
    each = (counts / steps - q) / math.sqrt(q * (1 - q) / steps)
    assert abs(each).max() < 4.5 and abs(each.std() - 1) < 0.2
    some = np.random.default_rng(0).permutation(steps * rows)[:500]
    np.testing.assert_array_equal(Poisson(3, num, 24, rows, parts)[some], found.ravel()[some])


# ---- epsilon


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Of one release with sensitivity 1 (Balle and Wang 2018, theorem 8)."""
    cdf = stats.norm.cdf
    shift, half = epsilon * sigma, 0.5 / sigma
    return cdf(half - shift) - math.exp(epsilon) * cdf(-half - shift)


@pytest.mark.parametrize("sigma,steps", [(4.0, 10), (20.0, 100), (8.0, 1)])
def test_epsilon_of_whole_batches_is_that_of_one_gaussian(sigma, steps):
    whole = Mechanism(1000, 1000, 1000, 1.0, sigma, 1e-5)
    want = optimize.brentq(
        lambda e: gaussian_delta(sigma / math.sqrt(steps), e) - 1e-5, 1e-3, 50, xtol=1e-9
    )
    assert whole.epsilon(steps) == pytest.approx(want, rel=2e-3)
    assert whole.epsilon(0) == 0


@pytest.mark.parametrize("q,sigma", [(0.1, 1.0), (0.02, 0.6)])
def test_epsilon_of_one_sampled_step_is_the_integral(q, sigma):
    """max over both directions of the hockey-stick divergence of N(0) and (1 - q) N(0) + q N(1)."""
    above = lambda x: stats.norm.sf(x / sigma)

    def delta(epsilon):
        def crossing(ratio):  # where the densities' ratio, which rises with x, is this
            inner = (ratio - 1 + q) / q
            return sigma**2 * math.log(inner) + 0.5 if inner > 0 else -math.inf

        x = crossing(math.exp(epsilon))
        removed = (1 - q) * above(x) + q * above(x - 1) - math.exp(epsilon) * above(x)
        y = crossing(math.exp(-epsilon))
        mixed = (1 - q) * (1 - above(y)) + q * (1 - above(y - 1))
        return max(removed, 1 - above(y) - math.exp(epsilon) * mixed)

    want = optimize.brentq(lambda e: delta(e) - 1e-5, 1e-3, 50, xtol=1e-9)
    step = Mechanism(10_000, round(q * 10_000), 10_000, 1.0, sigma, 1e-5)
    assert step.epsilon(1) == pytest.approx(want, rel=2e-3)


def test_epsilon_of_a_published_setting():
    """Abadi et al. 2016, section 3.2: q 0.01, sigma 4, 10,000 steps, delta 1e-5: at most 1.26."""
    found = Mechanism(100_000, 1000, 1200, 1.0, 4.0, 1e-5).epsilon(10_000)
    assert 0.9 < found < 1.26  # theirs is an upper bound too, and a looser one


def test_truncation_costs():
    """An example that is there pushes another out, of which the sum then lacks the gradient."""
    roomy = Mechanism(60_000, 512, 1024, 1.0, 1.0, 1e-5)
    of = lambda rows: dataclasses.replace(roomy, rows=rows).epsilon(1000)
    assert of(625) == pytest.approx(of(1024), rel=1e-3)  # 5 deviations: the default
    assert of(600) > 1.05 * of(625)
    assert of(550) > 3 * of(625)
    assert Privacy(epsilon=1.0).sampled(625) == 511


def test_epsilon_of_replicas_is_that_of_one_of_them():
    words = ["--strategy", "local", "--strategy.replicas", "4", "--data.batch-size", "256"]
    words += ["--simulate", "4", "--mesh.replica", "4", "--mesh.data", "1", "--train.steps", "50"]
    program = spmd.load("digits", [*words, *NOISY]).experiment.build()
    made, num = program.privacy, len(program.source)
    assert made is not None
    each = Privacy(noise_multiplier=1.0).sampled(64)
    assert (made.parts, made.expected, made.rows) == (4, each, 64)
    assert program.examples == 4 * each
    alone = Mechanism(math.ceil(num / 4), each, 64, 1.0, 1.0, made.delta)
    assert made.epsilon(50) == alone.epsilon(50)
    assert made.deviation == 1.0 / each
    assert "each of 4 replicas samples" in made.about(50)
    order = program.order(program.source)
    assert len(np.unique(order[np.arange(64)] % 4)) <= 2  # one turn, and empty rows


@pytest.mark.gate
@pytest.mark.parametrize("target", slow_but((3.0,), (0.5, 3.0)))
def test_the_noise_for_an_epsilon_is_the_least_that_does(target):
    made = Privacy(epsilon=target).mechanism(60_000, 256, 200)
    assert made is not None
    assert made.epsilon(200) <= target
    less = dataclasses.replace(made, noise_multiplier=made.noise_multiplier * 0.99)
    assert less.epsilon(200) > target


# ---- runs


REPLICAS = ["--strategy", "local", "--strategy.replicas", "4", "--strategy.period", "2"]
REPLICAS += ["--mesh.replica", "2", "--mesh.data", "1", "--train.steps", "50"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--mesh.data", "2"],
        REPLICAS,
        [*REPLICAS, "--strategy.compress.kind", "int8"],  # after the noise nothing counts
    ],
)
def test_verify_of_a_private_step(more):
    words = ["--simulate", "4", "--mesh.fsdp", "2", "--train.accumulate", "2", *more]
    report = spmd.load("digits", [*words, "--privacy.noise-multiplier", "1.0"]).verify(2)
    assert report.verified, report


PRIVATE = ["--experiment", "digits", "--privacy.epsilon", "8", "--data.batch-size", "256"]


@pytest.mark.gate
def test_a_private_run_says_what_it_gives_away_and_resumes(run_main, tmp_path):
    words = [*PRIVATE, "--run.dir", "r", "--train.steps", "40", "--checkpoint.every", "20"]
    done = run_main(*words, "--eval.every", "20", "--log.every", "20", "--log.examples")
    assert done.returncode == 0, done.stderr
    assert "private: epsilon 7.99" in done.stdout or "private: epsilon 8.000" in done.stdout
    run = spmd.load("digits", [*words[2:5], "256", "--train.steps", "40"]).experiment
    made = run.privacy.mechanism(len(run.data.open("train")), 256, 40)
    history = [
        line["privacy/epsilon"] for line in lines(tmp_path / "r") if "privacy/epsilon" in line
    ]
    assert history == pytest.approx([made.epsilon(20), made.epsilon(40)])
    assert history[0] < history[1] <= 8
    first = next(line for line in lines(tmp_path / "r") if "train/clipped" in line)
    assert 0 < first["train/clipped"] <= 1
    # More steps would need more noise from the start.
    more = run_main(*words[:-3], "60")
    assert more.returncode == 2 and "noise multiplier" in more.stderr, more.stderr
    assert "Traceback" not in more.stderr and (tmp_path / "r/checkpoints/40").exists()


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# ---- mistakes


def refused(text, *words, **changes):
    loaded = spmd.load("digits", list(words)).experiment
    with pytest.raises(ValueError, match=text) as error:
        dataclasses.replace(loaded, **changes).build(jax.devices()[:1])
    assert "\n" not in str(error.value)


NOISY = ("--privacy.noise-multiplier", "1.0")


class Mine(StrategyConfig):
    """Says nothing of privacy."""

    name: ClassVar[str] = "mine"


def test_mistakes_are_told():
    refused(r"norms/0, norms/1 would mix them", *NOISY, model=CNN())
    refused("mixup", *NOISY, "--data.transforms", "mixup:0.2")
    refused("strategy mine .* use --strategy auto", *NOISY, strategy=Mine())
    refused("whole epochs, not as a random sample", *NOISY, strategy=Federated())
    int8 = Compression(kind="int8")
    refused("kind=int8 changes the sum; .* local", *NOISY, strategy=AllReduce(compress=int8))
    words = ("--privacy.expected-batch-size", "42", "--train.steps", "50")
    refused("42 does not divide over the 8 replicas", *NOISY, *words, strategy=Local())
    refused("out of reach .* spends", "--privacy.epsilon", "0.001", "--data.batch-size", "512")
    refused(
        "delta=0.001 must be less than one over",
        "--privacy.epsilon",
        "1",
        "--privacy.delta",
        "1e-3",
    )
    refused("use 34 or a larger", *NOISY, "--privacy.expected-batch-size", "65")
    refused(r"would sample \d+ of \d+ examples", *NOISY, "--data.batch-size", "4096")
    with pytest.raises(ValueError, match="both say how much"):
        Privacy(epsilon=1.0, noise_multiplier=1.0)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    privacy.epsilon.cache_clear()
    with pytest.raises(ValueError, match="pip install dp-accounting"):
        MECHANISM.epsilon(10)
