"""A signal to one process stops all at one step, at whichever phase; a dead one ends the rest at once."""

from __future__ import annotations

import re
import signal
import time

import pytest

from tests.marks import slow_but

pytestmark = pytest.mark.multiprocess

# digits with splits that take their time, as large ones do: to be opened, to be evaluated.
SLOW = '''"""digits, opened and evaluated slowly."""

import dataclasses
import time

from spmd.data import TFDS
from spmd.experiment.registry import find, from_file


class Slow:
    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def take(self, indices):
        print("evaluating", flush=True)
        time.sleep(0.2)
        return self.inner.take(indices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(TFDS):
    def open(self, split):
        if split == "eval":
            return Slow(super().open(split))
        print("opening", flush=True)
        time.sleep(1)
        return super().open(split)


def config():
    digits = from_file(find("digits"))
    fields = {f.name: getattr(digits.data, f.name) for f in dataclasses.fields(digits.data)}
    return dataclasses.replace(digits, data=Data(**fields))
'''

PHASES = {
    "opening": ("opening", ()),
    "compiling": (r"params/head/bias|opt_state/.*bias", ()),
    "first_step": (r"rank|Rank|step 1/", ("--log.every", 1)),
    "evaluating": ("evaluating", ("--eval.every", 20, "--data.eval-batch-size", 8)),
    "saving": (r"step 20/", ("--checkpoint.every", 1, "--log.every", 5)),
}
STEPS = 4000


@pytest.mark.gate
@pytest.mark.parametrize("phase", slow_but(("saving",), PHASES))
def test_sigterm_to_any_process_at_any_phase(start_group, tmp_path, phase):
    (tmp_path / "slow.py").write_text(SLOW)
    pattern, more = PHASES[phase]
    args = ("--experiment", "slow.py", "--train.steps", STEPS, "--run.dir", "out", "--simulate", 1)
    group = start_group(2, *args, *more, "--runtime.grace", 120)  # this machine may be busy
    group.until(pattern)
    if phase == "opening":
        group.until(pattern, index=1)
    group.processes[1].send_signal(signal.SIGTERM)
    assert group.wait() == [128 + signal.SIGTERM] * 2, group.text()
    if phase == "opening":
        assert "stopped by SIGTERM before the first step; nothing was written" in group.text()
        assert not (tmp_path / "out").exists() and "Traceback" not in group.text()
        return
    (step,) = re.findall(r"stopped by SIGTERM at step (\d+), state saved", group.text())
    assert (tmp_path / "out/checkpoints" / step).is_dir()
    assert int(step) < STEPS
    assert "Traceback" not in group.text()


@pytest.mark.gate
@pytest.mark.parametrize("victim", slow_but((0,), (0, 1)))
def test_a_killed_process_ends_the_other_at_once(start_group, victim):
    args = ("--experiment", "digits", "--train.steps", 4000, "--log.every", 10)
    group = start_group(2, *args, "--run.dir", "out", "--checkpoint.every", 20, "--simulate", 1)
    group.until("step 30/")
    group.processes[victim].kill()
    began = time.monotonic()
    codes = group.wait()
    assert time.monotonic() - began < 20  # heartbeats would need a minute
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 75, group.text()
    pid = group.processes[victim].pid
    assert re.search(rf"process {victim} \(\S+ pid {pid}\) is gone", group.err[1 - victim])


@pytest.mark.gate
def test_a_hung_process_is_left_and_named(start_group):
    """SIGSTOP is a host that no longer answers: nothing fails, nothing moves."""
    args = ("--experiment", "digits", "--train.steps", 4000, "--log.every", 10, "--simulate", 1)
    group = start_group(2, *args, "--runtime.hang-timeout", 12)
    group.until("step 30/")
    group.processes[1].send_signal(signal.SIGSTOP)
    group.processes[0].wait(120)
    group.processes[1].kill()
    assert group.wait() == [75, -signal.SIGKILL], group.text()
    assert re.search(r"no progress for 12 s, at: \w+, step \d+; leaving", group.err[0])
    assert re.search(r"process 1: (silent|\w+, step \d+)", group.err[0])
    assert "loop.py" in group.err[0]  # where this process's threads stand


@pytest.mark.gate
def test_unlike_processes_are_told_apart_before_anything_starts(start_group, tmp_path):
    args = ("--experiment", "digits", "--train.steps", 5, "--run.dir", "out")
    group = start_group(2, *args, each=[[], ["--optimizer.momentum", "0.5"]])
    assert group.wait() == [2, 2], group.text()
    for err in group.err:
        assert "optimizer.momentum is 0.5, in process 0 0.9" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.gate
def test_a_mistake_that_process_0_finds_is_said_once_and_ends_all(start_group, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    group = start_group(2, "--experiment", "digits", "--train.steps", 5, "--run.dir", "out")
    assert group.wait() == [2, 2], group.text()
    assert len(re.findall("holds no run", group.text())) == 1


@pytest.mark.slow
def test_bad_data_of_one_process_ends_all_with_one_message(start_group, tmp_path):
    """A label that only one of the processes reads."""
    text = SLOW.replace("time.sleep(0.2)", "pass").replace(
        "return self.inner.take(indices)",
        "found = self.inner.take(indices)\n"
        "        found['label'][indices == 700] = 10\n"
        "        return found",
    )
    text = text.replace('if split == "eval":', 'if split == "train":')
    (tmp_path / "bad.py").write_text(text)
    group = start_group(2, "--experiment", "bad.py", "--run.dir", "out", "--simulate", 1)
    assert group.wait() == [2, 2], group.text()
    assert len(re.findall("'label' is 10 in example 700 of the training data", group.text())) == 1
    assert len(re.findall("has ended the run; its own message says why", group.text())) == 1
    assert "start the run again" not in group.text()


@pytest.mark.gate
def test_those_that_did_not_come_are_named(start_group):
    args = ("--experiment", "digits", "--runtime.num-processes", 3, "--runtime.join-timeout", 4)
    group = start_group(2, *args)
    assert group.wait() == [75, 75], group.text()
    for err in group.err:
        assert "of 3 processes, 1 did not join in time: 2. Those that joined: 0 (" in err
