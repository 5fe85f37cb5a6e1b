"""Schedules as tables: length and bubble are those of the formulas; broken ones are refused by place."""

from __future__ import annotations

import numpy as np
import pytest

from spmd.strategies.grads.pipeline import schedules

SIZES = [(2, 1), (2, 2), (2, 7), (3, 12), (4, 4), (4, 16), (8, 3), (8, 64), (16, 64)]
GROUPED = [(2, 2), (2, 8), (3, 12), (4, 4), (4, 16), (8, 64)]
TABLES = [(kind, *size, 1) for kind in ("gpipe", "1f1b") for size in SIZES]
TABLES += [("interleaved", *size, virtual) for size in GROUPED for virtual in (2, 3, 4)]


@pytest.mark.parametrize("kind,stages,microbatches,virtual", TABLES)
def test_ticks_and_bubble_are_those_of_the_formulas(kind, stages, microbatches, virtual):
    table = schedules.make(kind, stages, microbatches, virtual)
    schedules.check(table)
    ramp = stages - 1
    lengths = {
        "gpipe": 2 * (microbatches + ramp),
        "1f1b": microbatches + 2 * ramp,
        "interleaved": virtual * microbatches + (virtual + 1) * stages - 2,
    }
    want = lengths[kind]
    assert table.ticks == schedules.ticks(kind, stages, microbatches, virtual) == want
    bubble = ramp / (virtual * microbatches + ramp)
    assert schedules.bubble(stages, microbatches, virtual) == bubble
    for cost in (1.0, 2.0, 3.0):
        assert schedules.idle(table, cost) == pytest.approx(bubble)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b", "interleaved"])
def test_several_stacks_have_a_chunk_each_on_every_stage(kind):
    stages, microbatches, chunks = 4, 8, 6 if kind == "interleaved" else 2
    table = schedules.make(kind, stages, microbatches, 3, stacks=2)
    schedules.check(table)
    assert table.virtual == schedules.num_chunks(kind, 3, 2) == chunks
    assert table.ticks == schedules.ticks(kind, stages, microbatches, 3, stacks=2)
    if kind == "1f1b":
        same = schedules.make("interleaved", stages, microbatches, 2)
        assert (table.forward == same.forward).all() and (table.backward == same.backward).all()
    assert schedules.idle(table) == pytest.approx(schedules.bubble(stages, microbatches, chunks))


@pytest.mark.parametrize("stages,microbatches", [(2, 16), (3, 12), (4, 16), (8, 64)])
def test_inputs_kept_are_flat_in_the_microbatches_but_for_gpipe(stages, microbatches):
    slots = lambda kind, m: schedules.program(schedules.make(kind, stages, m, 2))[1]
    assert slots("gpipe", microbatches) == microbatches
    assert slots("1f1b", microbatches) == slots("1f1b", 4 * microbatches) == 2 * stages - 3
    assert slots("interleaved", microbatches) == slots("interleaved", 4 * microbatches)


def test_what_is_read_is_what_was_put_there():
    """Runs the buffers of each table with (virtual stage, microbatch) as values."""
    for case in TABLES:
        table = schedules.make(*case)
        run, num_inputs, num_gradients = schedules.program(table)
        last = table.stages * table.virtual - 1
        inputs = np.full((table.stages, num_inputs, 2), -1)
        gradients = np.full((table.stages, num_gradients, 2), -1)
        up, down = {}, {}
        for tick in range(table.ticks):
            for stage in range(table.stages):
                if (slot := run.x_to[tick, stage]) >= 0:
                    inputs[stage, slot] = up[stage]
                if (slot := run.ct_to[tick, stage]) >= 0:
                    gradients[stage, slot] = down[stage]
            up, down = {}, {}
            for stage in range(table.stages):
                at = lambda name, run=run, tick=tick, stage=stage: int(
                    getattr(run, name)[tick, stage]
                )
                if (microbatch := at("forward")) >= 0:
                    virtual = at("forward_chunk") * table.stages + stage
                    if virtual:
                        read = inputs[stage, at("forward_x")]
                        assert read.tolist() == [virtual, microbatch]
                    up[(stage + 1) % table.stages] = (virtual + 1, microbatch)
                if (microbatch := at("backward")) >= 0:
                    virtual = at("backward_chunk") * table.stages + stage
                    if virtual:
                        read = inputs[stage, at("backward_x")]
                        assert read.tolist() == [virtual, microbatch]
                    if virtual < last:
                        read = gradients[stage, at("backward_ct")]
                        assert read.tolist() == [virtual, microbatch]
                    down[(stage - 1) % table.stages] = (virtual - 1, microbatch)


