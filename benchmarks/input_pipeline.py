"""Input pipeline alone: examples per second, batch 128, one step and 32 steps per item.

python benchmarks/input_pipeline.py [--data-dir DIR] [--quick]

DIR holds a prepared TFDS mnist; without it the data is synthetic, of MNIST's shape.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spmd.data import TFDS, loader
from spmd.data.sources import ArraySource

FEATURES = {"image": ((28, 28, 1), "uint8"), "label": ((), "int32")}
EXAMPLES, BATCH = 60_000, 128


def measure(source, steps_per_dispatch: int, epochs: int, repeats: int) -> float:
    """Examples per second over some epochs, the best of a few."""
    steps = epochs * EXAMPLES // BATCH
    best = 0.0
    for _ in range(repeats):
        start, seen = time.perf_counter(), 0
        for batch in loader.train_batches(
            source, batch_size=BATCH, seed=0, stop=steps, steps_per_dispatch=steps_per_dispatch
        ):
            seen += batch["weight"].size
        best = max(best, seen / (time.perf_counter() - start))
    return best


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--quick", action="store_true", help="one epoch: does it run?")
    args = parser.parse_args()
    if args.data_dir:
        source = TFDS(name="mnist", dir=args.data_dir, features=FEATURES).open("train")
    else:
        rng = np.random.default_rng(0)
        source = ArraySource(
            {
                "image": rng.integers(0, 256, (EXAMPLES, 28, 28, 1), dtype=np.uint8),
                "label": rng.integers(0, 10, EXAMPLES, dtype=np.int32),
            }
        )
    print(f"{'steps per item':>14}  {'examples/s':>12}")
    epochs, repeats = (1, 1) if args.quick else (10, 3)
    for steps in (1, 32):
        print(f"{steps:>14}  {measure(source, steps, epochs, repeats):>12,.0f}")


if __name__ == "__main__":
    main()
