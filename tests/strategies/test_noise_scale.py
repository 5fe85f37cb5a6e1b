"""The gradient noise scale of a problem whose own is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spmd
from spmd import optim, tasks
from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import AllReduce, Auto, base

BATCH, DIM = 64, 16
CENTRE = np.full(DIM, 0.25)
DEVIATION = np.linspace(0.5, 1.5, DIM)
SIGNAL = float((CENTRE**2).sum())  # the parameters stay at 0
VARIANCE = float((DEVIATION**2).sum())


def quadratic() -> tasks.Objective:
    """Half the squared distance of the parameters to each example: its gradient is params - example."""

    def loss(params, model_state, batch, key, scale):
        each = 0.5 * jnp.sum((params["w"][None] - batch["x"]) ** 2, axis=1) * batch["weight"]
        return each.sum() * scale["loss"], (
            {"loss": (each.sum(), batch["weight"].sum())},
            model_state,
        )

    return tasks.Objective(
        init=lambda key: ({"w": jnp.zeros(DIM)}, {}),
        dims={"w": None},
        coefficients={"loss": 1.0},
        weigh=lambda batch: {"loss": batch["weight"].sum()},
        loss=loss,
        evaluate=lambda *args: {},
        measured=lambda totals: {},
        predict=lambda *args: args[0],
        call=lambda *args: None,
    )


def batch_at(step: int, uneven: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    weight = np.ones(BATCH, np.float32)
    weight[:24] = 0 if uneven else 1  # whole devices without an example
    x = CENTRE + DEVIATION * rng.standard_normal((BATCH, DIM))
    ids = np.arange(BATCH, dtype=np.int32)
    return {"x": x.astype(np.float32), "example_id": ids, "weight": weight}


CASES = {
    "one device, 4 microbatches": (Auto(), 1, 4, False),
    "auto, 2 devices, 2 microbatches": (Auto(), 2, 2, True),
    "allreduce, 8 devices": (AllReduce(), 8, 1, True),
    "allreduce, 4 devices, 4 microbatches": (AllReduce(), 4, 4, False),
}


@pytest.mark.parametrize("case", CASES)
def test_signal_and_variance_are_those_of_the_problem(case):
    strategy, num, accumulate, uneven = CASES[case]
    still = optim.SGD(learning_rate=0.0, momentum=0.0)
    abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch_at(0, False).items()}
    parts = base.Parts(
        task=quadratic(),
        tx=still.transformation(10, {"w": False}),
        rate=still.rate(10),
        mesh=mesh.make(MeshConfig(), jax.devices()[:num]),
        batch=abstract,
        accumulate=accumulate,
        noise_scale=True,
    )
    built = strategy.build(parts)
    state, found = built.init(jax.random.key(0)), []
    for step in range(400):
        batch = jax.device_put(batch_at(step, uneven), built.batch_shardings)
        state, metrics = built.step(state, batch)
        found.append([float(metrics[f"gradient_{k}"]) for k in ("signal", "variance")])
    signal, variance = np.mean(found, axis=0)
    error = np.std(found, axis=0) / np.sqrt(len(found))
    assert abs(signal - SIGNAL) < 4 * error[0] and error[0] < 0.1 * SIGNAL
    assert abs(variance - VARIANCE) < 4 * error[1] and error[1] < 0.05 * VARIANCE
    assert not any(name.startswith("parts") for name in metrics)


@pytest.mark.gate
def test_it_is_logged_and_printed(tmp_path, capsys):
    words = ["--train.noise-scale", "--train.accumulate", "4", "--train.steps", "60"]
    run = spmd.load("digits", [*words, "--log.every", "20", "--run.dir", str(tmp_path)]).train()
    assert run.metrics["train/noise_scale"] > 0
    assert "batches up to about that size are advised" in capsys.readouterr().out


def test_one_part_is_refused():
    for words in ([], ["--simulate", "2"]):
        with pytest.raises(ValueError, match="one part: use --train"):
            spmd.load("digits", ["--train.noise-scale", *words]).experiment.build()
    private = ["--train.noise-scale", "--train.accumulate", "2", "--privacy.noise-multiplier", "1"]
    with pytest.raises(ValueError, match="privacy adds noise"):
        spmd.load("digits", private).experiment.build()
