"""run.py in a process of its own, with strict promotion and the caches of this test session."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
HARDWARE = bool(os.environ.get("SPMD_TEST_HARDWARE"))  # leave the accelerator visible
ROOT = "SPMD_TEST_ROOT"  # inherited by xdist's workers, which share the caches

STRICT = {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}


def start(
    *args: str | int | Path,
    cwd: Path,
    env: dict[str, str] | None = None,
    script: Path = REPOSITORY / "run.py",
) -> subprocess.Popen[str]:
    """Starts run.py (or another script) in its own process, in `cwd`."""
    ambient = ("JAX_", "XLA_", "TF_", "PYTHONWARNINGS", "PYTEST_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(ambient)}
    environ |= STRICT
    environ["JAX_COMPILATION_CACHE_DIR"] = f"{os.environ[ROOT]}/compiled"
    environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"  # see conftest.py
    if not HARDWARE:
        environ["JAX_PLATFORMS"] = "cpu"
    command: Sequence[str] = [sys.executable, str(script), *map(str, args)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environ | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def until(ready: Callable[[], bool], timeout: float = 60) -> None:
    """Waits for `ready`; a file that is not there yet is no error."""
    deadline = time.monotonic() + timeout
    while True:
        with contextlib.suppress(FileNotFoundError):
            if ready():
                return
        assert time.monotonic() < deadline
        time.sleep(0.1)


def final_state(
    directory: str | Path, *words: str, experiment: str = "digits", num_devices: int = 1
) -> dict[str, np.ndarray]:
    """The leaves of the newest checkpoint of a run with these options, by name."""
    import jax
    from etils import epath

    import spmd
    from spmd.core import tree
    from spmd.train import CheckpointConfig
    from spmd.train.checkpoint.store import Checkpoints

    program = spmd.load(experiment, words).build(jax.devices()[:num_devices])
    checkpoints = Checkpoints(epath.Path(directory) / "checkpoints", CheckpointConfig())
    try:
        state = checkpoints.restore(program.abstract_state(), program.strategy.state_shardings)
    finally:
        checkpoints.close()
    return {name: np.array(leaf) for name, leaf in tree.named_leaves(state).items()}
