"""The traced window holds its steps, whole dispatches of them, and only the part that this start runs."""

from __future__ import annotations

import pytest
from jax.profiler import ProfileData

import spmd

SHORT = ("--simulate", "2", "--optimizer.warmup-steps", "0")


def train(directory, *words):
    return spmd.load("digits", [*SHORT, "--run.dir", str(directory), *words]).train()


def traced(directory):
    """{session: the first steps of the dispatches in it}."""
    found = {}
    for session in (directory / "profile/plugins/profile").iterdir():
        assert {p.name for p in session.iterdir()} == {
            "process-0.xplane.pb",
            "process-0.trace.json.gz",
        }
        data = ProfileData.from_file(str(session / "process-0.xplane.pb"))
        steps = [
            dict(event.stats)["step_num"]
            for plane in data.planes
            for line in plane.lines
            for event in line.events
            if event.name == "train"
        ]
        found[session.name] = sorted(steps)
    return found


@pytest.mark.parametrize(
    ("dispatch", "session", "steps"),
    [(1, "steps-5-8", [5, 6, 7, 8]), (3, "steps-4-9", [4, 7])],
)
def test_the_window_holds_its_steps(tmp_path, dispatch, session, steps):
    train(
        tmp_path,
        *("--train.steps", "12", "--log.profile", "5:8"),
        *("--train.steps-per-dispatch", str(dispatch)),
    )
    assert traced(tmp_path) == {session: steps}


def test_what_is_left_of_it_after_resuming(tmp_path, capsys):
    train(tmp_path, "--train.steps", "6", "--log.profile", "5:8")  # ends within the window
    assert traced(tmp_path) == {"steps-5-6": [5, 6]}
    train(tmp_path, "--train.steps", "10", "--log.profile", "5:8")
    assert traced(tmp_path) == {"steps-5-6": [5, 6], "steps-7-8": [7, 8]}
    assert f"xprof --logdir {tmp_path}/profile" in capsys.readouterr().out


@pytest.mark.parametrize("window", ["2:4", "11:12"])
def test_a_window_outside_the_run_is_said(tmp_path, capsys, window):
    train(tmp_path, "--train.steps", "4")
    train(tmp_path, "--train.steps", "10", "--log.profile", window)
    said = [x for x in capsys.readouterr().out.splitlines() if "profile" in x]
    assert said == [f"no profile: --log.profile {window} is outside steps 5:10"]
    assert not (tmp_path / "profile").exists()
