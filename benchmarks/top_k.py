"""The ten best of a million items on 8 simulated devices, against numpy: the same rows, and the latency.

python benchmarks/top_k.py [--items 1000000] [--rounds 20] [--simulate 8]    # half a minute, 2 GB

Items and users are vectors of width 64, in batches of 1 and of 32 users, each with 100 items left out. numpy
multiplies, partitions and sorts, in turns with the devices.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

DIM, K, SEEN = 64, 10, 100


def by_numpy(query: Any, table: Any, excluded: Any) -> Any:
    """Rows of the K largest scores, in descending order [B, K]."""
    import numpy as np

    scores = query @ table.T
    np.put_along_axis(scores, excluded, -np.inf, axis=1)
    best = np.argpartition(scores, -K, axis=1)[:, -K:]
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
    return np.take_along_axis(best, order, axis=1)


def seconds(run: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Print milliseconds of a query for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--simulate", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="for tests: 20,000 items, two rounds")
    options = parser.parse_args()
    items, rounds = (20_000, 2) if options.quick else (options.items, options.rounds)

    from spmd.parallel import mesh as meshes

    meshes.simulate(options.simulate)
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from spmd.parallel.mesh import MeshConfig
    from spmd.parallel.top_k import all_axes, padded_rows, sharded_top_k

    grid = meshes.make(MeshConfig(), jax.devices()[: options.simulate])
    rng = np.random.default_rng(0)
    table = rng.standard_normal((items, DIM), np.float32)
    padding = padded_rows(items, grid) - items
    placed = jax.device_put(
        np.pad(table, ((0, padding), (0, 0))), NamedSharding(grid, P(all_axes(grid)))
    )
    top_k = jax.jit(functools.partial(sharded_top_k, grid, num_rows=items, k=K))
    print(f"{items:,} items x {DIM}, {options.simulate} simulated devices, ms of a query, median")
    for users in (1, 32):
        query = rng.standard_normal((users, DIM), np.float32)
        excluded = rng.integers(0, items, (users, SEEN)).astype(np.int32)
        ours = lambda q=query, e=excluded: np.asarray(top_k(q, placed, e).rows)
        theirs = lambda q=query, e=excluded: by_numpy(q, table, e)
        same = bool((ours() == theirs()).all())
        times = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
        mine, numpys = (1000 * statistics.median(x) for x in zip(*times, strict=True))
        ratio = statistics.median(b / a for a, b in times)
        print(
            f"{users:3} users: {mine:8.2f}   numpy {numpys:8.2f}   numpy / devices {ratio:.2f}   same rows:"
            f" {'yes' if same else 'NO'}"
        )


if __name__ == "__main__":
    main()
