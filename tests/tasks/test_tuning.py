"""Preferences and distillation: the losses by numpy, one reference for adapters, the memory of both."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from spmd import optim
from spmd.core import tree
from spmd.models.transformer import Transformer
from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import Auto, base
from spmd.tasks import DPO, Distillation, FrozenModel, LanguageModel
from spmd.weights import adapters, quantized
from spmd.weights.config import InitConfig
from tests.cases import SMALL, preferences_at
from tests.marks import slow_but

MODEL = Transformer(**SMALL, layers=2)


def batch_at(step) -> dict[str, Any]:
    return {**preferences_at(step)}


def log_softmax(x):
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def test_the_loss_of_preferences_is_that_of_the_paper():
    rng, batch = np.random.default_rng(0), batch_at(0)
    scores, reference = -rng.random((2, 32, 16)).astype(np.float32)
    task = DPO(beta=0.3, label_smoothing=0.2)
    counted = lambda x, segment: np.where((batch["segments"] == segment), x, 0).sum(1)
    ratio = lambda segment: counted(scores, segment) - counted(reference, segment)
    margin = 0.3 * (ratio(1) - ratio(2))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    whole = batch | {"frozen/reference": jax.numpy.asarray(reference)}
    values = lambda train: task.values(jax.numpy.asarray(scores), whole, train=train)["loss"]
    np.testing.assert_allclose(values(False), -np.log(sigmoid(margin)), rtol=1e-5)
    smoothed = -0.8 * np.log(sigmoid(margin)) - 0.2 * np.log(sigmoid(-margin))
    np.testing.assert_allclose(values(True), smoothed, rtol=1e-5)
    found = {m.name: np.asarray(m.values(jax.numpy.asarray(scores), whole)) for m in task.metrics}
    np.testing.assert_allclose(found["margin"], margin, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["chosen"] - found["rejected"], margin, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found["accuracy"], margin > 0)


def test_the_loss_of_distillation_is_that_of_the_paper():
    rng, batch = np.random.default_rng(0), batch_at(0)
    student, teacher = 3 * rng.normal(size=(2, 32, 16, 8)).astype(np.float32)
    student[..., 7] = teacher[..., 7] = np.finfo(np.float32).min  # pads a vocabulary of 7
    batch["targets"] = batch["targets"] % 7
    task = Distillation(teacher=FrozenModel(model=MODEL), temperature=2.5, weight=0.75)
    found = task.values(student, batch | {"frozen/teacher": teacher}, train=True)
    p, q = (log_softmax(x[..., :7].astype(np.float64) / 2.5) for x in (teacher, student))
    np.testing.assert_allclose(
        found["kl"], 2.5**2 * (np.exp(p) * (p - q)).sum(-1), rtol=1e-4, atol=1e-5
    )
    own = np.take_along_axis(log_softmax(student[..., :7]), batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(found["cross_entropy"], -own, rtol=1e-4, atol=1e-5)
    assert task.coefficients(MODEL) == {"cross_entropy": 0.25, "kl": 0.75}


def step_of(task, model, config, lora=0, *, rows=32, length=16, quantize="none"):
    """(objective, strategy, abstract state, abstract batch) of a training on some mesh."""
    objective = adapters.adapt(task.build(model), InitConfig(lora=lora, quantize=quantize))
    params, _ = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = optim.AdamW(learning_rate=1e-2, schedule="constant")
    tokens = jax.ShapeDtypeStruct((rows, length), "int32")
    batch: Any = dict.fromkeys(("tokens", "targets", "segments", "positions"), tokens)
    batch |= {
        n: jax.ShapeDtypeStruct((rows,), t)
        for n, t in (("weight", "float32"), ("example_id", "int32"))
    }
    num = int(np.prod([getattr(config, axis) for axis in ("data", "fsdp", "tensor")]))
    parts = base.Parts(
        task=objective,
        tx=optimizer.transformation(10, optim.decay_mask(params, objective.dims), objective.dims),
        rate=optimizer.rate(10),
        mesh=mesh.make(config, jax.devices()[:num]),
        batch=batch,
    )
    strategy = Auto().build(parts)
    return objective, strategy, jax.eval_shape(strategy.init, jax.random.key(0)), batch


@pytest.mark.gate
def test_the_reference_of_adapters_is_their_base(devices):
    objective, strategy, _, _ = step_of(DPO(), MODEL, MeshConfig(data=1), lora=2)
    state = strategy.init(jax.random.key(0))
    names = tree.named_leaves(state)
    assert not [n for n in names if n.startswith("model_state/frozen/reference")]
    first = jax.device_get(state.model_state)
    losses = []
    for step in range(3):
        state, metrics = strategy.step(state, batch_at(step))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5)  # the model is its reference
    assert losses[2] != losses[0]
    jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(state.model_state))
    # The same numbers as with a copy.
    params, base_state = strategy.eval_variables(state)
    merged, _ = objective.plain(params, base_state)
    reference = {"frozen/reference": {"params": base_state["frozen"], "model_state": {}}}
    want = DPO().build(MODEL).evaluate(merged, reference, batch_at(9))
    got = objective.evaluate(params, base_state, batch_at(9))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


LARGE = Transformer(vocab=1024, length=32, layers=2, embed=128, heads=8, mlp=512)
TEACHER = Transformer(vocab=1024, length=32, layers=4, embed=256, heads=8, mlp=512)


def num_params(model):
    """By the sizes of its matrices: what the norms add is below one per cent."""
    block = 4 * model.embed**2 + 3 * model.embed * model.mlp
    return 2 * model.vocab * model.embed + model.layers * block


MEMORY = {  # task, adapters' rank, float32 numbers of a state
    "preferences": (DPO(), 0, 4 * num_params(LARGE)),  # parameters, two moments, the reference
    # The base, once; parameters and two moments of rank-4 adapters: inputs and outputs of each matrix.
    "adapters": (DPO(), 4, num_params(LARGE) + 3 * 4 * 2 * (4 * 256 + 3 * 640)),
    "distillation": (
        Distillation(teacher=FrozenModel(model=TEACHER)), 0, 3 * num_params(LARGE) + num_params(TEACHER)
    ),
}  # fmt: skip
SHARDED = {
    "fsdp8": MeshConfig(data=1, fsdp=8),
    "fsdp2 tensor2": MeshConfig(data=1, fsdp=2, tensor=2),
}


CASES = [(kind, layout) for kind in MEMORY for layout in SHARDED]


@pytest.mark.parametrize("kind,layout", slow_but([], CASES, gate=[("distillation", "fsdp8")]))
def test_memory_is_that_of_the_closed_form(kind, layout, devices):
    """Reference and teacher are sharded, and have no optimizer state; with adapters there is one base."""
    task, lora, numbers = MEMORY[kind]
    config = SHARDED[layout]
    _, strategy, state, batch = step_of(task, LARGE, config, lora, rows=8, length=32)
    memory: Any = strategy.step.lower(state, batch).compile().memory_analysis()
    want = 4 * numbers / (config.fsdp * config.tensor)
    want += 4 * 8 * 32 * 4 / config.fsdp
    assert memory.argument_size_in_bytes == pytest.approx(want, rel=0.05)


def test_int8_is_within_half_a_scale():
    """Exactly: values are integers of 127 steps, each output has its scale, and zeros stay."""
    kernel = np.random.default_rng(0).normal(size=(3, 16, 2, 8)).astype(np.float32)
    kernel *= 10.0 ** np.arange(3).reshape(3, 1, 1, 1)
    kernel[0, :, 0, 0] = 0
    stored = quantized.quantize(jax.numpy.asarray(kernel), (1,))
    values, scale = np.asarray(stored["int8"]), np.asarray(stored["int8_scale"])
    assert values.dtype == np.int8 and scale.shape == (3, 1, 2, 8)
    found = np.asarray(quantized.dequantize(stored, np.float32))
    np.testing.assert_array_equal(found, values.astype(np.float32) * scale)
    largest = np.abs(kernel).max(1, keepdims=True)
    assert (np.abs(found - kernel) <= largest / 254 * (1 + 1e-5)).all()
    assert (np.abs(values).max(1) == 127).sum() == 3 * 2 * 8 - 1 and not found[0, :, 0, 0].any()
    assert quantized.shared_axes(values, scale) == (1,)


def test_int8_computes_with_the_matrices_that_it_stores(devices):
    """The state's memory by the closed form; the forward pass is that of the dequantised matrices."""
    config = MeshConfig(data=1, fsdp=8)
    options = {"rows": 8, "length": 32, "quantize": "int8"}
    objective, strategy, state, batch = step_of(LanguageModel(), LARGE, config, 4, **options)
    memory: Any = strategy.step.lower(state, batch).compile().memory_analysis()
    matrices = num_params(LARGE) - 2 * 1024 * 128
    scales = 4 * 2 * (4 * 128 + 2 * 512 + 128)
    tables, adapted = 4 * 2 * 1024 * 128, 3 * 4 * 4 * 2 * (4 * 256 + 3 * 640)
    want = (matrices + scales + tables + adapted + 4 * 8 * 32 * 4) / 8
    assert memory.argument_size_in_bytes == pytest.approx(want, rel=0.05)
    params, model_state = jax.jit(objective.init)(jax.random.key(0))
    plain, _ = LanguageModel().build(LARGE).init(jax.random.key(0))
    merged, _ = objective.plain(params, model_state)  # adapters add 0 at first
    for name, leaf in tree.named_leaves(merged).items():
        kernel = np.asarray(tree.named_leaves(plain)[name])
        if name.startswith("blocks/") and leaf.ndim > 2:
            assert 0 < np.abs(leaf - kernel).max() <= np.abs(kernel).max() / 254 * 1.001, name
        else:
            np.testing.assert_allclose(leaf, kernel, rtol=1e-5, atol=1e-7, err_msg=name)
    tokens = {"tokens": jax.numpy.arange(32, dtype="int32")[None]}
    got = objective.predict(params, model_state, tokens)
    np.testing.assert_array_equal(got, LanguageModel().build(LARGE).predict(merged, {}, tokens))
    exact = LanguageModel().build(LARGE).predict(plain, {}, tokens)
    assert 0 < np.abs(got - exact).max() < 0.05 * np.abs(exact).max()
