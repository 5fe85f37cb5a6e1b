"""Every explicit strategy where it must equal one device, with every optimizer, on 2, 4 and 8 devices: by
`verify`; and what a strategy carries is saved and found again.
"""

from __future__ import annotations

import numpy as np
import pytest

import spmd
from spmd import optim
from tests.command import final_state
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("devices")
WORDS = ["--model.hidden", "32", "--model.dropout", "0.2"]
ALL = ["--strategy.compress.kind", "top-k", "--strategy.compress.keep", "1"]
FULL = ["--strategy.compress.kind", "powersgd", "--strategy.compress.rank", "999"]
STRATEGIES = {
    "psum": ["allreduce"],
    "ring": ["allreduce", "--strategy.reduction", "ring"],
    "both ways": ["allreduce", "--strategy.reduction", "ring", "--strategy.bidirectional"],
    "reduce_scatter": ["allreduce", "--strategy.reduction", "reduce_scatter"],
    "hierarchical": ["allreduce", "--strategy.reduction", "hierarchical", "--mesh.replica", "2"],
    "server": ["server"],
    "all of top-k": ["allreduce", *ALL],
    "full rank": ["allreduce", *FULL],
    "server, all of top-k": ["server", *ALL],
    "server, full rank": ["server", *FULL],
}
# They take signs or relative sizes. Where a gradient is exactly 0 (a pixel unlit, a unit asleep), products of
# PowerSGD leave rounding, of which they make a step: its limit is that of the gradient.
RELATIVE = ("lion", "adafactor")
CASES = [(s, o, n) for s in STRATEGIES for o in optim.OPTIMIZERS for n in (2, 4, 8)]


@pytest.mark.parametrize(
    ("strategy", "optimizer", "num"), slow_but([("server, full rank", "muon", 4)], CASES)
)
def test_equals_one_device(strategy, optimizer, num):
    words = [*WORDS, "--simulate", str(num), "--optimizer", optimizer]
    report = spmd.load("digits", [*words, "--strategy", *STRATEGIES[strategy]]).verify(2)
    print(report)
    (result,) = report.results
    if "full rank" in strategy and optimizer in RELATIVE:
        assert result.worst("float64", "grads") < 1e-9
        return
    assert report.verified
    for group in ("loss", "grads", "params"):
        assert result.worst("float64", group) < 1e-9
    assert result.worst("float32", "loss") < 1e-5


@pytest.mark.slow
def test_what_is_left_out_shows():
    """Verification fails where something is left out."""
    words = [*WORDS, "--simulate", "2", "--strategy", "allreduce", *ALL[:2]]
    report = spmd.load("digits", [*words, "--strategy.compress.keep", "0.5"]).verify(1)
    assert not report.verified and report.results[0].fault.stage == "gradient"


CARRIED = {
    "int8": ["allreduce", "--strategy.compress.kind", "int8"],
    "stale, powersgd": ["server", "--strategy.staleness", "2", *FULL[:2]],
    "top-k": ["allreduce", "--strategy.compress.kind", "top-k"],
}


@pytest.mark.parametrize("case", slow_but((), CARRIED, gate=("stale, powersgd",)))
def test_what_is_carried_resumes_bit_by_bit(case, tmp_path):
    """Errors, queue and bases are part of the state."""
    words = [*WORDS, "--simulate", "2", "--strategy", *CARRIED[case]]
    words += ["--optimizer.schedule", "constant", "--log.every", "100"]

    def train(name, steps):
        more = ["--train.steps", str(steps), "--run.dir", str(tmp_path / name)]
        return spmd.load("digits", [*words, *more]).train()

    train("cut", 7)
    train("cut", 12)
    train("whole", 12)
    got, want = (final_state(tmp_path / name, *words, num_devices=2) for name in ("cut", "whole"))
    assert any(name.startswith("strategy_state/") and x.any() for name, x in want.items())
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.slow
def test_errors_of_another_mesh_are_refused(tmp_path):
    """They belong to the devices that made them: a clear message, and the checkpoint stays."""
    words = [
        *WORDS,
        "--optimizer.warmup-steps",
        "0",
        "--strategy",
        *CARRIED["top-k"],
        "--run.dir",
        str(tmp_path / "run"),
    ]
    spmd.load("digits", [*words, "--simulate", "2", "--train.steps", "2"]).train()
    with pytest.raises(ValueError, match=r"strategy_state.own.errors.* in the checkpoint"):
        spmd.load("digits", [*words, "--simulate", "4", "--train.steps", "4"]).train()
    spmd.load("digits", [*words, "--simulate", "2", "--train.steps", "4"]).train()
