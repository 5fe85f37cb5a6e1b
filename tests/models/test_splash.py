"""Splash attention, partitioned and compiled for TPUs that are not there.

libtpu (requirements/tpu.txt) reads its settings when it is loaded, so it has a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from spmd import mesh, optim, tasks
from spmd.models.transformer import Transformer
from spmd.strategies import Auto, base

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
model = Transformer(
    vocab=512, length=256, layers=2, embed=512, heads=4, kv_heads=2, mlp=512,
    dtype="bfloat16", attention="splash", remat="full",
)
task = tasks.LanguageModel().build(model)
params, _ = jax.eval_shape(task.init, jax.random.key(0))
tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)
batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), tokens)
batch["example_id"] = jax.ShapeDtypeStruct((4,), jnp.int32)
batch["weight"] = jax.ShapeDtypeStruct((4,), jnp.float32)
optimizer = optim.AdamW()
parts = base.Parts(
    task=task,
    tx=optimizer.build(10, optim.decay_mask(params, task.dims), task.dims),
    rate=optimizer.rate(10),
    mesh=mesh.make(mesh.MeshConfig(data=2, fsdp=2, tensor=2), devices),
    batch=batch,
)
strategy = Auto(sequence_parallel=True).build(parts)
state = jax.eval_shape(strategy.init, jax.random.key(0))
text = strategy.step.lower(state, batch).compile().as_text()
print(text.count('custom_call_target="tpu_custom_call"'), "reduce-scatter" in text)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_splash_compiles_for_a_cut_mesh():
    environ = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, env=environ, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    kernels, _scattered = result.stdout.split()
    assert int(kernels) >= 3  # forward and, in the backward pass, two more
