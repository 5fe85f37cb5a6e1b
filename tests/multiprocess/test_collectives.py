"""Before anything is said of several processes: their collectives compute what numpy does."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("num", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_collectives_rows_and_agreement(start_group, num):
    group = start_group(num, script=Path(__file__).with_name("collectives.py"))
    assert group.wait() == [0] * num, group.text()
    for part in ("as numpy says", "over processes", "each in its place", "reached"):
        assert all(part in out for out in group.out)
