"""verify: sound runs are proven on every mesh, planted faults are caught and named."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import spmd
from spmd import fields, optim, scope, tasks
from spmd.strategies import allreduce, base
from tests.test_user_experiment import write

WORDS = ["--simulate", "8", "--model.hidden", "32", "32", "--model.dropout", "0.2"]
ADAMW = ["--optimizer", "adamw", "--optimizer.ema", "0.9", "--optimizer.clip-norm", "1.0"]


def verify(*words, steps=2, **how):
    report = spmd.load("digits", [*WORDS, *ADAMW, *words]).verify(steps, **how)
    print(report)
    return report


def fault_of(report):
    (result,) = report.results
    assert not report.proven and result.fault is not None
    assert result.fault.tensor in str(report)
    return result.fault


# ---- planted faults


def test_a_missing_psum(monkeypatch):
    """The gradients are not summed; jax itself would refuse, so its check is off."""
    right, unchecked = scope.batch_sum, jax.shard_map
    monkeypatch.setattr(scope, "batch_sum", lambda x: x if x.ndim else right(x))
    monkeypatch.setattr(jax, "shard_map", lambda f, **kw: unchecked(f, **kw | {"check_vma": False}))
    fault = fault_of(verify("--strategy", "allreduce"))
    assert (fault.step, fault.stage, fault.axes) == (1, "gradient", ["data"])
    assert fault.tensor in ("grads/head/bias", "grads/head/kernel")
    assert not fault.off[0].leaf.copies


def test_a_mean_of_means(monkeypatch):
    """Each device divides by its own weight: right while all hold equally many examples."""
    build, scale, local = tasks.Classification.build, tasks.Task.scale, []

    def own(self, model, param_dtype):
        task = build(self, model, param_dtype)

        def weigh(batch):
            local[:] = [task.weigh(batch)]
            return local[0]

        return task._replace(weigh=weigh)

    def by_own(self, weights):
        axes = scope.current().axes
        num = jax.lax.psum(1, axes) if axes else 1
        return scale(self, {term: w * num for term, w in local[0].items()})

    monkeypatch.setattr(tasks.Classification, "build", own)
    monkeypatch.setattr(tasks.Task, "scale", by_own)
    fault = fault_of(verify("--strategy", "allreduce", "--mesh.replica", "2", steps=3))
    assert (fault.step, fault.padded, fault.stage) == (2, True, "gradient")
    assert fault.tensor in ("grads/head/bias", "grads/head/kernel")
    assert fault.axes == ["replica", "data"]


def test_a_dropout_key_by_row(monkeypatch):
    rows = lambda key, ids: jax.vmap(lambda i: jax.random.fold_in(key, i))(
        jax.numpy.arange(len(ids))
    )
    monkeypatch.setattr(scope, "example_keys", rows)
    # On one device rows are not example ids either, but the same for both: only the cut differs.
    fault = fault_of(verify("--strategy", "allreduce"))
    assert (fault.step, fault.stage, fault.tensor) == (1, "forward", "activation dropout")
    assert fault.axes == ["data"]


def meshes_alone(monkeypatch):
    """True once a strategy is being built for more than one device."""
    several = []
    built = spmd.experiment.mesh.make

    def make(config, devices=None):
        cut = built(config, devices)
        several[:] = [cut.size > 1]
        return cut

    monkeypatch.setattr(spmd.experiment.mesh, "make", make)
    return lambda: several[-1]


def test_a_wrong_weight_decay_mask(monkeypatch):
    cut, right = meshes_alone(monkeypatch), optim.decay_mask

    def mask(params, dims):
        return jax.tree.map(lambda _: True, params) if cut() else right(params, dims)

    monkeypatch.setattr(optim, "decay_mask", mask)
    fault = fault_of(verify("--mesh.fsdp", "4", steps=4))
    assert fault.stage == "update" and fault.tensor.startswith("params/")
    assert fault.tensor.endswith("/bias")  # zero at first: it decays once it has moved
    assert {off.name.rsplit("/")[-1] for off in fault.off} == {"bias"}


def test_a_stale_average(monkeypatch):
    right = base.averaged

    def stale(parts, state, params):
        return right(parts, state, state.params if parts.mesh.size > 1 else params)

    monkeypatch.setattr(base, "averaged", stale)
    fault = fault_of(verify("--mesh.fsdp", "2"))
    assert (fault.step, fault.stage) == (1, "update") and fault.tensor.startswith("ema/")
    assert all(off.name.startswith("ema/") for off in fault.off)
    assert fault.axes == ["data", "fsdp"]
