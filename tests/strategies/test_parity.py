"""Every mesh and every strategy computes what one device computes.

A new mesh axis or strategy joins LAYOUTS of tests/cases.py; it does not get a copy of this test.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from spmd import optim
from spmd.core import tree
from spmd.models.layers import ConvConfig
from spmd.models.mlp import MLP
from spmd.parallel import mesh, scope
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import AllReduce, Auto, Local, base, update
from spmd.strategies.grads.direct import Trained
from spmd.strategies.privacy import Mechanism
from tests.cases import (
    BATCH,
    LAYOUTS,
    MODELS,
    PIPELINES,
    STEPS,
    assert_same_values,
    batch_at,
    data_of,
    parts_for,
)
from tests.marks import slow_but

RTOL = {"float32": 1e-5, "float64": 1e-10}

# One of each kind, and what differs in more than its size.
QUICK = ("tensor2", "psum2x4", "server2x4", "local4x2x2")

PLAIN = optim.SGD(learning_rate=0.1, momentum=0.0)

# The optimizers whose update looks at whole arrays or has factored, partitioned state, and the average.
OPTIMIZERS = {
    "lion": optim.Lion(learning_rate=1e-3, ema=0.9),
    "muon": optim.Muon(learning_rate=1e-2, clip_norm=1.0, ema=0.9),
    "adafactor": optim.Adafactor(min_dim_factored=32, momentum=0.9, ema=0.9),
    "lamb": optim.LAMB(learning_rate=1e-2),
    "lars": optim.LARS(learning_rate=30.0),
}


class Trajectory(NamedTuple):
    """A run. leaves: of the final state. grads: of the first step, in float64. last: of the last step (params
    and optimizer state before it, gradients, params after it), for OPTIMIZERS.
    """

    losses: np.ndarray
    leaves: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    last: Any = None

    @property
    def norms(self) -> dict[str, float]:
        return {name: float(np.linalg.norm(leaf)) for name, leaf in self.leaves.items()}

    def params(self) -> dict[str, np.ndarray]:
        """Parameters, and the tables with the state of their optimizer."""
        trained = ("params/", "tables/")
        return {name: x for name, x in self.leaves.items() if name.startswith(trained)}


def host(part):
    """{path name: float64 array} of a pytree."""
    return {name: np.asarray(x, np.float64) for name, x in tree.named_leaves(part).items()}


def trajectory(
    model,
    strategy,
    config,
    num_devices,
    *,
    accumulate=1,
    dtype="float32",
    steps=STEPS,
    optimizer=None,
    privacy=None,
):
    """Runs a layout; in float64 with the gradients among the metrics, as verify runs it."""
    cut = mesh.make(config, jax.devices()[:num_devices])
    how = {"accumulate": accumulate, "dtype": dtype, "optimizer": optimizer, "privacy": privacy}
    built = strategy.build(parts_for(model, cut, **how))
    state = built.init(jax.random.key(0))
    if isinstance(strategy, Local) or isinstance(model, ConvConfig):
        # Weights are drawn in float32, and their last bits depend on the program around them.
        one = Auto().build(parts_for(model, mesh.make(MeshConfig(), jax.devices()[:1]), **how))
        first = jax.tree.map(np.array, one.init(jax.random.key(0)).params)
        for drawn, like in zip(jax.tree.leaves(state.params), jax.tree.leaves(first), strict=True):
            np.testing.assert_allclose(drawn, like, atol=1e-6)
        state = built.with_params(state, first)
    losses, grads, last = [], {}, None
    for step in range(steps):
        batch = jax.device_put(data_of(model)(step), built.batch_shardings)
        if step == steps - 1 and optimizer in OPTIMIZERS.values():
            last = jax.tree.map(np.array, (state.params, state.opt_state))
        with scope.bind(watched=dtype == "float64"):
            state, metrics = built.step(state, batch)
        losses.append(metrics["loss"])
        if step == 0 or last:
            grads[step] = gradients(metrics)
        jax.block_until_ready(losses[-1])
    if last:
        last = (*last, grads[steps - 1], host(state.params))
    if isinstance(strategy, Local):  # one device has no replicas: of PLAIN they have the same state
        one = jax.tree.map(lambda x: x[0], state.opt_state)
        state = dataclasses.replace(state, strategy_state={}, opt_state=one)
    return Trajectory(np.array(losses), host(state), grads[0], last)


def gradients(metrics):
    """Gradients among the metrics of a watched step."""
    start = base.WATCHED_GRADIENTS
    return {n.removeprefix(start): x for n, x in host(metrics).items() if n.startswith(start)}


@functools.cache
def reference(name, accumulate, dtype, optimizer=None, steps=STEPS, privacy=None):
    return trajectory(
        MODELS[name],
        Auto(),
        MeshConfig(),
        1,
        accumulate=accumulate,
        dtype=dtype,
        optimizer=optimizer,
        steps=steps,
        privacy=privacy,
    )


def assert_same(got, want, rtol, of_leaves=0.0, params=True):
    """Losses by step, and leaf by leaf (to `of_leaves`, where given) the norms of the final state, but for
    what only the strategy has. In float64 by values too: the gradients of the first step, and `params`.
    """
    leaves = {n: norm for n, norm in got.norms.items() if not n.startswith("strategy_state/")}
    np.testing.assert_allclose(got.losses, want.losses, rtol=rtol)
    assert leaves.keys() == want.norms.keys()
    rtol = of_leaves or rtol
    for leaf, norm in want.norms.items():
        np.testing.assert_allclose(leaves[leaf], norm, rtol=rtol, atol=rtol * 1e-2, err_msg=leaf)
    if got.losses.dtype == np.float64:
        assert_same_values(got.grads, want.grads)
        if params:
            assert_same_values(got.params(), want.params())


def assert_same_update(run, optimizer, name):
    """The last step's parameters are those that one device makes of the same gradients and state."""
    params, opt_state, grads, after = run.last
    with jax.enable_x64(True):
        grads = tree.map_named(lambda leaf, _: jax.numpy.asarray(grads[leaf]), params)
        want, _ = update_of(optimizer, name)(grads, opt_state, params)
        assert_same_values(after, host(want))


