"""Schedules, updates and averages by their closed forms and recursions, dims, user mistakes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spmd import optim
from spmd.core import tree


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


def test_the_rate_scales_with_the_batch():
    """Goyal et al. 2017, section 2.1 and 2.2: 0.1 for 256, so 3.2 for 8192, warmed up from 0.1."""
    config = optim.SGD(learning_rate=0.1, base_batch_size=256, warmup_steps=10, schedule="constant")
    rate = config.rate(100, 8192)
    np.testing.assert_allclose(
        [rate(0), rate(5), rate(10), rate(99)], [0.1, 1.65, 3.2, 3.2], rtol=1e-5
    )
    assert config.rate(100, 256)(50) == pytest.approx(0.1)
    assert config.rate(100, 128)(0) == pytest.approx(
        0.05
    )  # a smaller batch takes less, from the start
    plain = optim.SGD(learning_rate=0.1, warmup_steps=10, schedule="constant").rate(100, 8192)
    assert [plain(0), plain(10)] == pytest.approx([0.0, 0.1])


@pytest.mark.parametrize("config", [optim.LAMB(learning_rate=0.01), optim.LARS(trust=0.01)])
def test_a_step_is_as_long_as_its_layer(config):
    """In each slice of stacked layers by itself; and stacked layers step as unstacked ones do."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    stack = {"kernel": draw(3, 8, 4) * jnp.array([[[1.0]], [[10.0]], [[0.0]]]), "bias": draw(3, 4)}
    grads = {"kernel": draw(3, 8, 4), "bias": draw(3, 4)}
    dims = {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}
    config = dataclasses.replace(config, schedule="constant")

    def step(params, grads, dims):
        tx = config.transformation(10, optim.decay_mask(params, dims), dims)
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(grads, tx.init(params), params)[0]

    got = step(stack, grads, dims)
    length = lambda x: np.linalg.norm(np.asarray(x).reshape(3, -1), axis=1)
    want = config.learning_rate * getattr(config, "trust", 1.0) * length(stack["kernel"])
    np.testing.assert_allclose(length(got["kernel"])[:2], want[:2], rtol=1e-5)
    assert length(got["kernel"])[2] > 0  # a layer of zeros is not kept at zero
    for i in range(3):
        part = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        alone = step(part(stack), part(grads), {k: d[1:] for k, d in dims.items()})
        for name, want in alone.items():
            np.testing.assert_allclose(got[name][i], want, rtol=1e-5, err_msg=name)


def test_lamb_is_that_of_optax_where_nothing_is_stacked():
    params, grads = (
        {"kernel": jnp.ones((8, 4)) * 0.3},
        {"kernel": jnp.linspace(-1, 1, 32).reshape(8, 4)},
    )
    ours = optim.LAMB(schedule="constant", weight_decay=0.1).transformation(10, {"kernel": True})
    theirs = optax.lamb(2e-3, 0.9, 0.999, 1e-6, weight_decay=0.1)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            got = ours.update(grads, ours.init(params), params)[0]
            want = theirs.update(grads, theirs.init(params), params)[0]
    np.testing.assert_allclose(got["kernel"], want["kernel"], rtol=1e-5)


def test_decay_leaves_out_biases_and_norms_also_when_stacked():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2), "s": jnp.ones((3, 2))}
    dims = {"w": ("embed", "mlp"), "b": ("mlp",), "s": ("layers", "embed")}
    assert optim.decay_mask(params, dims) == {"w": True, "b": False, "s": False}
    config = optim.AdamW(learning_rate=0.1, weight_decay=0.5, schedule="constant")
    tx = config.transformation(10, optim.decay_mask(params, dims))
    zeros = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.05)
    np.testing.assert_array_equal(updates["b"], 0)
    np.testing.assert_array_equal(updates["s"], 0)


def test_nesterov_follows_its_recursion():
    config = optim.SGD(learning_rate=0.1, momentum=0.9, schedule="constant")
    tx = config.transformation(5, {"w": True})
    params, gradient, trace = {"w": jnp.ones(())}, 2.0, 0.0
    state = tx.init(params)
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update({"w": jnp.asarray(gradient)}, state, params)
        trace = gradient + 0.9 * trace
        assert float(updates["w"]) == pytest.approx(-0.1 * (gradient + 0.9 * trace), rel=1e-6)


