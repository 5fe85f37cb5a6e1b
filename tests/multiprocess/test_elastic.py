"""One run, stopped and resumed on other numbers of processes and devices: the same batches, the same loss."""

from __future__ import annotations

import json
import re
import signal

import numpy as np
import pytest

pytestmark = pytest.mark.multiprocess

STEPS, BATCH = 160, 48  # 48 divides over 8 and over 6 devices
RUN = (
    "--experiment", "digits", "--data.batch-size", BATCH, "--train.steps", STEPS, "--log.every", 10,
    "--checkpoint.every", 1000, "--eval.every", 1000, "--log.examples",
)  # fmt: skip


def examples(directory):
    """step -> the ids of its global batch, over all processes; fails on a step that stands twice."""
    found: dict[int, list[int]] = {}
    for file in sorted(directory.glob("examples-*.jsonl")):
        lines = [json.loads(x) for x in file.read_text().splitlines()]
        assert len({line["step"] for line in lines}) == len(lines), file
        for line in lines:
            found.setdefault(line["step"], []).extend(line["examples"])
    return {step: sorted(ids) for step, ids in sorted(found.items())}


def losses(directory):
    lines = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x["train/loss"] for x in lines if "train/loss" in x}


@pytest.mark.gate
def test_two_by_four_then_one_by_eight_then_three_by_two(start_group, run_cli, tmp_path):
    run = (*RUN, "--run.dir", "elastic")
    stopped_at = []
    for num, devices, after in ((2, 4, 20), (1, 8, 60)):
        group = start_group(num, *run, "--simulate", devices)
        group.until(rf"step {after}/")
        group.processes[-1].send_signal(signal.SIGTERM)
        assert group.wait() == [128 + signal.SIGTERM] * num, group.text()
        stopped_at.append(int(re.search(r"at step (\d+), state saved", group.err[0])[1]))
        assert len(re.findall("state saved", group.text())) == 1  # said once for the run
    last = start_group(3, *run, "--simulate", 2)
    assert last.wait() == [0, 0, 0], last.text()
    assert f"resuming at step {stopped_at[1]} of {STEPS}" in last.out[0]
    assert "6 x cpu (cpu) in 3 processes, mesh data=6" in last.out[0]
    assert 20 <= stopped_at[0] < stopped_at[1] < STEPS

    whole = run_cli(*RUN, "--run.dir", "whole", "--simulate", 4)
    assert whole.returncode == 0, whole.stderr
    want, got = examples(tmp_path / "whole"), examples(tmp_path / "elastic")
    assert list(got) == list(range(1, STEPS + 1))
    assert all(len(ids) == BATCH for ids in got.values())
    assert got == want
    a, b = losses(tmp_path / "whole"), losses(tmp_path / "elastic")
    both = sorted(set(a) & set(b) - {-(-s // 10) * 10 for s in stopped_at})
    assert len(both) >= STEPS // 10 - 2
    np.testing.assert_allclose([b[s] for s in both], [a[s] for s in both], rtol=1e-4)
    results = [
        json.loads((tmp_path / d / "summary.json").read_text()) for d in ("whole", "elastic")
    ]
    assert results[0]["metrics"]["eval/loss"] == pytest.approx(
        results[1]["metrics"]["eval/loss"], rel=1e-4
    )