@functools.cache
def update_of(optimizer, name):
    """The jitted update of one device."""
    one = mesh.make(MeshConfig(), jax.devices()[:1])
    tx = parts_for(MODELS[name], one, dtype="float64", optimizer=optimizer).tx
    key = lambda: jax.random.key(0)
    return jax.jit(lambda g, state, p: update.apply_gradients(tx, g, state, p, key))


def optimizer_of(strategy):
    """What a strategy's limit is claimed for; None: any."""
    return PLAIN if isinstance(strategy, Local) else None


# Of leaves in float32: two factorisations round more than a sum does, and relative steps make more of it
# where little is left (found: 2e-5, and 2e-3 of a bias's momentum; in float64 they keep to 1e-10).
ROUNDED = {"powersgd4": 1e-4, "server_powersgd2_fsdp2": 5e-3}

# (layout, model, microbatches, dtype). The gate takes one of each kind, and batch norm with accumulation on
# one mesh of the compiler's and one of ours.
CASES = [
    (layout, name, accumulate, dtype)
    for layout in LAYOUTS
    for name, accumulate in (("mlp", 1), ("cnn", 2))
    for dtype in ("float32", "float64")
]
QUICK = [(layout, "mlp", 1, "float32") for layout in QUICK]
IN_THE_GATE = [(layout, "mlp", 1, "float32") for layout in ("hsdp2x4", "zero1_2x4", "ring2x4")]
IN_THE_GATE += [(layout, "cnn", 2, "float64") for layout in ("hsdp2x4", "psum2x4")]


