"""The search: every layout once, what is too large is rejected with its reason, the fastest first."""

from __future__ import annotations

import json
import time

import jax
import pytest

import spmd
from spmd.analysis.plan import memory, report, search
from spmd.analysis.plan.facts import from_experiment as from_exp
from spmd.analysis.plan.layout import Layout, apply, from_experiment
from spmd.analysis.plan.shardings import GROUPS
from spmd.core import tree
from spmd.hardware import targets
from spmd.parallel.mesh import AXES
from tests import printed
from tests.cases import facts_of, mesh_words, pairs_experiment
from tests.command import REPOSITORY

pytestmark = pytest.mark.usefixtures("devices")

SPLASH = ["--model.attention", "splash"]


@pytest.mark.gate
def test_a_thousand_candidates_take_seconds():
    fact = facts_of("llama3_8b", *SPLASH)
    begin = time.process_time()
    found = search.search(fact, targets.parse("h100:64"))
    took = time.process_time() - begin
    assert len(found) >= 1000
    assert took < 20
    assert len({str(candidate.layout) for candidate in found}) == len(found)
    fits = [candidate for candidate in found if candidate.fits]
    assert found[: len(fits)] == fits and fits
    seconds = [c.estimate.step_seconds for c in fits if c.estimate]
    assert seconds == sorted(seconds) and len(seconds) == len(fits)
    assert all(candidate.reason for candidate in found[len(fits) :])
    kinds = ("zero=1", "zero=3", "sequence-parallel", "accumulate=2", "remat=dots", "remat=full")
    kinds += ("stage=4", "context=2", "1f1b", "interleaved=2", "ulysses")
    assert all(any(kind in str(candidate.layout) for candidate in found) for kind in kinds)
    assert json.loads(json.dumps([candidate.json() for candidate in found[:3]]))


# A wide model and a tiny batch: the state, which real cuts give exactly, is nearly all of the memory.
WIDE = [
    "--model.embed",
    "1024",
    "--model.mlp",
    "4096",
    "--model.layers",
    "24",
    "--model.heads",
    "8",
]
SMALL = [*WIDE, "--data.batch-size", "8"]
MARGIN = 0.25  # of the state: what activations and temporaries may be here at most


def test_planted_meshes_that_do_not_fit_are_rejected_and_no_other():
    fact = facts_of("lm_stdlib", *SMALL)
    needs = {}
    for sizes in search.meshes(8):
        for zero in (3, 1) if sizes.get("fsdp", 1) > 1 else (3,):
            layout = Layout(sizes, zero=zero, remat="full")
            report = spmd.load(
                "lm_stdlib", [*SMALL, "--train.steps", "10", *mesh_words(layout)]
            ).plan()
            # Gradients lie as parameters do.
            needs[layout._replace(mesh=tuple(sizes.items()))] = (
                report.bytes_per_device + report.totals[GROUPS["params"]][1]
            )
    h100 = targets.parse("h100:8")
    assert h100.chip
    planted = fitting = 0
    for level in sorted(set(needs.values())):
        has = level * (1 + MARGIN)
        small = h100._replace(chip=h100.chip._replace(memory=has + memory.RESERVED))
        for plain, bytes in needs.items():
            candidate = search.evaluate(fact, small, plain._replace(mesh=dict(plain.mesh)))
            if bytes <= level:
                fitting += 1
                assert candidate.fits, candidate.reason
            elif bytes > has:
                planted += 1
                assert candidate.reason.startswith("needs ") and candidate.estimate
    assert planted > 20 and fitting > 20


def test_a_mesh_that_no_slice_has_keeps_its_reason():
    found = search.search(facts_of("llama3_8b", *SPLASH), targets.parse("v5p:4x4x4"))
    by_mesh = [c.reason for c in found if c.layout.mesh == {"fsdp": 8, "tensor": 8}]
    assert len(by_mesh) == 1 and "mesh.tensor=8 is not a product" in by_mesh[0]


def test_the_words_of_a_candidate_ask_for_its_layout():
    layout = Layout(
        {"fsdp": 4, "tensor": 2}, zero=1, sequence_parallel=True, accumulate=2, remat="named"
    )
    exp = spmd.load("lm_stdlib", layout.words()).experiment
    assert exp.mesh.resolve(8) == exp.mesh.sizes()
    assert (exp.mesh.fsdp, exp.mesh.tensor, exp.mesh.data) == (4, 2, 1)
    assert (exp.strategy.zero, exp.strategy.sequence_parallel) == (1, True)
    assert (exp.train.accumulate, exp.model.remat) == (2, "named")