def changed(table, way, tick, stage, value):
    """The table with another entry."""
    parts = {"forward": table.forward.copy(), "backward": table.backward.copy()}
    parts[way][tick, stage] = value
    return table._replace(**parts)


def test_broken_tables_are_refused_by_tick_and_stage():
    table = schedules.make("1f1b", 3, 4)
    none = schedules.IDLE
    refused = {
        "stage 1 has had no backward of microbatch 2": changed(table, "backward", 5, 1, none),
        "tick 3, stage 2: forward of microbatch 0 a second time, after tick 2": changed(
            table, "forward", 3, 2, (0, 0)
        ),
        "tick 0, stage 0: forward of microbatch 9: there are 4 microbatches": changed(
            table, "forward", 0, 0, (9, 0)
        ),
    }
    early = changed(changed(table, "forward", 1, 1, none), "forward", 0, 1, (0, 0))
    refused[
        "tick 0, stage 1: forward of microbatch 0 reads what is not there: stage 0 makes it"
    ] = early
    # Stage 0 wants the backward of 0 before it sends 1; stage 1 wants 1 before it goes back through 0.
    two = schedules.make("1f1b", 2, 2)
    forward, backward = np.full((2, 6, 2, 2), none, np.int32)
    forward[0, 0] = forward[1, 1] = forward[3, 0] = forward[2, 1] = 0
    forward[3, 0] = forward[2, 1] = (1, 0)
    backward[3, 1] = backward[2, 0] = (0, 0)
    backward[4, 1] = backward[5, 0] = (1, 0)
    stuck = two._replace(forward=forward, backward=backward)
    refused["deadlock: tick 2, stage 0: backward of microbatch 0 waits for backward"] = stuck
    for message, broken in refused.items():
        with pytest.raises(ValueError, match=message):
            schedules.check(broken)


def test_mistakes_say_what_works():
    with pytest.raises(ValueError, match=r"train.accumulate=6 .*mesh.stage=4; use 4 or 8, or"):
        schedules.make("interleaved", 4, 6, 2)
    with pytest.raises(ValueError, match=r"6 microbatches: a model of 2 stacks .*; use 4 or 8$"):
        schedules.make("1f1b", 4, 6, stacks=2)
    with pytest.raises(ValueError, match="at least 2 stages"):
        schedules.make("1f1b", 1, 4)
    with pytest.raises(ValueError, match=r"virtual_stages=1.*with 1 it is 1f1b"):
        schedules.make("interleaved", 2, 4, 1)


def test_the_picture_of_a_table():
    assert schedules.draw(schedules.make("1f1b", 2, 3)) == "\n".join(
        (
            "tick     0    1    2    3    4",
            "stage 0  F0   F1   F2B0 B1   B2",
            "stage 1  .    F0B0 F1B1 F2B2 .",
        )
    )
    narrow = schedules.draw(schedules.make("interleaved", 2, 2, 2), width=40)
    assert narrow.count("tick") > 1 and "F1.1B1.1" in narrow


def test_plan_shows_the_schedule(capsys):
    from spmd.cli import main

    words = "--simulate 4 --mesh.data 1 --mesh.stage 4 --show schedule"
    assert (
        main(["plan", "--experiment", "lm_stdlib", "--train.accumulate", "3", *words.split()]) == 0
    )
    shown = capsys.readouterr().out
    assert "1f1b: 4 layers on 4 stages, 3 microbatches, 9 ticks; a stage waits 50.0%" in shown
    assert "stage 3  .    .    .    F0B0 F1B1 F2B2" in shown
    assert "--train.accumulate 16 makes that 16%" in shown
    assert main(["plan", "--experiment", "digits", *words.split()]) == 2
    assert "spmd.models.mlp._Net is none" in capsys.readouterr().err