@pytest.mark.parametrize("layout,name,accumulate,dtype", slow_but(QUICK, CASES, gate=IN_THE_GATE))
def test_equals_one_device(layout, name, accumulate, dtype):
    strategy = LAYOUTS[layout][0]
    if isinstance(strategy, Local):
        name = "mlp"  # batch norm takes each replica's own statistics: see test_local.py
    how = {"optimizer": optimizer_of(strategy)}
    with jax.enable_x64(dtype == "float64"):
        want = reference(name, accumulate, dtype, **how)
        got = trajectory(MODELS[name], *LAYOUTS[layout], accumulate=accumulate, dtype=dtype, **how)
    assert_same(
        got, want, RTOL[dtype], of_leaves=ROUNDED.get(layout, 0.0) if dtype == "float32" else 0.0
    )


# Narrow parameters are rounded by the same bits. Where each example is computed by itself, alike, they end up
# as the same numbers, in bfloat16 too.
def differing_share(layout):
    """Share of parameters that may differ, where the model then computes in float32; 0: none, in bfloat16.

    A tensor axis rounds the parts of a matmul before their sum. The compiler, which shards within the
    replicas of an explicit strategy, keeps other intermediates in float32 (xla_allow_excess_precision).
    PowerSGD's factors round more. A rounding that falls the other way changes all gradients after it.
    """
    strategy, config, _ = LAYOUTS[layout]
    axes = ("tensor",) if isinstance(strategy, Auto) else ("fsdp", "context", "expert", "tensor")
    if "powersgd" in layout:
        return 5e-2
    return 1e-2 if any(getattr(config, axis) > 1 for axis in axes) else 0.0


NARROW = [
    (layout, "mlp", accumulate, differing_share(layout))
    for layout in LAYOUTS
    for accumulate in (1, 2)
]
NARROW += [(layout, "lm", 1, 1e-2) for layout in ("dp8", "zero1_2x4", "tensor2", "psum2x4")]
NARROW += [("stage2_fsdp2x2", "lm", 4, 1e-2), ("stage2_psum2", "lm", 4, 1e-2)]
NARROW = [case for case in NARROW if not isinstance((LAYOUTS | PIPELINES)[case[0]][0], Local)]
NARROW_QUICK = [("psum2x4", "mlp", 2, 0.0)]
NARROW_IN_THE_GATE = [("dp2", "mlp", 1, 0.0), ("dp8", "mlp", 2, 0.0)]
NARROW_IN_THE_GATE += [("zero1_2x4", "mlp", 1, 0.0), ("server2x4", "mlp", 1, 0.0)]


@functools.cache
def narrow_run(name, layout, accumulate, compute="", steps=8):
    """(losses, parameters) of bfloat16 parameters; layout: "" is one device. compute: type, "" as they."""
    one = (Auto(), MeshConfig(), 1)
    strategy, config, num = (LAYOUTS | PIPELINES)[layout] if layout else one
    model = dataclasses.replace(MODELS[name], dtype=compute)
    cut = mesh.make(config, jax.devices()[:num])
    parts = parts_for(model, cut, dtype="bfloat16", accumulate=accumulate)
    built = strategy.build(parts)
    state, losses = built.init(jax.random.key(0)), []
    for step in range(steps):
        batch = jax.device_put(data_of(model)(step), built.batch_shardings)
        state, metrics = built.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("bfloat16")}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert {x.dtype for x in moments} == {np.dtype("float32")}
    return losses, {
        k: np.asarray(v, np.float32) for k, v in tree.named_leaves(state.params).items()
    }


@pytest.mark.parametrize(
    "layout,name,accumulate,differing", slow_but(NARROW_QUICK, NARROW, gate=NARROW_IN_THE_GATE)
)
def test_narrow_parameters_are_rounded_alike(layout, name, accumulate, differing):
    compute = "float32" if differing else ""
    losses, params = narrow_run(name, layout, accumulate, compute)
    want_losses, want = narrow_run(name, "", accumulate, compute)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-4 if "powersgd" in layout else 1e-5)
    differ = np.concatenate([(params[k] != leaf).ravel() for k, leaf in want.items()])
    assert differ.mean() <= differing
    assert losses[-1] < losses[0]


