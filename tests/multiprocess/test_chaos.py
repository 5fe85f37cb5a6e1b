"""Kills at random moments, saves included: the run ends bit-identical to an undisturbed one.

`python -m pytest -m "slow or not slow" tests/multiprocess/test_chaos.py` runs all 30;
CI runs one of each kind.
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


class Second:
    """A second start of the directory, under way while the first run is killed."""

    def __init__(self, start_group, num, run):
        self._begin = lambda: start_group(num, *run)
        self.group = None

    def begin(self):
        self.group = self.group or self._begin()

    def check(self):
        """It was refused, with the first owner's name; or it came when the first was dead, and finished."""
        codes = set(self.group.wait())
        assert codes <= {0, 2}, self.group.text()
        if codes == {2}:
            assert sum("is in use by process" in text for text in self.group.err) == 1
        assert "Traceback" not in self.group.text()
        return codes


def saving(directory):
    """Whether a save is under way: its files, or the manifest, are not complete."""
    for path in directory.glob("checkpoints/*"):
        if not path.name.isdigit() or not (path / "manifest.json").exists():
            return True
    return False


def train_until_killed(group, rng, mode, directory, reached, second):
    """Waits for a moment of the kind `mode`, and ends one process of the run."""
    if mode == "starting":  # or compiling
        time.sleep(rng.uniform(0.5, 6))
    else:
        target = rng.randrange(reached + 10, max(STEPS - 20, reached + 20), 10)
        alive = lambda: group.processes[0].poll() is None
        while last_step(group) < target and alive():
            time.sleep(0.002)
        if mode == "saving":
            while not saving(directory) and alive():
                time.sleep(0.0005)
        if mode == "refused":
            second.begin()
            if rng.random() < 0.5:  # at the moment of the refusal, or while it starts
                while (
                    not any(second.group.err)
                    and alive()
                    and second.group.processes[0].poll() is None
                ):
                    time.sleep(0.002)
            else:
                time.sleep(rng.uniform(0, 4))
        time.sleep(rng.uniform(0, 0.1))
    kinds = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]
    how = rng.choice(kinds) if mode in ("training", "starting") else signal.SIGKILL
    rng.choice(group.processes).send_signal(how)


# Of 30 seeds the first 20 kill at any moment, 5 while a save is being completed, and 5 while a second start
# of the same directory is being refused.
SEEDS = [(1 + seed % 2, seed) for seed in range(30)]
CASES = slow_but([(2, 1), (1, 20), (2, 25)], SEEDS)


@pytest.mark.parametrize(("num", "seed"), CASES)
def test_killed_at_random_moments(start_group, undisturbed, tmp_path, num, seed):
    reference = want(undisturbed, start_group, num)
    rng = random.Random(seed)
    # A process killed before the roll call is missed until the join time-out.
    waits = ("--runtime.grace", 120, "--runtime.join-timeout", 30)
    run = (*RUN, "--simulate", 2 // num, "--run.dir", tmp_path / "out", *waits)
    second = Second(start_group, num, run)
    reached, lost = 0, []
    for _ in range(rng.choice([1, 2])):
        group = start_group(num, *run)
        mode = "saving" if 20 <= seed < 25 else "refused" if seed >= 25 else "training"
        if mode == "training" and rng.random() < 0.25:
            mode = "starting"
        train_until_killed(group, rng, mode, tmp_path / "out", reached, second)
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
        if mode == "refused":
            refused = second.check()
            print(f"the second start ended with {refused}")
            break
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
