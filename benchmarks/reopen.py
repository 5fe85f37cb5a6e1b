"""Reopening a save: seconds in the background, and what the steps of the loop wait for it.

python benchmarks/reopen.py [--mib 1024] [--leaves 200]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

REPEATS = 5
STEPS = 200


def saved(directory: str, mib: int, num_leaves: int) -> tuple[dict[str, Any], float, float]:
    """(the arrays of a step that was saved, seconds in the call, seconds until it was complete)."""
    import jax
    import jax.numpy as jnp
    from etils import epath

    from spmd.train import CheckpointConfig
    from spmd.train.checkpoint.store import Checkpoints

    size = mib * 2**20 // 4 // num_leaves // 64
    draw = jax.jit(lambda key: jax.random.normal(key, (64, size), jnp.float32))
    state = {f"leaf{i:04}": draw(jax.random.key(i)) for i in range(num_leaves)}
    jax.block_until_ready(state)
    checkpoints = Checkpoints(epath.Path(directory), CheckpointConfig())
    start = time.perf_counter()
    checkpoints.save(state, 1, {}, {})
    call = time.perf_counter() - start
    checkpoints.wait()
    done = time.perf_counter() - start
    checkpoints.close()
    return state, call, done


def step_seconds() -> list[float]:
    """Seconds of each of STEPS steps that the host waits for, about 5 ms each."""
    import jax
    import jax.numpy as jnp

    step = jax.jit(lambda x: jnp.tanh(x @ x / 400.0))
    x = jnp.ones((400, 400), jnp.float32)
    jax.block_until_ready(step(x))
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        x = step(step(step(x)))
        jax.block_until_ready(x)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(mib: int, num_leaves: int) -> None:
    """Prints one row."""
    import jax
    import numpy as np
    from etils import epath

    from spmd.train.checkpoint import index, reading

    with tempfile.TemporaryDirectory() as folder:
        state, call, done = saved(folder, mib, num_leaves)
        path = epath.Path(folder) / "1"
        leaves: dict[str, Any] = {
            **state,
            reading.DIGESTS: jax.ShapeDtypeStruct((num_leaves, 2), np.uint32),
        }
        seconds, over = [], threading.Event()

        def reopen() -> None:
            while not over.is_set():
                start = time.perf_counter()
                if wrong := index.check_complete(path, leaves):
                    raise SystemExit(f"the save is not complete: {wrong}")
                seconds.append(time.perf_counter() - start)

        # Each step alone and beside a thread that reopens without a pause, in turn.
        alone, beside = [], []
        for _ in range(REPEATS):
            alone += step_seconds()
            over.clear()
            thread = threading.Thread(target=reopen)
            thread.start()
            beside += step_seconds()
            over.set()
            thread.join()
    middle = statistics.median
    print(
        f"{mib:>6}  {num_leaves:>7}  {call:>10.2f}  {done:>11.2f}  {middle(seconds):>9.3f}"
        f"  {middle(alone) * 1e3:>10.2f}  {middle(beside) * 1e3:>14.2f}"
        f"  {(middle(beside) - middle(alone)) / middle(alone) * middle(seconds) * 1e3:>10.1f}"
    )


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--leaves", type=int, default=200, help="arrays of the state")
    parser.add_argument("--quick", action="store_true", help="a small state: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.mib, args.leaves = 8, 10
    print(
        f"{'MiB':>6}  {'arrays':>7}  {'save call':>10}  {'complete in':>11}  {'reopening':>9}"
        f"  {'step alone':>10}  {'step beside it':>14}  {'loop waits'}"
    )
    print(
        f"{'':>6}  {'':>7}  {'s':>10}  {'s':>11}  {'s':>9}  {'ms':>10}  {'ms':>14}  {'ms a save':>10}",
        flush=True,
    )
    measure(args.mib, args.leaves)


if __name__ == "__main__":
    main()
