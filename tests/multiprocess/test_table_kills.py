"""A run with sparse tables, killed by SIGKILL and resumed by the same command, or on other devices."""

from __future__ import annotations

import shutil
import signal

import numpy as np
import pytest

from tests.command import final_state, until

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

IDS = ("20", "3000", "5000")
WORDS = ("--model.ids", *IDS, "--data.ids", *IDS)
RUN = (
    "--experiment", "clicks", *WORDS, "--data.examples", 20000, "--data.batch-size", 64,
    "--train.epochs", 1, "--checkpoint.every", 100, "--log.every", 50, "--eval.every", 1000,
)  # fmt: skip


@pytest.mark.parametrize(
    ("placement", "stacks"),
    [("auto", {"dim16", "dim16_replicated"}), ("tables", {"dim16_bins2"})],
)
def test_killed_and_resumed(start_group, tmp_path, placement, stacks):
    """Rows and the optimizer's state are bit-identical to those of an undisturbed run, and on another number
    of devices equal but for the order of sums.
    """
    run, words = (*RUN, "--model.placement", placement), (*WORDS, "--model.placement", placement)
    group = start_group(1, *run, "--simulate", 4, "--run.dir", tmp_path / "whole")
    assert group.wait() == [0], group.text()
    killed = start_group(1, *run, "--simulate", 4, "--run.dir", tmp_path / "killed")
    until(lambda: any((tmp_path / "killed").glob("checkpoints/*/manifest.json")), timeout=240)
    killed.processes[0].send_signal(signal.SIGKILL)
    assert killed.wait() == [-signal.SIGKILL], killed.text()
    shutil.copytree(tmp_path / "killed", tmp_path / "fewer")
    for name, num in (("killed", 4), ("fewer", 2)):
        group = start_group(1, *run, "--simulate", num, "--run.dir", tmp_path / name)
        assert group.wait() == [0], group.text()
        assert "resuming at step" in group.out[0]
    want, same, fewer = (
        final_state(tmp_path / name, *words, experiment="clicks", num_devices=4)
        for name in ("whole", "killed", "fewer")
    )
    assert {name.split("/")[1] for name in want if name.startswith("tables/")} == stacks
    for name, leaf in want.items():
        np.testing.assert_array_equal(same[name], leaf, err_msg=name)
        if name.startswith("tables/"):
            np.testing.assert_allclose(fewer[name], leaf, atol=2e-3, rtol=2e-3, err_msg=name)
