"""`shellcheck`: a script is read by bash and by shellcheck."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import pytest


@pytest.fixture
def bash_reads() -> Callable[[str], None]:
    """Fails where `bash -n` finds a fault."""

    def reads(script: str) -> None:
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), script

    return reads


@pytest.fixture
def shellcheck(bash_reads) -> Callable[[str], None]:
    """The same, and shellcheck has nothing to say."""
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck (apt install shellcheck)")

    def check(script: str) -> None:
        bash_reads(script)
        done = subprocess.run(
            ["shellcheck", "--shell=bash", "-"], input=script, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout

    return check
