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
from spmd import grad, mesh, optim, privacy, tree
from spmd.models.cnn import CNN
from spmd.models.mlp import MLP
from spmd.privacy import Mechanism, Poisson, Privacy
from spmd.strategies import StrategyConfig
from tests.marks import slow_but
from tests.strategies.test_parity import LAYOUTS, MODELS, TASKS, batch_at, data_of, parts_for

MECHANISM = Mechanism(
    num_examples=60000, expected=24, rows=32, clip_norm=0.5, noise_multiplier=1.5, delta=1e-5
)

# ---- the gradient


@pytest.mark.parametrize(
    ("name", "dtype", "accumulate"),
    slow_but(
        [("mlp", "float32", 4), ("lm", "float64", 1)],
        [(n, d, m) for n in ("mlp", "lm") for d in ("float32", "float64") for m in (1, 4)],
    ),
)
def test_gradient_is_that_of_a_loop_over_examples(name, dtype, accumulate):
    with jax.enable_x64(dtype == "float64"):
        model = MODELS[name]
        task = TASKS[type(model)].build(model, dtype)
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
        grads_of = grad.accumulated(grad.per_example(task, clip, 24), accumulate)
        got, sums, _ = jax.jit(grads_of)(params, state, batch, key, None)
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
def noise_of(layout, accumulate, steps=2):
    """What `steps` steps without any example add to the parameters, each leaf by name."""
    strategy, sizes, num = LAYOUTS[layout]
    optimizer = optim.SGD(learning_rate=1.0, momentum=0.0, schedule="constant")
    cut = mesh.make(sizes, jax.devices()[:num])
    parts = parts_for(WIDE, cut, accumulate=accumulate, optimizer=optimizer)
    built = strategy.build(parts._replace(privacy=MECHANISM))
    state, found = built.init(jax.random.key(0)), []
    empty = batch_at(0) | {"weight": np.zeros(32, np.float32)}
    for _ in range(steps):
        before = jax.tree.map(np.array, state.params)
        state, metrics = built.step(state, jax.device_put(empty, built.batch_shardings))
        found.append(jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, state.params, before))
        assert metrics["finite"] == 1
    return {f"{i}/{k}": v for i, s in enumerate(found) for k, v in tree.named_leaves(s).items()}


QUICK = [("psum1", 1), ("hsdp2x4", 4), ("tensor2", 1), ("psum2x4", 4)]


@pytest.mark.parametrize(
    "layout,accumulate", slow_but(QUICK, [(name, n) for name in LAYOUTS for n in (1, 4)])
)
def test_noise_is_added_once_with_the_right_deviation(layout, accumulate):
    found = noise_of(layout, accumulate)
    flat = np.concatenate([x.ravel() for x in found.values()]) / MECHANISM.deviation
    assert flat.size > 1e5
    assert abs(flat.std() - 1) < 0.01
    assert abs(flat.mean()) < 4 / math.sqrt(flat.size)
    assert abs((abs(flat) < 1).mean() - 0.6827) < 0.005  # a normal one
    first, second = (found[f"{i}/layers/1/kernel"].ravel() for i in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02  # anew in each step
    for leaf, want in noise_of("psum1", 1).items():  # and the same on every mesh
        np.testing.assert_allclose(found[leaf], want, atol=1e-6, err_msg=leaf)


def test_the_deviation_is_that_of_the_sum_over_the_expected_number():
    assert MECHANISM.deviation == pytest.approx(1.5 * 0.5 / 24)


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


@pytest.mark.parametrize("target", slow_but((3.0,), (0.5, 3.0)))
def test_the_noise_for_an_epsilon_is_the_least_that_does(target):
    made = Privacy(epsilon=target).mechanism(60_000, 256, 200)
    assert made is not None
    assert made.epsilon(200) <= target
    less = dataclasses.replace(made, noise_multiplier=made.noise_multiplier * 0.99)
    assert less.epsilon(200) > target


# ---- runs


@pytest.mark.slow
def test_verify_proves_a_private_step():
    words = ["--simulate", "4", "--mesh.data", "2", "--mesh.fsdp", "2", "--train.accumulate", "2"]
    report = spmd.load("digits", [*words, "--privacy.noise-multiplier", "1.0"]).verify(2)
    assert report.proven, report


PRIVATE = ["--experiment", "digits", "--privacy.epsilon", "8", "--data.batch-size", "256"]


def test_a_private_run_says_what_it_gives_away_and_resumes(run_cli, tmp_path):
    words = [*PRIVATE, "--run.dir", "r", "--train.steps", "40", "--checkpoint.every", "20"]
    done = run_cli(*words, "--eval.every", "20", "--log.every", "20", "--log.examples")
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
    more = run_cli(*words[:-3], "60")
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


class Local(StrategyConfig):
    """Says nothing of privacy."""

    name: ClassVar[str] = "mine"


def test_mistakes_are_told():
    refused(r"norms/0, norms/1 would mix them", *NOISY, model=CNN())
    refused("mixup", *NOISY, "--data.augment.mixup", "0.2")
    refused("bfloat16", *NOISY, "--param-dtype", "bfloat16")
    refused("strategy mine .* use --strategy auto", *NOISY, strategy=Local())
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
