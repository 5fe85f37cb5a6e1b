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

from tests.command import final_state, until
from tests.marks import slow_but

pytestmark = [pytest.mark.multiprocess, pytest.mark.gate]

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
    """A second start of a directory that is locked, under way while the first run is killed."""

    def __init__(self, start_group, num, run, directory):
        self._begin, self._lock = lambda: start_group(num, *run), directory / "lock"
        self.group = None

    def begin(self):
        """Starts it as soon as the first run has the directory."""
        until(self._lock.exists, timeout=120)
        self.group = self._begin()

    def refused(self):
        """Whether it has been told so; its processes are about to end."""
        ended = any(process.poll() is not None for process in self.group.processes)
        return ended or any("is in use by" in text for text in self.group.err)

    def check(self, *, surely):
        """It was refused, with the first owner's name; or (not surely) it came when the first was dead."""
        codes = set(self.group.wait())
        assert codes == {2} or (codes == {0} and not surely), self.group.text()
        if codes == {2}:
            assert sum("is in use by process" in text for text in self.group.err) == 1
        assert "Traceback" not in self.group.text()
        return "was refused" if codes == {2} else "took over and finished"


def saving(directory):
    """Whether a save is under way: its files, or the manifest, are not complete."""
    for path in directory.glob("checkpoints/*"):
        if not path.name.isdigit() or not (path / "manifest.json").exists():
            return True
    return False


def wait_until_killed(group, rng, mode, directory, reached, second):
    """Waits for a moment of the kind `mode`, and ends one process of the run."""
    alive = lambda: group.processes[0].poll() is None
    if mode == "starting":  # or compiling
        time.sleep(rng.uniform(0.5, 6))
    elif mode == "refused":  # within a few ms of the refusal
        second.begin()
        while not second.refused():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
    elif mode == "second":  # while it starts, or before, or after
        second.begin()
        time.sleep(rng.uniform(0, 4))
    else:
        target = rng.randrange(reached + 10, max(STEPS - 20, reached + 20), 10)
        while last_step(group) < target and alive():
            time.sleep(0.002)
        while mode == "saving" and not saving(directory) and alive():
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.1))
    kinds = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]
    how = rng.choice(kinds) if mode in ("training", "starting") else signal.SIGKILL
    rng.choice(group.processes).send_signal(how)


MODES = ["training"] * 20 + ["saving"] * 5 + ["refused"] * 3 + ["second"] * 2


# Of 30 seeds the first 20 kill at any moment, 5 while a save is being completed, 3 at the moment at which a
# second start of the same directory is refused, and 2 anywhere around that.
SEEDS = [(1 + seed % 2, seed) for seed in range(len(MODES))]
CASES = slow_but([(1, 26)], SEEDS)


@pytest.mark.parametrize(("num", "seed"), CASES)
def test_killed_at_random_moments(start_group, undisturbed, tmp_path, num, seed):
    reference = want(undisturbed, start_group, num)
    rng = random.Random(seed)
    # A process killed before the roll call is missed until the join time-out.
    waits = ("--runtime.grace", 120, "--runtime.join-timeout", 30)
    run = (*RUN, "--simulate", 2 // num, "--run.dir", tmp_path / "out", *waits)
    second = Second(start_group, num, run, tmp_path / "out")
    reached, lost = 0, []
    for _ in range(rng.choice([1, 2])):
        group = start_group(num, *run)
        mode = MODES[seed]
        if mode == "training" and rng.random() < 0.25:
            mode = "starting"
        wait_until_killed(group, rng, mode, tmp_path / "out", reached, second)
        codes = group.wait()
        assert set(codes) <= {0, -9, -15, 75, 143}, group.text()
        reached = max(reached, last_step(group))
        if second.group is not None:
            assert -9 in codes, "the run had finished before the second start came"
            print(f"the second start {second.check(surely=mode == 'refused')}")
        if set(codes) == {0}:
            break
        if -9 in codes:
            steps = [
                int(p.name) for p in (tmp_path / "out").glob("checkpoints/*") if p.name.isdigit()
            ]
            lost.append(reached - max(steps, default=0))
        if second.group is not None:
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
