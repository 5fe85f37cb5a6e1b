"""run.py in a process of its own, with strict promotion and the caches of this test session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
HARDWARE = bool(os.environ.get("SPMD_TEST_HARDWARE"))  # leave the accelerator visible
ROOT = "SPMD_TEST_ROOT"  # inherited by xdist's workers, which share the caches

STRICT = {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}


def start(*args: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts run.py in its own process, in `cwd`."""
    ambient = ("JAX_", "XLA_", "TF_", "PYTHONWARNINGS", "PYTEST_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(ambient)}
    environ |= STRICT
    environ["JAX_COMPILATION_CACHE_DIR"] = f"{os.environ[ROOT]}/compiled"
    if not HARDWARE:
        environ["JAX_PLATFORMS"] = "cpu"
    command: Sequence[str] = [sys.executable, str(REPOSITORY / "run.py"), *map(str, args)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environ | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
