"""Losses of the tasks by their definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd import tasks
from spmd.models.mlp import MLP


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_blends_the_losses_and_their_gradients(smoothing):
    task = tasks.Classification(label_smoothing=smoothing).build(MLP(inputs=6, hidden=(8,)))
    params, state = task.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.integers(0, 10, 5).astype(np.int32)) for _ in range(2))
    share = jnp.asarray(rng.uniform(size=5).astype(np.float32))
    weight = jnp.asarray([1.0, 1.0, 0.0, 1.0, 1.0])
    batch = {"image": jnp.asarray(rng.normal(size=(5, 6)).astype(np.float32)), "label": a}
    batch |= {"example_id": jnp.arange(5, dtype=jnp.int32), "weight": weight}

    def loss(params, batch):
        scale = {"loss": jnp.ones(())}
        total, (sums, _) = task.loss(params, state, batch, jax.random.key(1), scale)
        return total, sums

    run = jax.value_and_grad(loss, has_aux=True)
    (got, sums), gradient = run(params, batch | {"label_b": b, "mix": share})
    # By linearity: the losses of each label alone, its examples weighted by their share.
    (first, sums_a), gradient_a = run(params, batch | {"weight": weight * share})
    (second, sums_b), gradient_b = run(params, batch | {"weight": weight * (1 - share), "label": b})
    assert float(got) == pytest.approx(float(first + second), rel=1e-5)
    for name in ("loss", "accuracy"):
        assert float(sums[name][0]) == pytest.approx(
            float(sums_a[name][0] + sums_b[name][0]), rel=1e-5
        )
        assert float(sums[name][1]) == 4  # a blend counts once
    both = jax.tree.map(jnp.add, gradient_a, gradient_b)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), gradient, both
    )
    assert abs(float(first - second)) > 1e-3  # the two labels do differ
