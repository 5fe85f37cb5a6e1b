"""Kernels of a TPU program: cycles, FLOPs and bytes by hand, loops expanded; a plan that counts with them."""

from __future__ import annotations

import pytest

import spmd
from spmd.analysis.plan import html, kernels, planner
from spmd.analysis.plan.compile import Compiled, CompiledMemory
from spmd.hardware import chips, hlo, targets

# Three layers of a scan: a matmul with the weights of its layer, whose result is kept for the backward pass;
# a gather, a Pallas kernel and a reserved buffer, which have no cycles.
TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[3,64,64]{2,1,0})->f32[]}

%layer (w: bf16[3,64,64], i: s32[], x: bf16[8,64], kept: bf16[3,8,64]) -> (bf16[8,64], bf16[3,8,64]) {
  %w = bf16[3,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[8,64]{1,0} parameter(2)
  %kept = bf16[3,8,64]{2,1,0} parameter(3)
  %slice = bf16[1,64,64]{2,1,0} dynamic-slice(%w, %i, %i, %i), dynamic_slice_sizes={1,64,64}
  %flat = bf16[64,64]{1,0} bitcast(%slice)
  %y = bf16[8,64]{1,0} convolution(%x, %flat), dim_labels=bf_io->bf
  %one = bf16[1,8,64]{2,1,0} bitcast(%y)
  %all = bf16[3,8,64]{2,1,0} dynamic-update-slice(%kept, %one, %i, %i, %i)
  ROOT %both = (bf16[8,64]{1,0}, bf16[3,8,64]{2,1,0}) tuple(%y, %all)
}

%rows (table: bf16[100,64], ids: s32[8]) -> bf16[8,64] {
  %table = bf16[100,64]{1,0} parameter(0)
  %ids = s32[8]{0} parameter(1)
  ROOT %g = bf16[8,64]{1,0} gather(%table, %ids), offset_dims={1}
}

%body (s: (s32[], bf16[3,64,64], bf16[8,64], bf16[3,8,64])) -> (s32[], bf16[3,64,64], bf16[8,64], bf16[3,8,64]) {
  %s = (s32[], bf16[3,64,64]{2,1,0}, bf16[8,64]{1,0:S(1)}, bf16[3,8,64]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %weights = bf16[3,64,64]{2,1,0} get-tuple-element(%s), index=1
  %h = bf16[8,64]{1,0:S(1)} get-tuple-element(%s), index=2
  %saved = bf16[3,8,64]{2,1,0} get-tuple-element(%s), index=3
  %f = (bf16[8,64]{1,0:S(1)}, bf16[3,8,64]{2,1,0}) fusion(%weights, %n, %h, %saved), kind=kOutput, calls=%layer, metadata={op_name="layer"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %h2 = bf16[8,64]{1,0:S(1)} get-tuple-element(%f), index=0
  %saved2 = bf16[3,8,64]{2,1,0} get-tuple-element(%f), index=1
  %a = bf16[8,64]{1,0} custom-call(%h2), custom_call_target="tpu_custom_call", metadata={op_name="attention"}
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  ROOT %t = (s32[], bf16[3,64,64]{2,1,0}, bf16[8,64]{1,0:S(1)}, bf16[3,8,64]{2,1,0}) tuple(%next, %weights, %h2, %saved2)
}

%condition (c: (s32[], bf16[3,64,64], bf16[8,64], bf16[3,8,64])) -> pred[] {
  %c = (s32[], bf16[3,64,64]{2,1,0}, bf16[8,64]{1,0:S(1)}, bf16[3,8,64]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %bound = s32[] constant(3)
  ROOT %lt = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (p: bf16[3,64,64], table: bf16[100,64], ids: s32[8]) -> bf16[3,8,64] {
  %p = bf16[3,64,64]{2,1,0} parameter(0)
  %table = bf16[100,64]{1,0} parameter(1)
  %ids = s32[8]{0} parameter(2)
  %zero = s32[] constant(0)
  %buffer = bf16[3,8,64]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %x = bf16[8,64]{1,0:S(1)} fusion(%table, %ids), kind=kCustom, calls=%rows, metadata={op_name="embed"}
  %first = (s32[], bf16[3,64,64]{2,1,0}, bf16[8,64]{1,0:S(1)}, bf16[3,8,64]{2,1,0}) tuple(%zero, %p, %x, %buffer)
  %w = (s32[], bf16[3,64,64]{2,1,0}, bf16[8,64]{1,0:S(1)}, bf16[3,8,64]{2,1,0}) while(%first), condition=%condition, body=%body
  %last = bf16[3,8,64]{2,1,0} get-tuple-element(%w), index=3
  ROOT %copy = bf16[3,8,64]{2,1,0} copy(%last), metadata={op_name="copy"}, backend_config={"estimated_cycles":"70"}
}
"""  # noqa: E501


def test_kernels_are_counted_with_their_loops():
    program = hlo.read(TEXT, {"data": 8})
    found = {each.op_name: each for each in program.kernels}
    assert set(found) == {"layer", "attention", "embed", "copy"}
    layer = found["layer"]
    assert (layer.count, layer.cycles, layer.flops) == (3, 1000, 2 * 8 * 64 * 64)
    # A layer's weights and the index are read, its kept result is written; the rest stays on the chip.
    assert layer.bytes == 2 * 64 * 64 + 4 + 2 * 8 * 64
    assert (found["attention"].op, found["attention"].count) == ("custom-call tpu_custom_call", 3)
    assert found["attention"].cycles == found["embed"].cycles == -1
    assert program.cycles == 3 * 1000 + 70
    assert [each.op_name for each in hlo.rank(program.kernels)][:2] == ["layer", "copy"]
    silent = TEXT.replace("estimated_cycles", "other")
    assert hlo.read(silent, {"data": 8}).kernels == []


def test_equal_lines_are_ranked_as_one():
    made = hlo.Kernel("a", "fusion", 100, 8.0, 16, 3, "x", "spmd/a.py:1")
    other = hlo.Kernel("b", "fusion", 300, 0.0, 32, 1, "y", "spmd/a.py:1")
    (one,) = hlo.rank([made, other])
    assert (one.count, one.step_cycles, one.flops * one.count) == (4, 600, 24)


@pytest.mark.parametrize("target", ["v5p:2x2x2", "v6e:2x4"])
def test_a_compiled_plan_takes_the_compilers_cycles(target, tmp_path):
    exp = spmd.load(
        "gpt2_124m", ["--model.attention", "splash", "--data.batch-size", "64"]
    ).experiment
    plan = planner.plan(exp, target, compiled=False)
    program = hlo.read(TEXT, {"data": 8})
    memory = CompiledMemory(1, 1, 1, 1, 1, 1)
    step = Compiled(target, "compiled", {"data": 8}, memory, {"params": 1}, program, 1.0, 1)
    step = Compiled.from_json(step.json())
    plan = planner._apply_compiled(plan._replace(compiled=step), exp.strategy, closed_form=True)
    assert plan.estimate
    seconds, chip = plan.estimate.seconds, targets.parse(target).chip
    assert chip
    assert seconds["counted kernels"] == 3070 / chip.clock
    assert seconds["uncounted kernels"] > 0 and "matmuls" not in seconds
    view = kernels.kernels_view(plan)
    assert "0.0 M cycles per step in 4 kernels" in view and "attention" not in view.split("\n")[3]
    html.write(plan, str(tmp_path / "plan.html"))
    assert "of ideal" in (tmp_path / "plan.html").read_text()


def test_clocks():
    """A large matmul's cycles, as each compiler estimates them, are at most the peak of the chip's page."""
    cycles = {
        "v4": 596564,
        "v5e": 1083068,
        "v5p": 544925,
        "v6e": 301616,
        "7x": 324772,
    }  # 4096^3, bfloat16
    for name, chip in {chip.name: chip for chip in chips.CHIPS.values() if chip.units}.items():
        share = 2 * 4096**3 / (cycles[name] / chip.clock) / chip.flops["bfloat16"]
        assert 0.8 < share < 1, name


def test_what_has_no_cycles_is_said():
    exp = spmd.load("digits", []).experiment
    plan = planner.plan(exp, "cpu:1", compiled=False)
    assert "no kernels to show" in kernels.kernels_view(plan)
