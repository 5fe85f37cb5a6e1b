"""The gate fails on a skip that nobody allowed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.command import REPOSITORY
from tests.skips import ALLOWED, allowed, conditions, forbidden


def test_sections_hold_under_their_condition():
    text = "[always]\n# why\nneeds a\n\n[x]\nneeds b\n"
    assert allowed(text, {"always": True, "x": False}) == ["needs a"]
    assert allowed(text, {"always": True, "x": True}) == ["needs a", "needs b"]
    assert forbidden(["needs a (apt)", "needs b", "other"], ["needs a"]) == ["needs b", "other"]
    assert forbidden(["any"], []) == ["any"]
    with pytest.raises(ValueError, match="unknown section 'x'"):
        allowed(text, {"always": True})


def test_the_list_is_of_known_sections_each_with_entries_and_a_reason():
    known = conditions()
    assert allowed(ALLOWED.read_text(), dict.fromkeys(known, True))
    blocks = ALLOWED.read_text().split("\n[")[1:]
    assert len(blocks) == len(known) and all("\n# " in block for block in blocks)


@pytest.mark.parametrize(
    "ci, reason, code", [("true", "no reason", 1), ("true", "needs gcloud", 0), ("", "no", 0)]
)
def test_a_suite_with_a_skip(ci, reason, code, tmp_path):
    (tmp_path / "test_one.py").write_text(
        f"import pytest\n\ndef test_skipped():\n    pytest.skip({reason!r})\n\ndef test_passes():\n    pass\n"
    )
    (tmp_path / "conftest.py").write_text(
        "from tests.skips import Skips\n\n"
        "def pytest_configure(config):\n    config.pluginmanager.register(Skips())\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_one.py"]
    env = os.environ | {"CI": ci, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert (
        f"{reason}{'  NOT ALLOWED by allowed_skips.txt' if code else ''}: test_one.py"
        in done.stdout
    )