@pytest.mark.parametrize(
    "layout",
    [
        Layout({"data": 2, "stage": 4}, accumulate=8, remat="full"),
        Layout({"stage": 4}, accumulate=8, remat="full", pipeline="interleaved", virtual=1),
        Layout({"stage": 2}, accumulate=8, remat="full", pipeline="interleaved", virtual=2),
        Layout({"data": 2, "context": 4}, remat="full", context="ulysses"),
    ],
    ids=str,
)
def test_the_words_of_a_pipeline_or_a_context_ask_for_it(layout):
    words = ["--data.batch-size", "16", *layout.words()]
    if layout.virtual == 1 and layout.pipeline == "interleaved":
        layout = layout._replace(virtual=2)  # the field's default
    exp = spmd.load("lm_stdlib", words).experiment
    assert from_experiment(exp, layout.num_devices) == layout._replace(saved=exp.model.saved)


DOC = REPOSITORY / "docs" / "plan.md"


@pytest.mark.parametrize("name", ["llama3_70b", "mixtral_8x7b"])
def test_a_large_model_is_searched_over_all_axes_in_a_minute(name):
    """And the table in the docs says what is found: the first three, and the first of each axis."""
    fact = facts_of(name, *SPLASH)
    begin = time.process_time()
    found = search.search(fact, targets.parse("v5p:4x4x4"))
    assert time.process_time() - begin < 60
    assert not any(c.layout.pipeline == "gpipe" for c in found)
    said = report.pipelines(found)
    assert said.startswith("A pipeline loses to FSDP: the best one (") and "% more than" in said
    fit = [c for c in found if c.fits]
    axes = ["data", "fsdp", "stage", "context", "tensor"]
    axes += ["expert"] if fact.model and fact.model.experts else []
    places = {report.best_of(fit, axis) for axis in axes}
    text = DOC.read_text("utf-8")
    for i in sorted({0, 1, 2} | places):
        row = fit[i]
        assert i >= 0 and row.estimate
        cells = (
            *(name, i + 1, row.layout, report.seconds(row.estimate.step_seconds)),
            *(f"{row.estimate.mfu:.1%}", tree.human_bytes(row.peak)),
            row.estimate.bottleneck.split(" take ")[0],
        )
        line = f"| {' | '.join(map(str, cells))} |"
        assert line in text, line


def test_more_microbatches_than_memory_asks_for_are_left_out():
    """They never make a step faster, where no stage waits."""
    fact, target = facts_of("llama3_8b", *SPLASH), targets.parse("v5p:4x4x4")
    for mesh in ({"fsdp": 64}, {"fsdp": 16, "tensor": 4}, {"fsdp": 16, "context": 4}):
        layouts = [Layout(mesh, accumulate=2**i, remat="full", context="ulysses") for i in range(4)]
        made = [search.evaluate(fact, target, layout) for layout in layouts]
        seconds = [c.estimate.step_seconds for c in made if c.estimate]
        assert seconds == sorted(seconds) and len(seconds) > 1


@pytest.mark.gate
@pytest.mark.parametrize("case", ["recipe", "pairs"])
def test_any_model_that_declares_its_stacks_is_searched_over_all_axes(case, tmp_path):
    """The fastest layout with each axis builds a step, as it is asked for."""
    (tmp_path / "encoder.py").write_text(printed.recipes()["encoder"])
    exp = pairs_experiment({})
    if case == "recipe":
        exp = spmd.load(str(tmp_path / "encoder.py"), ["--simulate", "8"]).experiment
    found = [c.layout for c in search.search(from_exp(exp), targets.parse("h100:8")) if c.fits]
    kinds = {c.pipeline for c in found if c.stages > 1}
    assert "1f1b" in kinds
    for axis in ("stage", "context", "tensor"):
        layout = next(c for c in found if c.size(axis) > 1)
        program = apply(layout, exp).unread(8).build(source=())
        assert program.mesh.shape[axis] == layout.size(axis)
        jax.eval_shape(program.strategy.step.jitted, *step_inputs(program))


def step_inputs(program):
    """Shapes of the arguments of a step."""
    knobs = dict(program.strategy.step.knobs)
    return program.abstract_state(), program.abstract_batch(), knobs


def test_a_model_that_is_not_known_is_searched_without_tensor():
    found = search.search(facts_of("digits"), targets.parse("h100:8"))
    assert found[0].fits
    assert spmd.load("digits", found[0].layout.words()).experiment.mesh.sizes() == (
        dict.fromkeys(AXES, 1) | dict(found[0].layout.mesh)
    )
    assert all(c.layout.size("tensor") == 1 for c in found if c.fits)
    assert {c.reason for c in found if c.layout.size("tensor") == 2} == {
        "mesh.tensor=2: the planner knows its cost for models that declare their stacks"
    }
