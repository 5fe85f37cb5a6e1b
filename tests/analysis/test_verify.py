"""verify: sound runs are verified on every mesh, planted faults are caught and named."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import spmd
from spmd import optim, tasks
from spmd.analysis import verify as verify_module
from spmd.analysis.verify import compare
from spmd.api import Handle
from spmd.models.cnn import CNN
from spmd.parallel import scope
from spmd.parallel.mesh import AXES
from spmd.strategies import AllReduce, Auto, update
from tests.rings import write

pytestmark = pytest.mark.usefixtures("devices")  # all eight, before --simulate 4
WORDS = ["--simulate", "4", "--model.hidden", "32", "--model.dropout", "0.2"]
ADAMW = ["--optimizer", "adamw", "--optimizer.ema", "0.9", "--optimizer.clip-norm", "1.0"]


def verify(*words, steps=2, **how):
    report = spmd.load("digits", [*WORDS, *ADAMW, *words]).verify(steps, **how)
    print(report)
    return report


def fault_of(report):
    (result,) = report.results
    assert not report.verified and result.fault is not None
    assert result.fault.tensor in str(report)
    return result.fault


# ---- planted faults


def test_a_missing_psum(monkeypatch):
    """The gradients are not summed; jax itself would refuse, so its check is difference."""
    right, unchecked = scope.batch_sum, jax.shard_map
    monkeypatch.setattr(scope, "batch_sum", lambda x: x if x.ndim else right(x))
    monkeypatch.setattr(jax, "shard_map", lambda f, **kw: unchecked(f, **kw | {"check_vma": False}))
    fault = fault_of(verify("--strategy", "allreduce"))
    assert (fault.step, fault.stage, fault.axes) == (1, "gradient", ["data"])
    assert fault.tensor in ("grads/head/bias", "grads/head/kernel")
    assert not fault.differences[0].leaf.copies


@pytest.mark.gate
def test_a_mean_of_means(monkeypatch):
    """Each device divides by its own weight: right while all hold equally many examples."""
    build, scale, local = tasks.Classification.build, tasks.Objective.scale, []

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
    monkeypatch.setattr(tasks.Objective, "scale", by_own)
    fault = fault_of(verify("--strategy", "allreduce", "--mesh.replica", "2", steps=3))
    assert (fault.step, fault.padded, fault.stage) == (2, True, "gradient")
    assert fault.tensor in ("grads/head/bias", "grads/head/kernel")
    assert fault.axes == ["replica", "data"]


@pytest.mark.gate
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
    built = spmd.experiment.base.mesh.make

    def make(config, devices=None):
        cut = built(config, devices)
        several[:] = [cut.size > 1]
        return cut

    monkeypatch.setattr(spmd.experiment.base.mesh, "make", make)
    return lambda: several[-1]


@pytest.mark.gate
def test_a_wrong_weight_decay_mask(monkeypatch):
    cut, right = meshes_alone(monkeypatch), optim.decay_mask

    def mask(params, dims):
        return jax.tree.map(lambda _: True, params) if cut() else right(params, dims)

    monkeypatch.setattr(optim, "decay_mask", mask)
    fault = fault_of(verify("--mesh.fsdp", "4", "--mesh.data", "1", steps=4))
    assert fault.stage == "update" and fault.tensor.startswith("params/")
    assert fault.tensor.endswith("/bias")  # zero at first: it decays once it has moved
    assert {difference.name.rsplit("/")[-1] for difference in fault.differences} == {"bias"}


@pytest.mark.gate
def test_a_stale_average(monkeypatch):
    right = update.update_average

    def stale(parts, state, params):
        return right(parts, state, state.params if parts.mesh.size > 1 else params)

    monkeypatch.setattr(update, "update_average", stale)
    fault = fault_of(verify("--mesh.fsdp", "4", "--mesh.data", "1"))
    assert (fault.step, fault.stage) == (1, "update") and fault.tensor.startswith("ema/")
    assert all(difference.name.startswith("ema/") for difference in fault.differences)
    assert fault.axes == ["fsdp"]


# ---- inside a scan, and in a plain NNX model


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x, index):
        x = nnx.relu(self.dense(x)) + x
        if scope.current().axes:  # the fault: on several devices layer 1 adds something
            x += jax.numpy.where(index == 1, 1e-3, 0.0).astype(x.dtype)
        return x


class Stack(nnx.Module):
    """Three blocks with stacked parameters, scanned and rematerialised."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 16, rngs=rngs)
        self.blocks = nnx.vmap(Block)(rngs.split(3))
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        graph, weights = nnx.split(self.blocks)

        @jax.checkpoint
        def body(x, layer):
            index, weights = layer
            return nnx.merge(graph, weights)(x, index), None

        layers = (jax.numpy.arange(3), nnx.as_pure(weights))
        x, _ = jax.lax.scan(body, self.first(x.reshape(len(x), -1)), layers)
        return self.head(x)


