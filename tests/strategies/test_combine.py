"""Gradients of several loss terms, combined: PCGrad against its algorithm, on meshes, in a plan."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd import Experiment, optim
from spmd.analysis.plan import planner
from spmd.core import tree
from spmd.data import Arrays
from spmd.hardware import hlo
from spmd.models.mlp import MLP
from spmd.parallel import mesh, scope
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import AllReduce, Auto, Compression, Local, Server, base, update
from spmd.strategies.grads.direct import Trained
from spmd.strategies.privacy import Privacy
from spmd.tasks import PCGrad, Task
from spmd.train import TrainConfig
from tests.cases import assert_same_values
from tests.marks import slow_but

STEPS, BATCH = 4, 16
MODEL = MLP(inputs=6, hidden=(16,), classes=3)
TERMS = ("loss", "second", "third")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Three(Task):
    """Three outputs with a target each; the targets contradict one another."""

    input: str = "image"
    combine = PCGrad()

    def weights(self, batch):
        num = batch["weight"].shape
        return {term: jnp.full(num, i + 1.0) for i, term in enumerate(TERMS)}

    def coefficients(self, model):
        return {"loss": 1.0, "second": 0.5, "third": 2.0}

    def values(self, outputs, batch, *, train):
        total = outputs.sum(-1)
        return {
            "loss": jnp.square(total - batch["target"][:, 0]),
            "second": jnp.square(total + batch["target"][:, 0]),
            "third": jnp.square(outputs[:, 0] - batch["target"][:, 1]),
        }


def batch_at(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    weight = np.ones(BATCH)
    weight[rng.integers(0, BATCH, 4)] = 0
    return {
        "image": rng.normal(size=(BATCH, 6)),
        "target": rng.normal(size=(BATCH, 2)),
        "example_id": np.arange(BATCH, dtype=np.int32) + step * BATCH,
        "weight": weight,
    }


def parts_of(config: MeshConfig, num: int, accumulate: int = 1) -> base.Parts:
    task = Three().build(MODEL, "float64")
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    sgd = optim.SGD(learning_rate=0.05, schedule="constant", clip_norm=0.5)
    return base.Parts(
        task=task,
        tx=sgd.transformation(STEPS, optim.decay_mask(params, task.dims), task.dims),
        rate=sgd.rate(STEPS),
        mesh=mesh.make(config, jax.devices()[:num]),
        batch=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_at(0)),
        accumulate=accumulate,
    )


def trained(strategy_config, *layout):
    """State and metrics after some steps, by name."""
    strategy = strategy_config.build(parts_of(*layout))
    state, metrics = strategy.init(jax.random.key(0)), {}
    for step in range(STEPS):
        batch = jax.device_put(batch_at(step), strategy.batch_shardings)
        with scope.bind(watched=True):
            state, metrics = strategy.step(state, batch)
    leaves = tree.named_leaves(jax.device_get((state.params, metrics)))
    return {name: np.asarray(leaf) for name, leaf in leaves.items() if name != "1/weights"}


def project(grads: list[np.ndarray], key: jax.Array) -> tuple[np.ndarray, int]:
    """(the sum of the projected gradients, conflicts): the algorithm of the paper, on flat gradients."""
    total, conflicts = np.zeros_like(grads[0]), 0
    for i, own in enumerate(grads):
        grad = own.copy()
        for j in np.asarray(jax.random.permutation(jax.random.fold_in(key, i), len(grads))):
            if j != i and grad @ grads[j] < 0:
                grad -= grad @ grads[j] / (grads[j] @ grads[j]) * grads[j]
                conflicts += 1
        total += grad
    return total, conflicts


def scaled_loss(task, state, batch, step_key, scale, params):
    return task.loss(params, state, batch, step_key, scale)[0]


def test_pcgrad_is_the_algorithm_of_the_paper():
    with jax.enable_x64(True):
        parts = parts_of(MeshConfig(), 1)
        task, conflicts = parts.task, 0
        params, state = task.init(jax.random.key(3))
        grads_of = jax.jit(base.grads_of(parts))
        join = jax.jit(task.combine.join, static_argnums=1)
        for step in range(5):
            batch, step_key = batch_at(step), jax.random.key(step)
            scale = task.scale(task.weigh(batch))
            (grads, _), _, _ = grads_of(Trained(params, {}), state, batch, step_key, scale)
            each = []
            for k, term in enumerate(TERMS):
                only = {name: x * float(name == term) for name, x in scale.items()}
                loss = functools.partial(scaled_loss, task, state, batch, step_key, only)
                want = jax.tree.leaves(jax.grad(loss)(params))
                each.append(np.concatenate([np.ravel(x) for x in want]))
                got = np.concatenate([np.ravel(x[k]) for x in jax.tree.leaves(grads)])
                np.testing.assert_allclose(got, each[-1], rtol=0, atol=1e-13)
            key = jax.random.fold_in(step_key, jnp.int32(update.COMBINE))
            joined, metrics = join(grads, TERMS, key)
            want, num = project(each, key)
            got = np.concatenate([np.ravel(x) for x in jax.tree.leaves(joined)])
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.abs(want).max())
            norms = [np.linalg.norm(g) for g in each]
            np.testing.assert_allclose(metrics["grad_norm/third"], norms[2])
            cosine = each[0] @ each[1] / norms[0] / norms[1]
            np.testing.assert_allclose(metrics["grad_cosine/loss/second"], cosine, atol=1e-12)
            conflicts += num
    assert conflicts >= 5


LAYOUTS = {
    "auto8": (Auto(), MeshConfig(), 8, 1),
    "fsdp2x2 accumulated": (Auto(), MeshConfig(data=2, fsdp=2), 4, 2),
    "allreduce4": (AllReduce(), MeshConfig(), 4, 1),
    "server4 accumulated": (Server(), MeshConfig(), 4, 2),
    "zero1 tensor2": (Auto(zero=1), MeshConfig(data=1, fsdp=2, tensor=2), 4, 1),
    "ring2x2": (AllReduce(reduction="ring"), MeshConfig(replica=2, data=2), 4, 1),
    "hierarchical2x2": (AllReduce(reduction="hierarchical"), MeshConfig(replica=2, data=2), 4, 1),
    "allreduce2 fsdp2": (AllReduce(), MeshConfig(data=2, fsdp=2), 4, 1),
    "server2 tensor2": (Server(), MeshConfig(data=2, tensor=2), 4, 1),
    "scatter2 accumulated": (AllReduce(reduction="reduce_scatter"), MeshConfig(), 2, 2),
}
QUICK = [*LAYOUTS][:4]


@pytest.mark.parametrize("layout", slow_but(QUICK, LAYOUTS))
def test_terms_are_combined_as_on_one_device(layout, devices):
    strategy, *shape = LAYOUTS[layout]
    with jax.enable_x64(True):
        assert_same_values(trained(strategy, *shape), trained(Auto(), MeshConfig(), 1))


def arrays():
    return {name: batch_at(0)[name].astype(np.float32) for name in ("image", "target")}


def experiment(**changes) -> Experiment:
    features = {"image": ((6,), "float32"), "target": ((2,), "float32")}
    given = {"task": Three(), "simulate": 4, "train": TrainConfig(steps=2)} | changes
    return Experiment(
        model=MODEL,
        data=Arrays(train=arrays, eval=arrays, features=features, batch_size=8),
        optimizer=optim.SGD(),
        **given,
    )


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"strategy": Local(replicas=4, period=2)}, "strategy local takes steps of its own"),
        (
            {"strategy": AllReduce(compress=Compression(kind="top-k"))},
            "kind=top-k changes each sum",
        ),
        ({"privacy": Privacy(noise_multiplier=1.0)}, "privacy clips the gradient of their sum"),
        ({"train": TrainConfig(steps=2, accumulate=2, noise_scale=True)}, "noise_scale measures"),
        ({"mesh": MeshConfig(data=2, stage=2)}, "use mesh.stage=1"),
    ],
)
def test_terms_that_cannot_be_taken_one_by_one_are_refused(changes, message, devices):
    with pytest.raises(ValueError, match=message):
        experiment(**changes).build(source=())


@pytest.mark.gate
@pytest.mark.parametrize("strategy", [Auto(), AllReduce()], ids=lambda s: s.name)
def test_a_plan_prices_a_reduction_for_each_term(strategy, devices):
    """The closed form counts K gradients, as the compiled step has them."""
    exp = experiment(strategy=strategy)
    plan = planner.plan(exp, "cpu:4", compiled=False)
    single = planner.plan(experiment(strategy=strategy, task=Single()), "cpu:4", compiled=False)
    planned, of_one = (
        sum(c.bytes * c.count for c in each.collectives if c.payload == "gradients")
        for each in (plan, single)
    )
    assert planned == 3 * of_one > 0
    assert plan.memory.gradients == 3 * single.memory.gradients
    program = exp.build(source=())
    step = program.strategy.step.lower(program.abstract_state(), program.abstract_batch())
    ledger = hlo.read(step.compile().as_text() or "", dict(program.mesh.shape))
    compiled = sum(c.bytes * c.count for c in ledger.collectives)
    assert planned <= compiled <= 1.1 * planned + 1024  # scalars beside them


class Single(Three):
    """The sum of the terms."""

    combine = None
