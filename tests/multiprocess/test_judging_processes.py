"""Two processes judge a model as one does."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from tests import local_tasks

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval"),
]


def test_two_processes_judge_as_one(start_group, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    local_tasks.write(tmp_path)
    words = (*local_tasks.RUN, "--simulate", 1)
    group = start_group(1, *words, "--train.steps", 6)
    assert group.wait() == [0], group.text()
    results = []
    for num in (1, 2):
        group = start_group(num, "eval", *words, "--tasks", local_tasks.TASKS)
        assert group.wait() == [0] * num, group.text()
        results.append(json.loads(group.out[0].splitlines()[-1]))
    one, two = results
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-5, err_msg=name)