def follow(config, gradients, params, dims=None):
    """The updates of optax's transformation, one for each tree of gradients; parameters stay."""
    dims = dims or dict.fromkeys(params)
    tx = config.transformation(len(gradients), optim.decay_mask(params, dims), dims)
    state, updates, step = tx.init(params), [], jax.jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):
        for gradient in gradients:
            update, state = step(gradient, state, params)
            updates.append(update)
    return updates, state


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_lion_takes_the_sign_of_its_interpolation():
    config = optim.Lion(learning_rate=0.5, b1=0.9, b2=0.8, weight_decay=0.1, schedule="constant")
    params = {"w": jnp.asarray(normal(0, 3, 4))}
    gradients = [normal(i + 1, 3, 4) for i in range(4)]
    updates, _ = follow(config, [{"w": jnp.asarray(g)} for g in gradients], params)
    momentum = np.zeros((3, 4), np.float32)
    for gradient, update in zip(gradients, updates, strict=True):
        sign = np.sign(0.9 * momentum + 0.1 * gradient)
        momentum = 0.8 * momentum + 0.2 * gradient
        want = -0.5 * (sign + 0.1 * np.asarray(params["w"]))
        np.testing.assert_allclose(update["w"], want, rtol=1e-6)


MUON = optim.Muon(learning_rate=1.0, weight_decay=0.0, schedule="constant")


def polynomial(values):
    """What five Newton-Schulz iterations make of the singular values (Jordan et al. 2024)."""
    values = values / np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_muon_orthogonalises(shape):
    """The singular vectors are kept, the singular values brought near 1, the whole scaled."""
    gradient = normal(0, *shape)
    (update,), _ = follow(MUON, [{"w": jnp.asarray(gradient)}], {"w": jnp.zeros(shape)})
    near = -np.asarray(update["w"]) / (0.2 * np.sqrt(max(shape)))
    u, values, v = np.linalg.svd(gradient, full_matrices=False)
    np.testing.assert_allclose(near, u * polynomial(values) @ v, atol=1e-4)
    after = np.linalg.svd(near, compute_uv=False)
    near_one = lambda values: np.mean((values > 0.65) & (values < 1.3))
    assert near_one(after) > 0.9 and near_one(values / values.max()) < 0.8
    assert np.sqrt(np.mean(np.square(update["w"]))) == pytest.approx(0.2, rel=0.25)  # AdamW's


def test_muon_momentum_is_nesterovs():
    gradients = [normal(i, 8, 8) for i in range(3)]
    updates, _ = follow(MUON, [{"w": jnp.asarray(g)} for g in gradients], {"w": jnp.zeros((8, 8))})
    momentum = sum(0.05 * 0.95 ** (2 - i) * g for i, g in enumerate(gradients))
    # Both terms with their bias corrected; the orthogonal factor does not see the common scale.
    looked = 0.95 * momentum / (1 - 0.95**4) + 0.05 * gradients[-1] / (1 - 0.95**3)
    (want,), _ = follow(
        dataclasses.replace(MUON, momentum=0.0),
        [{"w": jnp.asarray(looked)}],
        {"w": jnp.zeros((8, 8))},
    )
    np.testing.assert_allclose(updates[-1]["w"], want["w"], rtol=1e-3, atol=1e-4)


KINDS = {
    "hidden": ((8, 16), ("embed", "mlp"), "muon"),
    "no_dims": ((8, 16), None, "muon"),
    "convolution": ((3, 3, 4, 8), ("conv", "conv", "channels", "channels"), "muon"),
    "to_heads": ((16, 2, 8), ("embed", "heads", "head_dim"), "muon"),
    "from_heads": ((2, 8, 16), ("heads", "head_dim", "embed"), "muon"),
    "stacked": ((3, 8, 16), ("layers", "embed", "mlp"), "muon"),
    "expert": ((3, 2, 8, 16), ("layers", "experts", "embed", "mlp"), "muon"),
    "bias": ((8,), ("embed",), "adamw"),
    "stacked_bias": ((3, 8), ("layers", "embed"), "adamw"),
    "expert_bias": ((2, 8), ("experts", "mlp"), "adamw"),
    "head_bias": ((2, 8), ("heads", "head_dim"), "adamw"),
    "embedding": ((20, 8), ("vocab", "embed"), "adamw"),
    "head": ((8, 10), ("embed", "classes"), "adamw"),
    "first": ((8, 8), ("input", "embed"), "adamw"),
}


