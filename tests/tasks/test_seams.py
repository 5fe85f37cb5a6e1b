"""The seams of a task: variables of its own, frozen models, gathered batches, and what they refuse."""

from __future__ import annotations

import dataclasses
import re
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spmd import optim
from spmd.core import tree
from spmd.metrics import RMSE, Accuracy
from spmd.models.layers.linear import Dense
from spmd.models.mlp import MLP
from spmd.parallel import mesh, scope
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import AllReduce, Auto, Local, Server, base
from spmd.strategies.privacy import Mechanism
from spmd.tasks import Classification, FrozenModel, Task, losses
from tests.cases import assert_same_values
from tests.marks import slow_but

STEPS, BATCH = 6, 16
MODEL = MLP(inputs=6, hidden=(8,), classes=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distilled(Classification):
    """A student of a frozen teacher, two losses balanced by uncertainty weights (Kendall et al. 2018)."""

    frozen = MappingProxyType({"teacher": FrozenModel(model=MODEL)})

    def weights(self, batch):
        return dict.fromkeys(("loss", "teacher"), super().weights(batch)["loss"])

    def coefficients(self, model):
        return {"loss": 1.0, "teacher": 1.0}

    def variables(self, rngs):
        return {"log_variance": jnp.zeros(2)}

    def values(self, outputs, batch, *, train):
        of_label = super().values(outputs, batch, train=train)["loss"]
        of_teacher = jnp.square(outputs - batch["frozen/teacher"]).mean(-1)
        s = batch["task/log_variance"]
        uncertain = lambda loss, s: jnp.exp(-s) * loss + s / 2
        return {"loss": uncertain(of_label, s[0]), "teacher": uncertain(of_teacher, s[1])}


class Towers(nnx.Module):
    """Two towers, and the scores of all items."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.user = Dense(rngs, (6, 4), ("input", "embed"), bias=False)
        self.item = Dense(rngs, (6, 4), ("input", "embed"), bias=False)

    def __call__(self, user, item):
        return {"user": self.user(user), "item": self.item(item)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """Each user's item among those of the batch, at a learned temperature."""

    def inputs(self, batch):
        return batch["image"], batch["item"]

    def variables(self, rngs):
        return {"log_temperature": jnp.zeros(())}

    def values(self, outputs, batch, *, train):
        if not train:
            return {"loss": jnp.square(outputs["user"] - outputs["item"]).sum(-1)}
        items = scope.gather_batch(outputs["item"])
        score = outputs["user"] @ items.rows.T * jnp.exp(batch["task/log_temperature"])
        score = jnp.where(items.weight[None] > 0, score, -1e9)
        right = jnp.take_along_axis(score, items.index[:, None], axis=1)[:, 0]
        return {"loss": jax.nn.logsumexp(score, axis=-1) - right}


class Heads(nnx.Module):
    """A trunk and a head for each of two tasks."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.trunk = Dense(rngs, (6, 8), ("input", "embed"))
        self.classes = Dense(rngs, (8, 4), ("embed", "classes"))
        self.value = Dense(rngs, (8, 1), ("embed", "classes"))

    def __call__(self, x):
        x = jnp.tanh(self.trunk(x))
        return {"classes": self.classes(x), "value": self.value(x)[..., 0]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoSources(Task):
    """Rows of source 0 are classified, those of source 1 have a real value; uncertainty weights."""

    input: str = "image"

    def weights(self, batch):
        of_source = lambda number: (batch["source"] == number).astype(jnp.float64)
        return {"classes": of_source(0), "value": of_source(1)}

    def coefficients(self, model):
        return {"classes": 1.0, "value": 0.5}  # none is called loss: their sum is logged

    def variables(self, rngs):
        return {"log_variance": jnp.zeros(2)}

    def values(self, outputs, batch, *, train):
        s = batch["task/log_variance"]
        classes = losses.cross_entropy(outputs["classes"], batch["label"])
        value = jnp.square(outputs["value"] - batch["item"][:, 0])
        return {
            "classes": jnp.exp(-s[0]) * classes + s[0] / 2,
            "value": jnp.exp(-s[1]) * value + s[1] / 2,
        }


class Twice(Classification):
    """Calls its model on the batch and on the batch mirrored, as contrastive tasks do."""

    def sums(self, model, batch, *, hidden=None, train):
        both = model(*self.inputs(batch)) + model(-batch["image"])
        return self.sums_of(both, batch, self.counted(batch), train=train)


TASKS: dict[str, tuple[Task, Any]] = {
    "distilled": (Distilled(), MODEL),
    "retrieval": (Retrieval(), Towers),
    "two sources": (TwoSources(), Heads),
    "twice": (Twice(), MODEL),
}
LAYOUTS = {
    "auto2": (Auto(), MeshConfig(), 2, 1),
    "auto4 accumulated": (Auto(), MeshConfig(), 4, 2),
    "fsdp8": (Auto(), MeshConfig(data=2, fsdp=4), 8, 1),
    "allreduce4": (AllReduce(), MeshConfig(), 4, 1),
    "allreduce2x4 accumulated": (AllReduce(), MeshConfig(replica=2, data=4), 8, 2),
    "server2": (Server(), MeshConfig(), 2, 1),
}
MATRIX = {
    f"{kind}{num}{' accumulated' * (accumulate - 1)}": (strategy, MeshConfig(), num, accumulate)
    for kind, strategy in (("auto", Auto()), ("allreduce", AllReduce()))
    for num in (1, 2, 4, 8)
    for accumulate in (1, 2)
    if (kind, num) != ("auto", 1)  # the reference
}
QUICK = [(name, layout) for name in TASKS for layout in LAYOUTS]
CASES = [(name, layout) for name in TASKS for layout in LAYOUTS | MATRIX]


def batch_at(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    weight = np.ones(BATCH)
    weight[rng.integers(0, BATCH, 5)] = 0
    weight[3] = 0.25  # uneven weights
    return {
        "image": rng.normal(size=(BATCH, 6)),
        "item": rng.normal(size=(BATCH, 6)),
        "label": rng.integers(0, 4, BATCH).astype(np.int32),
        "source": rng.integers(0, 2, BATCH).astype(np.int32),
        "example_id": np.arange(BATCH, dtype=np.int32) + step * BATCH,
        "weight": weight,
    }


def parts_of(task: Task, model: Any, layout: Any, **changes: Any) -> base.Parts:
    objective = task.build(model, "float64")
    params, _ = jax.eval_shape(objective.init, jax.random.key(0))
    decayed = optim.decay_mask(params, objective.dims)
    config = optim.AdamW(learning_rate=0.01, schedule="constant")
    devices_mesh = mesh.make(layout[1], jax.devices()[: layout[2]])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_at(0))
    return base.Parts(
        task=objective,
        tx=config.transformation(STEPS, decayed, objective.dims, BATCH),
        rate=config.rate(STEPS, BATCH),
        mesh=devices_mesh,
        batch=abstract,
        accumulate=layout[3],
    )._replace(**changes)


def trained(task: Task, model: Any, layout: Any) -> tuple[Any, list[float]]:
    strategy = layout[0].build(parts_of(task, model, layout))
    state, losses = strategy.init(jax.random.key(0)), []
    for step in range(STEPS):
        batch = jax.device_put(batch_at(step), strategy.batch_shardings)
        state, metrics = strategy.step(state, batch)
        losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def on_one_device():
    """(task, microbatches) -> its state and losses on one device, once each."""
    results: dict[Any, Any] = {}

    def get(name: str, accumulate: int):
        if (name, accumulate) not in results:
            layout = (Auto(), MeshConfig(), 1, accumulate)
            results[name, accumulate] = trained(*TASKS[name], layout)
        return results[name, accumulate]

    return get


@pytest.mark.parametrize("name,layout", slow_but(QUICK, CASES))
def test_a_task_computes_what_it_computes_on_one_device(name, layout, on_one_device, devices, x64):
    *_, accumulate = chosen = (LAYOUTS | MATRIX)[layout]
    want, want_losses = on_one_device(name, accumulate)
    got, losses = trained(*TASKS[name], chosen)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-10)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path((want.params, want.model_state)),
        jax.tree.leaves((got.params, got.model_state)),
        strict=True,
    ):
        assert np.abs(x - y).max() <= 1e-9 * np.abs(x).max(), path
    if name == "distilled":
        teacher = want.model_state["frozen/teacher"]["params"]
        first = jax.device_get(Auto().build(parts_of(*TASKS[name], chosen)).init(jax.random.key(0)))
        jax.tree.map(
            np.testing.assert_array_equal, teacher, first.model_state["frozen/teacher"]["params"]
        )
        assert np.abs(want.params["task"]["log_variance"]).min() > 1e-3
        assert "frozen/teacher" not in want.opt_state


# ---- what is refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd(Classification):
    """A task with one thing wrong."""

    wrong: str = ""

    def weights(self, batch):
        weight = super().weights(batch)["loss"]
        return {
            "term": {"loss": weight, "other": weight},
            "row": {"loss": weight[1:]},
        }.get(self.wrong, {"loss": weight})

    def values(self, outputs, batch, *, train):
        value = super().values(outputs, batch, train=train)["loss"]
        return {"values": {"los": value}, "shape": {"loss": value[:, None]}}.get(
            self.wrong, {"loss": value}
        )


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            Odd(wrong="term"),
            "weights() has the terms loss, other, and coefficients() loss: they must be the same",
        ),
        (Odd(wrong="row"), "are of shape [15]; their first dim must be the batch, 16"),
        (Odd(wrong="values"), "values() has the terms los, and weights() loss"),
        (
            Odd(wrong="shape"),
            "the values of term 'loss' are of shape [16, 1] and its weights of [16]",
        ),
        (Task(), "task Task does not say what its model reads: give it a field `input`"),
    ],
)
def test_a_task_that_contradicts_itself_is_refused_with_both_sides(task, message, x64):
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(task, MODEL, (Auto(), MeshConfig(), 1, 1))


@pytest.mark.parametrize("strategy", [Auto(), Local(replicas=2, period=2)])
def test_without_a_term_called_loss_their_sum_is_logged(strategy, devices, x64):
    parts = parts_of(*TASKS["two sources"], (strategy, MeshConfig(), 2, 1))
    built = strategy.build(parts)
    state = built.init(jax.random.key(0))
    state, metrics = built.step(state, jax.device_put(batch_at(0), built.batch_shardings))
    total = metrics["classes"] + 0.5 * metrics["value"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-12)
    assert metrics["finite"] == 1
    params, model_state = built.eval_variables(state)
    totals = jax.device_get(jax.jit(parts.task.evaluate)(params, model_state, batch_at(1)))
    values = parts.task.measured(totals)
    assert values["loss"] == pytest.approx(values["classes"] + 0.5 * values["value"], rel=1e-12)
    # No row of source 1: its term has no value, and adds nothing.
    totals["value"] = {"sum": np.zeros(()), "weight": np.zeros(())}
    assert parts.task.measured(totals)["loss"] == values["classes"]


def test_a_task_without_terms_is_refused():
    empty = type("Empty", (Classification,), {"coefficients": lambda self, model: {}})
    with pytest.raises(ValueError, match=r"Empty: coefficients\(\) names no loss term"):
        empty().build(MODEL)


def test_only_means_are_logged_in_training():
    class Logged(Classification):
        metrics = (RMSE(), Accuracy())
        train_metrics = ("rmse",)

    with pytest.raises(ValueError, match=r"train_metrics names rmse; .* metrics: accuracy"):
        Logged().build(MODEL)


def test_a_task_that_calls_its_model_twice_is_not_pipelined(devices, x64):
    layout = (Auto(), MeshConfig(data=1, stage=2), 2, 2)
    model = MLP(inputs=6, hidden=(8, 8, 8), classes=4, stacked=True)
    with pytest.raises(ValueError, match=r"Twice calls the model .* cannot be pipelined"):
        trained(Twice(), model, layout)


DEEP = MLP(inputs=6, hidden=(8,) * 5, classes=4, stacked=True)
STAGED = {
    "stage2": (Auto(), MeshConfig(data=1, stage=2), 2, 2),
    "stage2 fsdp2x2": (Auto(), MeshConfig(data=2, fsdp=2, stage=2), 8, 2),
    "stage2 allreduce2": (AllReduce(), MeshConfig(data=2, stage=2), 4, 2),
}


@pytest.mark.parametrize("layout", slow_but([], STAGED, gate=["stage2 fsdp2x2"]))
def test_a_frozen_teacher_stands_beside_a_pipeline(layout, devices, x64):
    """Its layers too are sharded over the stages; its outputs are those of the direct step."""
    teacher = MappingProxyType({"teacher": FrozenModel(model=DEEP)})
    task = type("Deep", (Distilled,), {"frozen": teacher})()
    want, want_losses = trained(task, DEEP, (Auto(), MeshConfig(), 1, 2))
    got, losses = trained(task, DEEP, STAGED[layout])
    np.testing.assert_allclose(losses, want_losses, rtol=1e-10)
    named = lambda state: tree.named_leaves((state.params, state.model_state))
    assert_same_values(named(got), named(want))
    assert np.abs(want.params["task"]["log_variance"]).min() > 1e-3


def test_gathered_batches_are_refused_where_there_is_no_batch(x64):
    private = Mechanism(
        num_examples=64, expected=8, rows=BATCH, clip_norm=1.0, noise_multiplier=1.0, delta=1e-5
    )
    layout = (Auto(), MeshConfig(), 1, 1)
    parts = parts_of(*TASKS["retrieval"], layout, privacy=private)
    state = jax.eval_shape(
        Auto().build(parts_of(*TASKS["retrieval"], layout)).init, jax.random.key(0)
    )
    with pytest.raises(ValueError, match="gather_batch: privacy clips the gradient of each"):
        Auto().build(parts).step.lower(state, batch_at(0))
    with pytest.raises(ValueError, match="does not depend on its batch size"):
        scope.gather_batch(jnp.ones(3))