@pytest.mark.gate
def test_clipped_gradients_of_narrow_parameters_keep_to_the_clip_norm():
    """Clipped, summed and given noise in float32; what is rounded is the update, after the noise."""
    private = Mechanism(10_000, 23, BATCH, clip_norm=1e-2, noise_multiplier=0.5, delta=1e-5)
    cut = mesh.make(MeshConfig(), jax.devices()[:1])
    parts = parts_for(MODELS["mlp"], cut, dtype="bfloat16", privacy=private)
    params, state = parts.task.init(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("bfloat16")}
    trained = Trained(params, {})
    (grads, _), sums, _ = base.grads_of(parts)(trained, state, batch_at(0), jax.random.key(1), {})
    assert {x.dtype for x in jax.tree.leaves(grads)} == {np.dtype("float32")}
    assert sums["clipped"][0] == sums["clipped"][1] == 23
    assert 0.1 * private.clip_norm < tree.global_norm(grads) <= private.clip_norm * (1 + 1e-6)


# What a language model has that the others have not: heads, a vocabulary and a sequence to cut.
LANGUAGE = ["fsdp8", "hsdp2x4", "zero1_2x4", "tensor2", "sequence2x2", "psum2x4", "server2x4"]
PRIVATE_LAYOUTS = [*LANGUAGE, "psum2_tensor2", "psum2x2_fsdp2"]
LANGUAGE += ["local8", "powersgd4", "local_powersgd4x2x2"]  # blocks stacked in three dims and more
LANGUAGE += [name for name in LAYOUTS if "context" in name or "2_tensor2" in name]
FULL = ("encoder", "pairs")
HEADS = ("masked", "tagged", "pooled")
HEADED = ("dp8", "fsdp8", "tensor2", "sequence2x2", "context2x2x2", "psum2_context2")
FAMILIES = ("sliding", "gemma", "olmo")
TUNED = ("preferring", "student")  # beside a frozen model
BESIDE = (
    "dp8",
    "fsdp8",
    "hsdp2x4",
    "zero1_2x4",
    "tensor2",
    "sequence2x2",
    "context2x2x2",
    "psum2x4",
)
BESIDE += ("server2x4", "psum2_tensor2", "local4x2x2")
DECODED = ("dp8", "fsdp8", "tensor2", "sequence2x2", "context2", "context2x2x2", "psum2_context2")
ENCODED = ("context2", "context4", "context2x2x2", "tensor2", "psum2_context2", "local2_context2")


@pytest.mark.parametrize(
    "layout,name,context,dtype",
    slow_but(
        [("context2x2x2", "lm", "ring", "float64")],
        [
            *((layout, "lm", "ring", "float64") for layout in LANGUAGE),
            ("context2", "lm", "ulysses", "float64"),
            ("context2x2", "lm", "ulysses", "float64"),
            *((f"context{n}", "lm", "ring", "float32") for n in (2, 4, 8)),
            *((layout, name, "ring", "float64") for layout in ENCODED for name in FULL),
            *((layout, "windowed", "ulysses", "float64") for layout in ("context2", "tensor2")),
            *((layout, "vit", "ring", "float64") for layout in (*ENCODED, "sequence2x2", "fsdp8")),
            *(
                (layout, "segmenter", "ring", "float64")
                for layout in (*ENCODED, "sequence2x2", "fsdp8")
            ),
            *((layout, "vit_mean", "ulysses", "float64") for layout in ("context2", "sequence2x2")),
            ("context2x2", "encoder", "ulysses", "float64"),
            *((layout, name, "ring", "float64") for layout in DECODED for name in FAMILIES),
            ("context2", "gemma", "ulysses", "float64"),
            *((layout, "texts", "ring", "float64") for layout in (*ENCODED, "fsdp8")),
            *((layout, name, "ring", "float64") for layout in HEADED for name in HEADS),
            *((layout, "t5", "ulysses", "float64") for layout in HEADED),
            *((layout, name, "ring", "float64") for layout in BESIDE for name in TUNED),
        ],
        gate=[
            ("sequence2x2", "lm", "ring", "float64"),
            ("context2x2x2", "vit", "ring", "float64"),
            ("context2x2x2", "masked", "ring", "float64"),
            ("tensor2", "preferring", "ring", "float64"),
        ],
    ),
)
def test_language_model_equals_one_device(layout, name, context, dtype):
    """Packed documents, uneven padding, dropout, z-loss, a loss in chunks."""
    with jax.enable_x64(dtype == "float64"):
        how = {"dtype": dtype, "steps": 8, "optimizer": optimizer_of(LAYOUTS[layout][0])}
        want = reference(name, 1, **how)
        model = dataclasses.replace(MODELS[name], context=context)
        got = trajectory(model, *LAYOUTS[layout], **how)
    assert_same(got, want, RTOL[dtype])
    assert want.losses[-1] < want.losses[0]