@pytest.mark.gate
def test_a_fault_in_one_layer_of_a_scan():
    exp = spmd.load("digits", ["--simulate", "4", "--train.accumulate", "2"]).experiment
    exp = dataclasses.replace(exp, model=Stack, strategy=AllReduce())
    fault = fault_of(Handle(exp).verify(1))
    names = [difference.name for difference in fault.differences if difference.stage == "forward"]
    # [microbatch, layer]: what follows it departs, what comes before does not
    assert names[:4] == [
        "activation blocks[0,1]",
        "activation blocks/dense[0,2]",
        "activation blocks[0,2]",
        "activation head[0]",
    ]
    assert "activation first[0]" not in names and "activation blocks[0,0]" not in names
    assert "activation blocks[1,1]" in names
    assert not hasattr(Block.__call__, "__wrapped__")  # the class is as it was


# ---- sound runs


def verified(report, *meshes):
    print(report)
    assert report.verified
    assert {result.mesh for result in report.results if result.verdict == "verified"} == {*meshes}
    for result in report.results:
        if result.sound:
            assert all(
                result.worst("float64", group) < 1e-10 for group in ("loss", "grads", "params")
            )
            assert result.worst(report.precision, "loss") < report.loss_tolerance
    return report


@pytest.mark.slow
def test_batch_norm_accumulation_clipping_and_bfloat16():
    words = ["--simulate", "4", *ADAMW, "--train.accumulate", "2", "--strategy.zero", "1"]
    exp = spmd.load(
        "digits", [*words, "--mesh.fsdp", "2", "--data.transforms", "mixup:0.3"]
    ).experiment
    exp = dataclasses.replace(exp, model=CNN(features=(8,), dropout=0.3, dtype="bfloat16"))
    report = verified(Handle(exp).verify(3), "data=2 fsdp=2")
    assert report.precision == "bfloat16" and report.results[0].worst("bfloat16", "grads") > 1e-4
    compared = report.results[0].leaves["float64"]
    for name in (
        "grads/convs/0/kernel",
        "model_state/norms/0/mean",
        "ema/head/bias",
        "metrics/accuracy",
    ):
        assert name in compared
    assert any(
        name.startswith("opt_state/") and name.endswith("mu/head/kernel") for name in compared
    )


