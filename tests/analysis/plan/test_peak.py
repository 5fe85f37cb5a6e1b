"""Peak memory by estimate against the TPU compiler's.

`python -m pytest -m slow tests/analysis/plan/test_peak.py`
"""

from __future__ import annotations

import importlib.util
import statistics

import pytest

import spmd
from spmd.analysis.plan import planner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu"),
]

SPLASH = "--model.attention splash"
GPT2 = f"--data.batch-size 64 {SPLASH}"
LLAMA = f"--data.batch-size 16 {SPLASH}"
STAGES = (
    f"{SPLASH} --data.batch-size 32 --mesh.data 1 --mesh.fsdp 4 --mesh.stage 2 --train.accumulate 4"
)
# (experiment, target, mesh and the rest)
TRIPLES = (
    ("gpt2_124m", "v5e:2x4", f"{GPT2}"),
    ("gpt2_124m", "v5e:2x4", f"{GPT2} --mesh.data 1 --mesh.fsdp 8"),
    ("gpt2_124m", "v5e:2x4", f"{GPT2} --mesh.data 2 --mesh.fsdp 4 --model.remat full"),
    ("gpt2_124m", "v6e:2x4", f"{GPT2} --mesh.data 2 --mesh.tensor 4"),
    ("gpt2_124m", "v5p:2x2x2", f"{GPT2} --mesh.data 8 --model.remat dots"),
    ("gpt2_124m", "v4:2x2x2", f"{GPT2} --mesh.data 1 --mesh.fsdp 8 --model.remat named"),
    ("llama3_8b", "v5p:2x2x2", f"{LLAMA} --mesh.data 1 --mesh.fsdp 8"),
    ("llama3_8b", "v5p:2x2x2", f"{LLAMA} --mesh.data 1 --mesh.fsdp 8 --model.remat dots"),
    ("llama3_8b", "v5p:2x2x2", f"{LLAMA} --mesh.data 1 --mesh.fsdp 4 --mesh.tensor 2"),
    ("llama3_8b", "v5p:2x2x4", f"{LLAMA} --mesh.data 1 --mesh.fsdp 4 --mesh.tensor 4"
     " --strategy.sequence-parallel"),
    ("llama3_8b", "v6e:4x4", f"{LLAMA} --mesh.data 1 --mesh.fsdp 16"),
    ("llama3_8b", "v5p:2x2x4", f"{LLAMA} --mesh.data 4 --mesh.fsdp 4 --model.remat named"),
    ("llama3_8b", "v5p:2x2x2", f"{LLAMA} --mesh.data 2 --mesh.stage 4 --train.accumulate 8"),
    ("llama3_8b", "v5p:2x2x2", f"{STAGES}"),
    ("llama3_8b", "v5p:2x2x2", f"{STAGES} --strategy.zero 1"),
    ("llama3_8b", "v5p:2x2x2", f"{STAGES} --train.pipeline interleaved"),
    ("llama3_8b", "v5p:2x2x2", f"{STAGES} --train.accumulate 8 --model.remat none"),
    ("llama3_8b", "v5p:2x2x2", f"{SPLASH} --data.batch-size 8 --mesh.data 1 --mesh.stage 2"
     " --mesh.tensor 4 --train.accumulate 4"),
    ("llama3_8b", "v5p:2x2x2", f"{SPLASH} --data.batch-size 4 --mesh.data 1 --mesh.fsdp 2"
     " --mesh.context 4 --model.context ulysses"),
    ("llama3_8b", "v5p:2x2x2", "--data.batch-size 8 --mesh.data 1 --mesh.fsdp 4 --mesh.context 2"),
    ("mixtral_8x7b", "v5p:2x2x2", f"{LLAMA} --model.layers 4 --mesh.data 1 --mesh.fsdp 8"),
    ("gpt2_124m", "v5e:2x4", f"{GPT2} --mesh.data 1 --mesh.replica 8 --strategy local"),
    ("gpt2_124m", "v5e:2x4", f"{GPT2} --strategy server"),
    ("gpt2_124m", "v5e:2x4", f"{GPT2} --mesh.data 2 --mesh.fsdp 4 --strategy allreduce"),
)  # fmt: skip


def test_estimated_peaks_are_those_of_the_compiler():
    off = []
    for name, target, words in TRIPLES:
        plan = planner.plan(spmd.load(name, words.split()).experiment, target)
        assert plan.compiled is not None, f"{name} {target} {words}: {plan.failed}"
        assert plan.compiled.how == "compiled"
        peak = plan.compiled.memory.peak
        off.append(plan.memory.peak / peak - 1)
        print(
            f"{name} {target} {plan.layout}: {peak / 1e9:.2f} GB compiled,"
            f" {plan.memory.peak / 1e9:.2f} estimated, {off[-1]:+.0%},"
            f" {plan.compiled.seconds:.0f} s"
        )
    sizes = [abs(x) for x in off]
    assert statistics.median(sizes) <= 0.10 and max(sizes) <= 0.20, off
