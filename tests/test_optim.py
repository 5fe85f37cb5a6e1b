"""Schedules by their closed forms, decay masks by dims, user mistakes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd import optim


def rates(config, steps, at):
    schedule = config.rate(steps)
    return [float(schedule(t)) for t in at]


def test_schedules():
    cosine = optim.SGD(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    assert rates(cosine, 110, [0, 5, 10]) == pytest.approx([0, 0.5, 1.0])
    assert rates(cosine, 110, [60, 110]) == pytest.approx([0.55, 0.1])
    wsd = optim.SGD(learning_rate=1.0, schedule="wsd", decay_fraction=0.5)
    assert rates(wsd, 100, [0, 50, 75, 100]) == pytest.approx([1, 1, 0.5, 0])
    assert rates(optim.SGD(learning_rate=0.3, schedule="constant"), 9, [0, 9]) == pytest.approx(
        [0.3] * 2
    )


def test_decay_leaves_out_biases_and_norms_also_when_stacked():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2), "s": jnp.ones((3, 2))}
    dims = {"w": ("embed", "mlp"), "b": ("mlp",), "s": ("layers", "embed")}
    assert optim.decay_mask(params, dims) == {"w": True, "b": False, "s": False}
    config = optim.AdamW(learning_rate=0.1, weight_decay=0.5, schedule="constant")
    tx = config.build(10, optim.decay_mask(params, dims))
    zeros = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.05)
    np.testing.assert_array_equal(updates["b"], 0)
    np.testing.assert_array_equal(updates["s"], 0)


def test_nesterov_follows_its_recursion():
    config = optim.SGD(learning_rate=0.1, momentum=0.9, schedule="constant")
    tx = config.build(5, {"w": True})
    params, gradient, trace = {"w": jnp.ones(())}, 2.0, 0.0
    state = tx.init(params)
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update({"w": jnp.asarray(gradient)}, state, params)
        trace = gradient + 0.9 * trace
        assert float(updates["w"]) == pytest.approx(-0.1 * (gradient + 0.9 * trace), rel=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": -1.0},
        {"momentum": 1.0},
        {"weight_decay": -0.1},
        {"clip_norm": -1.0},
        {"decay_fraction": 0.0},
        {"warmup_steps": -1},
    ],
)
def test_mistakes_name_the_field_and_the_value(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"optimizer\.{name}={value}"):
        optim.SGD(**wrong)