# Convolutions: channels over tensor, rows over context, batch norm over the global batch.
IMAGES = [
    (layout, name)
    for name in ("wide", "unet", "resnet", "bottlenecks")
    for layout in ("dp8", "fsdp4", "tensor2", "context2x2x2", "psum2x4", "psum2_tensor2")
]
IMAGES += [(layout, "unet") for layout in ("context4", "context2x2", "psum2_context2")]
IMAGES += [("context2x2", name) for name in ("cnn", "wide", "resnet")]


@pytest.mark.parametrize(
    "layout,name", slow_but([], IMAGES, gate=[("tensor2", "wide"), ("context2x2x2", "unet")])
)
def test_image_models_equal_one_device(layout, name):
    with jax.enable_x64(True):
        how = {"dtype": "float64", "steps": 3}
        want = reference(name, 1, **how)
        got = trajectory(MODELS[name], *LAYOUTS[layout], **how)
    assert_same(got, want, RTOL["float64"])


# Sparse tables take no compression and no replicas of their own; SASRec has none, and takes all.
TABLES = (
    "dp2",
    "hsdp2x4",
    "zero1_2x4",
    "tensor2",
    "psum2x4",
    "ring2x4",
    "server2x4",
    "server2_tensor2",
)
RECOMMENDERS = [
    (layout, name) for layout in TABLES for name in ("mf", "towers", "dlrm", "dlrm_bins")
]
RECOMMENDERS += [
    (layout, "sasrec")
    for layout in (*TABLES, "context2", "local4x2x2", "powersgd4", "stage2_fsdp2x2")
]


@pytest.mark.parametrize(
    "layout,name",
    slow_but(
        [],
        RECOMMENDERS,
        gate=[("psum2x4", "dlrm_bins"), ("server2_tensor2", "mf")],
    ),
)
def test_recommenders_equal_one_device(layout, name):
    """In-batch negatives, histories that begin late, rows in tables of every placement."""
    with jax.enable_x64(True):
        strategy = (LAYOUTS | PIPELINES)[layout]
        accumulate = 4 if layout in PIPELINES else 1
        how = {"dtype": "float64", "steps": 5, "accumulate": accumulate}
        how |= {"optimizer": optimizer_of(strategy[0])}
        want = reference(name, **how)
        got = trajectory(MODELS[name], *strategy, **how)
    assert_same(got, want, RTOL["float64"])
    assert name.startswith("dlrm") or want.losses[-1] < want.losses[0]


