"""The parameter server: staleness by its recursion, who owns what, what a skipped step leaves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd import optim, tasks
from spmd.core import tree
from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import Server, base
from tests.cases import MODELS, parts_for
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("devices")
D, BATCH, RATE = 1024, 8, 0.125
CURVATURE = np.linspace(0.2, 1.5, D)


def quadratic() -> tasks.Objective:
    """sum of curvature (w - x)^2 / 2 over the examples; its gradient is linear in w."""

    def loss(params, model_state, batch, step_key, scale):
        one = lambda x: 0.5 * (jnp.asarray(CURVATURE) * jnp.square(params["w"] - x)).sum()
        total = (jax.vmap(one)(batch["x"]) * batch["weight"]).sum()
        return total * scale["loss"], ({"loss": (total, batch["weight"].sum())}, model_state)

    unused = lambda *_: None
    return tasks.Objective(
        init=lambda key: ({"w": jnp.zeros(D)}, {}),
        dims={"w": None},
        coefficients={"loss": 1.0},
        weigh=lambda batch: {"loss": batch["weight"].sum()},
        loss=loss,
        evaluate=unused,
        measured=unused,
        predict=unused,
        call=unused,
    )


def built(staleness: int, num_devices: int, **changes):
    batch = {
        "x": jax.ShapeDtypeStruct((BATCH, D), jnp.float64),
        "weight": jax.ShapeDtypeStruct((BATCH,), jnp.float64),
    }
    cut = mesh.make(MeshConfig(), jax.devices()[:num_devices])
    config = optim.SGD(learning_rate=RATE, momentum=0.0, schedule="constant")
    params, _ = jax.eval_shape(quadratic().init, jax.random.key(0))
    parts = base.Parts(
        task=quadratic(),
        tx=config.transformation(100, optim.decay_mask(params, {"w": None}), {"w": None}),
        rate=config.rate(100),
        mesh=cut,
        batch=batch,
    )
    return Server(staleness=staleness).build(parts._replace(**changes))


def batches(num: int):
    rng = np.random.default_rng(0)
    for _ in range(num):
        weight = np.ones(BATCH)
        weight[5:7] = 0
        yield {"x": rng.normal(size=(BATCH, D)), "weight": weight}


def recursion(staleness: int, given) -> list[np.ndarray]:
    """w[t + 1] = w[t] - rate h (w[t - k] - mean x[t]), and before the first update w was what it was."""
    path = [np.zeros(D)]
    for batch in given:
        mean = np.average(batch["x"], axis=0, weights=batch["weight"])
        old = path[max(0, len(path) - 1 - staleness)]
        path.append(path[-1] - RATE * CURVATURE * (old - mean))
    return path


EVERY = [(staleness, num) for staleness in range(9) for num in (1, 4)]


@pytest.mark.parametrize(
    ("staleness", "num_devices"), slow_but([(3, 1)], EVERY, gate=[(0, 4), (8, 4)])
)
def test_staleness_is_its_recursion(staleness, num_devices):
    with jax.enable_x64(True):
        strategy = built(staleness, num_devices)
        state = strategy.init(jax.random.key(0))
        given = list(batches(20))
        want = recursion(staleness, given)
        for batch, after in zip(given, want[1:], strict=True):
            state, _ = strategy.step(state, jax.device_put(batch, strategy.batch_shardings))
            np.testing.assert_allclose(state.params["w"], after, rtol=1e-12, atol=1e-12)
    if staleness:
        assert abs(want[-1] - recursion(staleness - 1, given)[-1]).max() > 1e-3


def test_a_skipped_step_does_not_age_the_queue():
    with jax.enable_x64(True):
        strategy = built(2, 4, skip=True)
        state = strategy.init(jax.random.key(0))
        given = list(batches(9))
        for i, batch in enumerate(given):
            if i in (1, 4, 5):  # as many as would bring the ring buffer out of step
                bad = batch | {"x": np.full_like(batch["x"], np.nan)}
                state, metrics = strategy.step(state, jax.device_put(bad, strategy.batch_shardings))
                assert metrics["finite"] == 0
            state, _ = strategy.step(state, jax.device_put(batch, strategy.batch_shardings))
        np.testing.assert_allclose(state.params["w"], recursion(2, given)[-1], rtol=1e-12)


def test_other_parameters_fill_the_queue():
    """Workers of imported weights do not start from those that were drawn."""
    with jax.enable_x64(True):
        strategy = built(3, 4)
        state = strategy.init(jax.random.key(0))
        state = strategy.with_params(state, {"w": np.full(D, 2.0)})
        (batch,) = batches(1)
        state, _ = strategy.step(state, jax.device_put(batch, strategy.batch_shardings))
        mean = np.average(batch["x"], axis=0, weights=batch["weight"])
        np.testing.assert_allclose(state.params["w"], 2 - RATE * CURVATURE * (2 - mean), rtol=1e-12)


def test_each_device_owns_its_part():
    """Parameters, moments, average and queue: an eighth each, but for what has less than 1024 elements."""
    parts = parts_for(
        MODELS["mlp"],
        mesh.make(MeshConfig(replica=2, data=4), jax.devices()),
        optimizer=optim.AdamW(learning_rate=1e-3, ema=0.9),
    )
    state = Server(staleness=2).build(parts).init(jax.random.key(0))
    cut = 0
    for name, leaf in tree.named_leaves(state).items():
        held = leaf.addressable_shards[0].data.size
        if "/layers/" in name and name.endswith("kernel"):
            assert held * 8 == leaf.size, name
            cut += 1
        elif "bias" in name or "head" in name:
            assert held == leaf.size, name
    assert cut == 2 * 5  # two kernels: parameters, mu, nu, average, queue
