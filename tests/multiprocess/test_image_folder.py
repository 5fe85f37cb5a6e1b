"""A run on a folder of images, stopped and resumed on 2, 1 and 4 processes: the same examples and result."""

from __future__ import annotations

import json
import re
import signal

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.multiprocess

STEPS, BATCH = 160, 16
RUN = (
    "--experiment", "image_folder", "--data.path", "mine", "--data.batch-size", BATCH,
    "--model.features", "4", "--data.transforms", "decode,random_resized_crop:12,flip,mixup:0.2",
    "--data.eval-transforms", "decode,central_crop:12", "--train.steps", STEPS, "--log.every", 10,
    "--checkpoint.every", 1000, "--eval.every", 1000, "--log.examples",
)  # fmt: skip


def examples(directory):
    """{step: ids of its global batch}, over all processes."""
    steps: dict[int, list[int]] = {}
    for file in sorted(directory.glob("examples-*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            steps.setdefault(line["step"], []).extend(line["examples"])
    return {step: sorted(ids) for step, ids in sorted(steps.items())}


@pytest.mark.slow
def test_a_folder_of_images_on_two_then_one_then_four_processes(start_group, run_cli, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(120):
        (tmp_path / f"mine/c{i % 3}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (20, 24, 3)) + 70 * (i % 3)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"mine/c{i % 3}/{i}.jpg")
    stopped_at = []
    for num, after in ((2, 30), (1, 70)):
        group = start_group(num, *RUN, "--run.dir", "elastic", "--simulate", 4 // num)
        group.until(rf"step {after}/")
        group.processes[-1].send_signal(signal.SIGTERM)
        assert group.wait() == [128 + signal.SIGTERM] * num, group.text()
        stopped_at.append(int(re.search(r"at step (\d+), state saved", group.err[0])[1]))
    last = start_group(4, *RUN, "--run.dir", "elastic", "--simulate", 1)
    assert last.wait() == [0] * 4, last.text()
    assert 30 <= stopped_at[0] < stopped_at[1] < STEPS
    whole = run_cli(*RUN, "--run.dir", "whole", "--simulate", 4)
    assert whole.returncode == 0, whole.stderr
    assert examples(tmp_path / "elastic") == examples(tmp_path / "whole")
    # Process 0 draws predictions of examples that all of them computed.
    sheets = [tmp_path / f"{d}/pictures/{STEPS:08}.png" for d in ("whole", "elastic")]
    sizes = [Image.open(sheet).size for sheet in sheets]
    assert sizes[0] == sizes[1]
    results = [
        json.loads((tmp_path / d / "summary.json").read_text())["metrics"]["eval/loss"]
        for d in ("whole", "elastic")
    ]
    assert results[1] == pytest.approx(results[0], rel=1e-4)