PIPELINED = [(layout, "lm", "ring", "float64") for layout in PIPELINES if "expert" not in layout]
PIPELINED += [
    (f"stage2_{rest}", "lm", "ulysses", "float64")
    for rest in ("context2", "context2x2", "context2_fsdp2")
]
PIPELINED += [(f"stage2{rest}", "pairs", "ring", "float64") for rest in ("_fsdp2x2", "_psum2")]
PIPELINED += [
    ("stage2", name, "ring", "float64") for name in ("pattern", "vit", "texts", *HEADS, *FAMILIES)
]
PIPELINED += [(f"stage2{rest}", "t5", "ulysses", "float64") for rest in ("_fsdp2x2", "_psum2")]
PIPELINED += [("stage2_context2", "vit", "ring", "float64")]
PIPELINED += [("stage2_context2", n, "ring", "float64") for n in ("pattern", "gemma")]
PIPELINED += [(f"stage2{rest}", "lm", "ring", "float32") for rest in ("", "_context2", "_psum2")]


@pytest.mark.parametrize(
    "layout,name,context,dtype",
    slow_but([], PIPELINED, gate=[("stage2_local4_context2", "lm", "ring", "float64")]),
)
def test_pipelines_equal_one_device(layout, name, context, dtype):
    with jax.enable_x64(dtype == "float64"):
        how = {"dtype": dtype, "steps": 4, "accumulate": 4}
        how |= {"optimizer": optimizer_of(PIPELINES[layout][0])}
        want = reference(name, **how)
        model = dataclasses.replace(MODELS[name], context=context)
        got = trajectory(model, *PIPELINES[layout], **how)
    assert_same(got, want, RTOL[dtype])


def mixture_for(strategy) -> tuple[str, dict[str, Any]]:
    """(model, options): those that a strategy's limit is claimed for."""
    local = isinstance(strategy, Local)
    return ("moe_local" if local else "moe"), {"optimizer": optimizer_of(strategy)}


EXPERTS = [name for name in LAYOUTS if "expert" in name]


@pytest.mark.parametrize(
    "layout,dtype",
    slow_but(
        [],
        [
            *((layout, "float64") for layout in [*EXPERTS, "fsdp4", "psum2", "context2x2"]),
            *((f"expert{n}", "float32") for n in (2, 4, 8)),
        ],
        gate=[("expert2", "float64")],
    ),
)
def test_experts_equal_one_device(layout, dtype):
    """Routing, both kinds of balance and their metrics, with the experts here or there."""
    with jax.enable_x64(dtype == "float64"):
        name, how = mixture_for(LAYOUTS[layout][0])
        how |= {"dtype": dtype, "steps": 3}
        want = reference(name, 1, **how)
        got = trajectory(MODELS[name], *LAYOUTS[layout], **how)
    assert_same(got, want, RTOL[dtype])
    assert name == "moe_local" or want.norms["model_state/blocks/mlp/offset"] > 0


UNLIKE = ("dp2", "expert2", "fsdp8", "tensor2", "expert2x2x2", "expert4_context2", "psum2_expert2")
UNLIKE_STAGED = ("stage2", "stage2_fsdp2x2", "stage2_expert2_tensor2", "stage2_psum2_expert2")


@pytest.mark.parametrize(
    "layout",
    slow_but([], [*UNLIKE, *UNLIKE_STAGED]),
)
def test_unlike_blocks_equal_one_device(layout):
    """Dense blocks and blocks with experts in turn, their offsets included."""
    with jax.enable_x64(True):
        strategy = (LAYOUTS | PIPELINES)[layout]
        accumulate = 4 if layout in PIPELINES else 1
        how = {"dtype": "float64", "steps": 3, "accumulate": accumulate}
        how |= {"optimizer": optimizer_of(strategy[0])}
        want = reference("unlike", **how)
        got = trajectory(MODELS["unlike"], *strategy, **how)
    assert_same(got, want, 1e-10)
    assert want.norms["model_state/blocks/1/mlp/offset"] > 0


