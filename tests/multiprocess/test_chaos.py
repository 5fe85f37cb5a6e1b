"""Kills at random moments, saves included: the run ends bit-identical to an undisturbed one.

`python -m pytest -m "slow or not slow" tests/multiprocess/test_chaos.py` runs all 20; CI runs one.
"""

from __future__ import annotations

import json
import random
import re
import signal
import time

import numpy as np
import pytest

from tests.command import final_state
from tests.marks import slow_but

pytestmark = pytest.mark.multiprocess

STEPS, SAVE = 600, 100
MODEL = ("--model.hidden", "512", "256")
RUN = (
    "--experiment", "digits", "--train.steps", STEPS, "--checkpoint.every", SAVE, "--log.every", 10,
    "--eval.every", 150, *MODEL,
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Number of processes -> the final state of a run that nobody disturbed."""
    return {}, tmp_path_factory.mktemp("undisturbed")


def want(undisturbed, start_group, num):
    states, directory = undisturbed
    if num not in states:
        group = start_group(num, *RUN, "--simulate", 2 // num, "--run.dir", directory / str(num))
        assert group.wait() == [0] * num, group.text()
        states[num] = final_state(directory / str(num), *MODEL)
    return states[num]


def last_step(group):
    """The last step that was reported, or where the run began."""
    steps = re.findall(r"^step (\d+)/|resuming at step (\d+)", group.out[0], re.M)
    return max((int(a or b) for a, b in steps), default=0)


CASES = slow_but([(2, 1)], [(1 + seed % 2, seed) for seed in range(20)])


@pytest.mark.parametrize(("num", "seed"), CASES)
def test_killed_at_random_moments(start_group, undisturbed, tmp_path, num, seed):
    reference = want(undisturbed, start_group, num)
    rng = random.Random(seed)
    # A process killed before the roll call is missed until the join time-out.
    waits = ("--runtime.grace", 120, "--runtime.join-timeout", 30)
    run = (*RUN, "--simulate", 2 // num, "--run.dir", tmp_path / "out", *waits)
    reached, lost = 0, []
    for _ in range(rng.choice([1, 2])):
        group = start_group(num, *run)
        if rng.random() < 0.25:  # while it starts, or compiles
            time.sleep(rng.uniform(0.5, 6))
        else:  # while it trains; a save is under way for much of the time
            target = rng.randrange(reached + 10, max(STEPS - 20, reached + 20), 10)
            while last_step(group) < target and group.processes[0].poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))
        how = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        rng.choice(group.processes).send_signal(how)
        codes = group.wait()
        assert set(codes) <= {0, -9, -15, 75, 143}, group.text()
        reached = max(reached, last_step(group))
        if set(codes) == {0}:
            break
        if -9 in codes:
            steps = [
                int(p.name) for p in (tmp_path / "out").glob("checkpoints/*") if p.name.isdigit()
            ]
            lost.append(reached - max(steps, default=0))
    end = start_group(num, *run)
    assert end.wait() == [0] * num, end.text()
    print(f"processes {num}, seed {seed}: lost {lost} steps, with a checkpoint every {SAVE}")
    # one interval, and what was trained while the last save was being written
    assert all(steps < 2 * SAVE for steps in lost)
    got = final_state(tmp_path / "out", *MODEL)
    assert got.keys() == reference.keys()
    for name in reference:
        np.testing.assert_array_equal(got[name], reference[name], err_msg=name)
    lines = [
        json.loads(x)["step"] for x in (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    ]
    assert lines == sorted(lines)
    assert json.loads((tmp_path / "out/summary.json").read_text())["steps"] == STEPS
