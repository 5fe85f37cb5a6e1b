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

import spmd
from spmd.analysis.plan import isolated
from tests.marks import slow_but

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from spmd.parallel import mesh; from spmd import optim, tasks
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
    tx=optimizer.transformation(10, optim.decay_mask(params, task.dims), task.dims),
    rate=optimizer.rate(10),
    mesh=mesh.make(mesh.MeshConfig(data=2, fsdp=2, tensor=2), devices),
    batch=batch,
)
strategy = Auto(sequence_parallel=True).build(parts)
state = jax.eval_shape(strategy.init, jax.random.key(0))
text = strategy.step.lower(state, batch).compile().as_text()
print(text.count('custom_call_target="tpu_custom_call"'), "reduce-scatter" in text)
"""


@pytest.mark.gate
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
    kernels, scattered = result.stdout.split()
    assert int(kernels) == 4  # forward, and again under remat; dq; dk and dv
    assert scattered == "True"  # what sequence parallelism is for, and no CPU shows


TINY = ("--model.vocab 512 --model.layers 2 --model.embed 512 --model.mlp 512 --model.heads 4 --model.scan"
        " --model.length 256 --data.sequence-length 256 --data.batch-size 32 --model.dtype bfloat16"
        " --train.accumulate 4 --mesh.data 1")  # fmt: skip
ULYSSES = "--mesh.context 2 --model.context ulysses"
BESIDE = {
    "allreduce": "--mesh.data 8 --strategy allreduce",
    "server": "--mesh.data 4 --mesh.tensor 2 --strategy server",
    "local": "--mesh.replica 4 --mesh.fsdp 2 --strategy local --strategy.replicas 4",
    "ulysses": f"--mesh.fsdp 2 --mesh.tensor 2 {ULYSSES}",
    "stage": "--mesh.fsdp 2 --mesh.tensor 2 --mesh.stage 2",
    "stage_ulysses": f"--mesh.fsdp 2 --mesh.stage 2 {ULYSSES}",
    "stage_experts": "--mesh.fsdp 2 --mesh.stage 2 --mesh.expert 2 --model.experts.num 4",
    "allreduce_stage": f"--mesh.data 2 --mesh.stage 2 {ULYSSES} --strategy allreduce",
    "local_stage": f"--mesh.replica 2 --mesh.stage 2 {ULYSSES} --strategy local --strategy.replicas 4",
}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("case", slow_but((), BESIDE, gate=("allreduce",)))
def test_splash_compiles_beside_other_axes_and_strategies(case):
    words = [*TINY.split(), "--model.attention", "splash", *BESIDE[case].split()]
    made = isolated.compile_step(spmd.load("lm_stdlib", words).experiment, "v5e:2x4")
    assert made.how == "compiled" and made.memory.peak >= made.memory.arguments