@pytest.mark.parametrize(
    "layout",
    slow_but(
        [],
        ["stage2", "stage2_context2", *(name for name in PIPELINES if "expert" in name)],
        gate=["stage2_expert2"],
    ),
)
def test_experts_in_a_pipeline_equal_one_device(layout):
    """Their loss, their loads, and their offsets, which each microbatch moves."""
    with jax.enable_x64(True):
        name, how = mixture_for(PIPELINES[layout][0])
        how |= {"dtype": "float64", "steps": 3, "accumulate": 4}
        want = reference(name, **how)
        got = trajectory(MODELS[name], *PIPELINES[layout], **how)
    assert_same(got, want, 1e-10)
    assert name == "moe_local" or want.norms["model_state/blocks/mlp/offset"] > 0


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    slow_but(
        [("fsdp4", "muon")],
        [
            (layout, name)
            for layout in ("fsdp4", "tensor2", "zero1_2x4", "psum2x4", "ring2x4", "server2x4")
            for name in OPTIMIZERS
        ],
        gate=[*(("fsdp4", name) for name in OPTIMIZERS if name != "muon"), ("psum2x4", "muon")],
    ),
)
def test_optimizers_see_whole_arrays(layout, optimizer):
    """Muon's iterations and Adafactor's norms run on cut matrices, in the result they do not show it."""
    with jax.enable_x64(True):
        how = {"dtype": "float64", "optimizer": OPTIMIZERS[optimizer], "steps": 12}
        want = reference("mlp", 1, **how)
        got = trajectory(MODELS["mlp"], *LAYOUTS[layout], **how)
    # A relative step of what is zero but for rounding is none: their values from identical gradients.
    assert_same(got, want, 1e-10, params=False)
    assert_same_update(got, OPTIMIZERS[optimizer], "mlp")
    assert want.losses[-1] < want.losses[0]


PRIVATE = [(name, layout) for name in ("mlp", "lm") for layout in PRIVATE_LAYOUTS]


@pytest.mark.parametrize("name,layout", slow_but([], PRIVATE, gate=[("mlp", "psum2x4")]))
def test_private_steps_equal_one_device(name, layout):
    """Each example clipped by itself, the same noise, however batch and model are cut or accumulated."""
    private = Mechanism(10_000, 23, BATCH, clip_norm=1.0, noise_multiplier=0.5, delta=1e-5)
    with jax.enable_x64(True):
        how = {"dtype": "float64", "steps": 4, "privacy": private}
        want = reference(name, 1, **how)
        got = trajectory(MODELS[name], *LAYOUTS[layout], accumulate=2, **how)
        plain = reference("mlp", 1, "float64", steps=4)
    assert_same(got, want, 1e-10)
    assert abs(plain.losses[-1] - want.losses[-1]) > 1e-4