def test_muon_takes_the_matrices_of_hidden_layers():
    params = {name: jnp.zeros(shape) for name, (shape, _, _) in KINDS.items()}
    dims = {name: names for name, (_, names, _) in KINDS.items()}
    gradients = {name: jnp.asarray(normal(0, *shape)) for name, (shape, _, _) in KINDS.items()}
    (update,), state = follow(MUON, [gradients], params, dims)
    groups = state[0].inner_states
    owned = {
        group: {tree.path_name(path).split("/")[-1] for path, _ in leaves} & KINDS.keys()
        for group in groups
        for leaves in [jax.tree_util.tree_leaves_with_path(groups[group])]
    }
    for name, (_, _, group) in KINDS.items():
        assert [g for g in owned if name in owned[g]] == [group], name
    # As matrices: each of a stack by itself, heads and kernel positions flattened.
    flat = {
        "convolution": (1, 36, 8),
        "to_heads": (1, 16, 16),
        "from_heads": (1, 16, 16),
        "stacked": (3, 8, 16),
        "expert": (6, 8, 16),
    }
    for name, shape in flat.items():
        pairs = (np.asarray(x[name]).reshape(shape) for x in (gradients, update))
        for before, after in zip(*pairs, strict=True):
            u, values, v = np.linalg.svd(before, full_matrices=False)
            want = -0.2 * np.sqrt(max(shape[1:])) * (u * polynomial(values) @ v)
            np.testing.assert_allclose(after, want, atol=1e-4, err_msg=name)
    first = gradients["first"]
    np.testing.assert_allclose(update["first"], -np.sign(first), rtol=1e-5)  # Adam's first step


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_adafactor_is_the_outer_product_of_its_moments(shape):
    config = optim.Adafactor(
        learning_rate=1.0, min_dim_factored=4, clip_rms=0.0, schedule="constant"
    )
    params = {"w": jnp.asarray(normal(9, *shape))}
    gradients = [normal(i, *shape) for i in range(3)]
    updates, state = follow(config, [{"w": jnp.asarray(g)} for g in gradients], params)
    rows, columns = np.zeros(shape[0]), np.zeros(shape[1])
    scale = np.sqrt(np.mean(np.square(params["w"])))
    for step, (gradient, update) in enumerate(zip(gradients, updates, strict=True), start=1):
        decay = 1 - step**-0.8
        rows = decay * rows + (1 - decay) * np.square(gradient).mean(1)
        columns = decay * columns + (1 - decay) * np.square(gradient).mean(0)
        moment = np.outer(rows, columns) / rows.mean()
        np.testing.assert_allclose(update["w"], -scale * gradient / np.sqrt(moment), rtol=1e-4)
    kept = sum(x.size for x in jax.tree.leaves(state[0]) if x.ndim)
    assert kept == sum(shape) + 1  # the placeholder of the whole moment


def test_adafactor_keeps_small_arrays_whole_and_clips():
    config = optim.Adafactor(learning_rate=1.0, clip_rms=0.5, schedule="constant")
    gradient = normal(0, 6, 6)
    params = {"w": jnp.full((6, 6), 2.0)}
    (update,), _ = follow(config, [{"w": jnp.asarray(gradient)}], params)
    np.testing.assert_allclose(update["w"], -2.0 * 0.5 * np.sign(gradient), rtol=1e-5)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_state_keeps_its_types(name, dtype):
    params = {"w": jnp.ones((128, 128), dtype), "b": jnp.ones(4, dtype)}
    config = optim.named(name)()
    before = jax.eval_shape(config.transformation(5, {"w": True, "b": False}).init, params)
    _, after = follow(config, [params], params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )
    real = {x.dtype for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert real <= {jnp.dtype("float32")}  # whatever the parameters' type


MISTAKES = [
    (optim.SGD, "learning_rate", -1.0),
    (optim.SGD, "momentum", 1.0),
    (optim.SGD, "weight_decay", -0.1),
    (optim.SGD, "clip_norm", -1.0),
    (optim.SGD, "decay_fraction", 0.0),
    (optim.SGD, "warmup_steps", -1),
    (optim.SGD, "ema", 1.0),
    (optim.AdamW, "b2", 1.0),
    (optim.Lion, "b1", -0.1),
    (optim.Muon, "momentum", 1.5),
    (optim.Muon, "num_iterations", 0),
    (optim.Muon, "rms", 0.0),
    (optim.LARS, "trust", 0.0),
    (optim.SGD, "base_batch_size", -1),
    (optim.Adafactor, "decay_rate", 0.0),
    (optim.Adafactor, "min_dim_factored", 0),
    (optim.Adafactor, "clip_rms", -1.0),
    (optim.Adafactor, "momentum", 1.0),
]


@pytest.mark.parametrize("cls,name,value", MISTAKES)
def test_mistakes_name_the_field_and_the_value(cls, name, value):
    with pytest.raises(ValueError, match=rf"optimizer\.{name}={value}"):
        cls(**{name: value})


def test_a_warm_up_must_end_within_the_run():
    config = optim.AdamW(warmup_steps=20)
    assert rates(config, 20, [20]) == pytest.approx([1e-3])
    with pytest.raises(ValueError, match=r"warmup_steps=20 is more than the 19 steps"):
        config.rate(19)
