"""What each layout compiles to: nothing replicated by accident, memory within its bound."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd import optim, tasks
from spmd.core import tree
from spmd.models.transformer import Transformer
from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import Auto, base
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("uncached")  # they read what the compiler prints and takes

# The embedding, the head and the feed-forward layers are above 1 MiB.
MODEL = Transformer(
    vocab=2048, length=32, layers=2, embed=256, heads=8, kv_heads=4, mlp=1024, dtype="bfloat16"
)
LAYOUTS = {
    "fsdp8": (Auto(), MeshConfig(data=1, fsdp=8)),
    "zero1_2x4": (Auto(zero=1), MeshConfig(data=2, fsdp=4)),
    "hsdp_tensor": (Auto(), MeshConfig(replica=2, data=1, fsdp=2, tensor=2)),
    "tensor4": (Auto(), MeshConfig(data=2, tensor=4)),
    "sequence2": (Auto(sequence_parallel=True), MeshConfig(data=2, fsdp=2, tensor=2)),
}
WARNING = "Involuntary full rematerialization"


def built(model, strategy, sizes, task=None, rows=8):
    """(strategy, abstract state, abstract batch) on eight devices."""
    built_task = (task or tasks.LanguageModel()).build(model)
    params, _ = jax.eval_shape(built_task.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((rows, model.length), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), tokens)
    batch |= {
        "example_id": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "weight": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }
    optimizer = optim.AdamW(learning_rate=1e-3, clip_norm=1.0)
    parts = base.Parts(
        task=built_task,
        tx=optimizer.transformation(10, optim.decay_mask(params, built_task.dims), built_task.dims),
        rate=optimizer.rate(10),
        mesh=mesh.make(sizes, jax.devices()[:8]),
        batch=batch,
    )
    made = strategy.build(parts)
    return made, jax.eval_shape(made.init, jax.random.key(0)), batch


def left_whole(state, shardings, ways):
    """Leaves over 1 MiB that a rule could have cut: some dim divides by the devices of a model axis."""
    placed = tree.named_leaves(shardings)
    return [
        name
        for name, x in tree.named_leaves(state).items()
        if x.size * x.dtype.itemsize > 2**20
        and placed[name].is_fully_replicated
        and any(size % ways == 0 for size in x.shape)
    ]


def test_the_compiler_says_when_it_replicates(capfd):
    """The warning that the next test looks for, provoked: it is written, and caught here."""
    cut = mesh.make(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    at = lambda *spec: NamedSharding(cut, P(*spec))

    def relabel(x):
        x = jax.lax.with_sharding_constraint(x * 2, at(("data", "fsdp", "tensor"), None))
        return jax.lax.with_sharding_constraint(jnp.sin(x), at(None, ("tensor", "data")))

    jax.jit(relabel).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
    assert WARNING in capfd.readouterr().err


@pytest.mark.parametrize("layout", slow_but(("fsdp8",), LAYOUTS, gate=("zero1_2x4", "sequence2")))
def test_nothing_is_replicated_by_accident(layout, capfd):
    strategy, sizes = LAYOUTS[layout]
    made, state, batch = built(MODEL, strategy, sizes)
    compiled = made.step.lower(state, batch).compile()
    assert WARNING not in capfd.readouterr().err
    placed, _ = compiled.output_shardings
    if getattr(strategy, "zero", 3) == 1:  # keeps whole parameters, by its definition
        state, placed = (dataclasses.replace(x, params={}) for x in (state, placed))
    assert left_whole(state, placed, ways=2) == []
    assert left_whole(state, jax.tree.map(lambda s: NamedSharding(s.mesh, P()), placed), ways=2)


@pytest.mark.parametrize(
    "change,sizes,message",
    [
        ({"heads": 6, "embed": 24, "kv_heads": 6}, {"tensor": 4}, "'kv_heads' of size 6"),
        ({"vocab": 61}, {"tensor": 2}, "'vocab' of size 61 does not divide by mesh.tensor=2"),
        ({"kv_heads": 1}, {"tensor": 2}, "'kv_heads' of size 1 does not divide"),
        ({"mlp": 1022}, {"tensor": 4}, "'mlp' of size 1022"),
    ],
)
def test_a_dim_that_the_mesh_does_not_divide(change, sizes, message):
    model = dataclasses.replace(MODEL, **change)
    with pytest.raises(ValueError, match=message):
        built(model, Auto(), MeshConfig(data=-1, **sizes))


def test_a_sequence_that_the_mesh_does_not_divide():
    model = dataclasses.replace(MODEL, length=30)
    made, state, batch = built(model, Auto(sequence_parallel=True), MeshConfig(data=2, tensor=4))
    with pytest.raises(ValueError, match=r"'residual_time' of size 30 .* mesh.tensor=4"):
        made.step.lower(state, batch)


@pytest.mark.slow
def test_scanned_layers_compile_in_constant_time():
    """Trace and compile, 48 layers against 12; alternating, since machines drift."""

    def seconds(layers):
        jax.clear_caches()
        start = time.perf_counter()
        made, state, batch = built(
            dataclasses.replace(MODEL, layers=layers), Auto(), MeshConfig(data=1, fsdp=8)
        )
        made.step.lower(state, batch).compile()
        return time.perf_counter() - start

    seconds(2)
    pairs = [(seconds(48), seconds(12)) for _ in range(3)]
    assert min(deep / flat for deep, flat in pairs) <= 1.3


@pytest.mark.gate
def test_memory_of_fsdp():
    """At most 1.15 x (a device's share of state and gradients, two gathered layers, saved activations).

    Beyond them is a layer's gradient before it is cut: 16 layers, so that it is small. (The CPU sums it whole
    and then cuts; a reduce-scatter would hold one copy less.)
    """
    layers, rows = 16, 8
    model = Transformer(
        vocab=256, length=64, layers=layers, embed=512, heads=8, mlp=2048, remat="full"
    )
    made, state, batch = built(model, Auto(), MeshConfig(data=1, fsdp=8), rows=rows)
    memory = made.step.lower(state, batch).compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    layer = tree.num_bytes(state.params["blocks"]) / layers
    saved = layers * (rows // 8) * model.length * model.embed * 4  # what enters each block
    share = (tree.num_bytes(state) + tree.num_bytes(state.params)) / 8
    assert held <= 1.15 * (share + 2 * layer + saved)