@pytest.mark.parametrize("strategy", [Auto(), Auto(zero=1), AllReduce()])
@pytest.mark.parametrize("dtype", slow_but(["float32"], ["float32", "bfloat16"], gate=["bfloat16"]))
def test_the_average_follows_its_recursion(strategy, dtype):
    config = optim.AdamW(learning_rate=0.1, ema=0.2)
    sizes = MeshConfig() if isinstance(strategy, AllReduce) else MeshConfig(data=1, fsdp=2)
    parts = parts_for(
        MODELS["mlp"], mesh.make(sizes, jax.devices()[:2]), dtype=dtype, optimizer=config
    )
    built = strategy.build(parts._replace(skip=True))  # a skipped step leaves the average too
    state = built.init(jax.random.key(0))
    host = lambda params: np.array(params["layers"][1]["kernel"], np.float32)
    average = host(state.params)
    # Within a step XLA may average the new parameters before it rounds them to bfloat16.
    rtol = 1e-5 if dtype == "float32" else 1e-2
    assert all(x.dtype == "float32" for x in jax.tree.leaves(state.ema))
    for step in range(4):
        bad = step == 2
        batch = batch_at(step) | ({"weight": np.full(BATCH, np.inf, np.float32)} if bad else {})
        state, _ = built.step(state, jax.device_put(batch, built.batch_shardings))
        if not bad:
            decay = min(0.2, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * host(state.params)
        np.testing.assert_allclose(host(state.ema), average, rtol=rtol, atol=rtol / 10)
    assert abs(host(state.params) - average).max() > 2 * rtol
    shown, _ = built.eval_variables(state)
    assert shown["head"]["bias"].dtype == dtype
    np.testing.assert_allclose(host(shown), average, rtol=rtol, atol=rtol / 10)
    # The average lies as the moments do: cut under ZeRO-1, where the parameters are not.
    spec = lambda part: part["layers"][1]["kernel"].sharding.spec
    moment = next(v for k, v in tree.named_leaves(state.opt_state).items() if "mu/layers/1/k" in k)
    assert spec(state.ema) == moment.sharding.spec
    other = jax.tree.map(lambda p: np.ones(p.shape, p.dtype), state.params)
    state = built.with_params(state, other)
    np.testing.assert_array_equal(host(state.ema), 1)
    state, _ = built.step(state, jax.device_put(batch_at(9), built.batch_shardings))  # donated


def test_the_reference_learns_and_its_parts_matter():
    """Parity of nothing with nothing would pass too: weights, dropout and accumulation show."""
    losses = reference("mlp", 1, "float32").losses
    assert losses[-5:].mean() < losses[:5].mean()
    no_dropout = trajectory(MLP(inputs=64, hidden=(64, 64)), Auto(), MeshConfig(), 1, steps=2)
    assert abs(no_dropout.losses[0] - losses[0]) > 1e-4


@pytest.mark.parametrize("strategy", slow_but([Auto()], [Auto(), AllReduce()], gate=[AllReduce()]))
def test_scanned_steps_equal_single_steps(strategy):
    cut = mesh.make(MeshConfig(), jax.devices()[:4])
    config = optim.AdamW(learning_rate=3e-3, clip_norm=1.0, ema=0.9)
    built = strategy.build(parts_for(MODELS["mlp"], cut, optimizer=config))
    single, metrics = built.init(jax.random.key(0)), dict[str, Any]()
    for step in range(4):
        single, metrics = built.step(single, jax.device_put(batch_at(step), built.batch_shardings))
    many = base.scanned(built)
    stacked = jax.tree.map(lambda *x: np.stack(x), *[batch_at(step) for step in range(4)])
    together, metrics_S = many.step(
        built.init(jax.random.key(0)), jax.device_put(stacked, many.batch_shardings)
    )
    assert metrics_S["loss"].shape == (4,)
    np.testing.assert_allclose(metrics_S["loss"][-1], metrics["loss"], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_nonfinite_step_changes_nothing_but_the_step():
    cut = mesh.make(MeshConfig(), jax.devices()[:2])
    built = Auto().build(parts_for(MODELS["cnn"], cut)._replace(skip=True))
    state = built.init(jax.random.key(0))
    before = jax.tree.map(np.array, state)
    bad = batch_at(0)
    bad["weight"] = np.full(BATCH, np.inf, np.float32)
    state, metrics = built.step(state, jax.device_put(bad, built.batch_shardings))
    assert metrics["finite"] == 0 and state.step == 1
    for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(
        jax.tree.leaves(before.model_state), jax.tree.leaves(state.model_state), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_allreduce_sums_gradients_by_an_explicit_psum():
    cut = mesh.make(MeshConfig(), jax.devices()[:4])
    built = AllReduce().build(parts_for(MODELS["mlp"], cut))
    state = jax.eval_shape(built.init, jax.random.key(0))
    text = built.step.lower(state, parts_for(MODELS["mlp"], cut).batch).as_text()
    assert "stablehlo.all_reduce" in text
    auto = Auto().build(parts_for(MODELS["mlp"], cut))
    assert (
        "stablehlo.all_reduce"
        not in auto.step.lower(state, parts_for(MODELS["mlp"], cut).batch).as_text()
    )