@pytest.mark.gate
def test_every_mesh_from_the_command_line(run_main, tmp_path):
    words = ["verify", "--experiment", "digits", "--model.hidden", "32", "--simulate", "2"]
    done = run_main(*words, "--steps", "2", "--all-meshes", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    assert "float64  fsdp=2: step 1 of 2 agrees" in done.stderr
    assert done.stdout.count(" verified\n") == 4
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["verified"] and {m["mesh"] for m in found["meshes"]} == {
        f"{axis}=2" for axis in ("replica", "data", "fsdp", "tensor")
    }
    assert found["meshes"][0]["leaves"]["float64"]["grads/head/bias"]["error"] < 1e-10


@pytest.mark.gate
@pytest.mark.parametrize(
    "words",
    [
        ["--strategy", "local", "--strategy.replicas", "4"],
        pytest.param(
            ["--strategy", "federated", "--strategy.fraction", "0.04"], marks=pytest.mark.slow
        ),
    ],
)
def test_local_steps_in_their_synchronous_limit(words):
    plain = ["--simulate", "4", "--model.hidden", "16", "--optimizer.momentum", "0"]
    plain += ["--optimizer.ema", "0.9", "--strategy.period", "1", "--strategy.outer", "average"]
    mesh = ["--mesh.replica", "2", "--mesh.data", "1", "--mesh.fsdp", "2"]
    report = spmd.load("digits", [*words, *plain, *mesh]).verify(2)
    verified(report, "replica=2 fsdp=2")
    compared = report.results[0].leaves["float64"]
    assert {"grads/head/kernel", "params/head/kernel", "ema/head/kernel"} <= compared.keys()


@pytest.mark.slow
def test_meshes_that_a_strategy_refuses_are_skipped():
    words = ["--simulate", "2", "--model.hidden", "32", "--strategy", "local"]
    words += ["--strategy.replicas", "1", "--strategy.period", "1", "--strategy.outer", "average"]
    words += ["--optimizer.momentum", "0"]
    report = spmd.load("digits", words).verify(2, all_meshes=True)
    verified(report, "data=2", "fsdp=2", "tensor=2")
    skipped = {result.mesh: result.skipped for result in report.results if result.skipped}
    assert skipped.keys() == {"replica=2"}
    refused = "1 replicas of the strategy do not divide over mesh.replica=2"
    assert refused in skipped["replica=2"] and skipped["replica=2"] in str(report)


MOE = ["--model.embed", "32", "--model.mlp", "32", "--data.sequence-length", "32"]
MOE += ["--model.experts.bias-rate", "0.01", "--train.accumulate", "2", "--simulate", "8"]


@pytest.mark.gate
def test_the_axes_of_a_mixture_are_all_walked():
    program = spmd.load("moe_tiny", MOE).experiment.build(jax.devices()[:1])
    assert verify_module.model_axes(program) == list(AXES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy,axes",
    [
        ("auto", ("stage", "context", "expert")),
        ("allreduce", ("data", "stage", "expert")),
        ("local", ("replica", "stage", "context")),
    ],
)
def test_stages_contexts_and_experts_beside_each_other(strategy, axes):
    mesh = ["--mesh.data", "1", *(w for a in axes for w in (f"--mesh.{a}", "2"))]
    words = [*MOE, *mesh, "--strategy", strategy]
    if strategy == "local":  # where replicas of unlike weight and loads make one step
        words += [
            "--strategy.replicas",
            "4",
            "--strategy.period",
            "1",
            "--strategy.outer",
            "average",
        ]
        words += ["--optimizer", "sgd", "--optimizer.momentum", "0"]
        words += ["--model.experts.bias-rate", "0", "--model.experts.balance", "0"]
    report = spmd.load("moe_tiny", words).verify(2)
    verified(report, " ".join(f"{axis}=2" for axis in axes))


@pytest.mark.gate
def test_a_users_own_experiment(run_cli, tmp_path):
    write(tmp_path)
    done = run_cli("verify", "--experiment", "rings.py", "--steps", "2", "--mesh.fsdp", "4")
    assert done.returncode == 0, done.stderr
    assert "one device only: simulating 8" in done.stderr
    assert "data=2 fsdp=4" in done.stdout and "verified: 1 of 1 meshes" in done.stdout
    text = (tmp_path / "rings.py").read_text().replace("return self.head(x)", WRONG)
    (tmp_path / "rings.py").write_text(text.replace("import nnx", "import nnx\nimport jax", 1))
    words = ["--experiment", "rings.py", "--simulate", "2", "--strategy", "allreduce"]
    done = run_cli("verify", *words, "--steps", "1")
    assert done.returncode == 1, done.stderr
    assert "in the forward: activation head," in done.stdout and "axis data" in done.stdout


WRONG = "return self.head(x - x.mean(axis=0, keepdims=True))"  # a mean over what a device sees


@pytest.mark.gate
def test_a_strategy_with_a_state_of_its_own(monkeypatch):
    """It keeps what one device has not: here a count, which weighs nothing."""
    build = Auto.build

    def counting(self, parts):
        plain = build(self, parts)
        if parts.mesh.size == 1:
            return plain
        whole = plain.state_shardings.step
        own = lambda state, count: dataclasses.replace(state, strategy_state={"count": count})

        def step(state, batch):
            new, metrics = plain.step(dataclasses.replace(state, strategy_state={}), batch)
            count = state.strategy_state["count"] + 1
            return own(new, count), metrics | {"count": count}

        return plain._replace(
            init=lambda key: own(plain.init(key), jax.numpy.zeros((), "int32")),
            step=step,
            state_shardings=own(plain.state_shardings, whole),
        )

    seen = []
    leaves = compare.leaves
    monkeypatch.setattr(Auto, "build", counting)
    monkeypatch.setattr(
        compare,
        "leaves",
        lambda want, got: seen.append(int(got["metrics/count"])) or leaves(want, got),
    )
    verified(verify("--mesh.fsdp", "4", "--mesh.data", "1", steps=3), "fsdp=4")
    assert seen == [1, 2, 3] * 2


# ---- what it says


def test_mistakes_are_one_message(run_main, tmp_path):
    done = run_main("verify", "--experiment", "digits", "--json", "nowhere/out.json")
    assert done.returncode == 2 and "there is no directory nowhere" in done.stderr
    with pytest.raises(ValueError, match="there is one device"):
        spmd.load("digits", ["--simulate", "1"]).verify()
    with pytest.raises(ValueError, match="does not divide"):
        spmd.load("digits", ["--simulate", "8", "--data.batch-size", "12"]).verify()
    with pytest.raises(ValueError, match="no mesh of 8 devices fits"):
        spmd.load(
            "digits", ["--simulate", "8", "--data.batch-size", "3", "--model.hidden", "3"]
        ).verify(all_meshes=True)
    with pytest.raises(ValueError, match=r"steps=0"):
        spmd.load("digits", ["--simulate", "8"]).verify(0)


def test_every_factorisation():
    found = [verify_module.describe(s) for s in verify_module.factorisations(4, ["data", "fsdp"])]
    assert sorted(found) == ["data=2 fsdp=2", "data=4", "fsdp=4"]
    assert found[-1] == "data=2 fsdp=2"  # few axes first


def test_the_last_copy_counts(devices):
    """Devices that should hold the same values do not: seen wherever it is."""
    whole = NamedSharding(jax.make_mesh((4,), ("data",), devices=devices[:4]), P())
    parts = [np.ones(3), np.ones(3), np.ones(3), np.array([1.0, 1.0, 2.0])]
    parts = [jax.device_put(x.astype("float32"), d) for x, d in zip(parts, devices, strict=False)]
    got = jax.make_array_from_single_device_arrays((3,), whole, parts)
    leaf = compare.leaves({"params/w": np.ones(3, "float32")}, {"params/w": got})["params/w"]
    assert not leaf.copies and leaf.error == pytest.approx(3**-0.5)


def test_a_swap_leaves_the_norm_and_is_seen():
    want, got = np.array([1.0, 2.0], "float32"), jax.numpy.array([2.0, 1.0])
    leaf = compare.leaves({"params/w": want}, {"params/w": got})["params/w"]
    assert leaf.norm == leaf.mesh_norm and leaf.error > 0.5
    nothing = compare.leaves({"params/w": want}, {"params/w": got * np.float32("nan")})["params/w"]
    assert nothing.error == np.inf
