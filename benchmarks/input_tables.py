"""Rows per second of tables: 20 numeric columns, batches of 1,024, shuffled; Arrow IPC and Parquet.

python benchmarks/input_tables.py [--rows N] [--quick]

The table is generated in a temporary directory. Row groups of Parquet have 65,536 rows, record batches of
Arrow IPC too; a window of Parquet holds 262,144 rows. Each format is read twice, the better reading is shown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spmd.data import loader
from spmd.data.tables import Table

COLUMNS, BATCH, GROUP = 20, 1024, 65_536
FEATURES = {"x": ((COLUMNS,), "float32"), "label": ((), "int32")}


def write(folder: Path, rows: int) -> None:
    """A table of numbers in both formats."""
    rng = np.random.default_rng(0)
    columns = {f"c{i}": rng.normal(size=rows).astype(np.float32) for i in range(COLUMNS)}
    table = pa.table(columns | {"label": rng.integers(0, 10, rows).astype(np.int32)})
    pq.write_table(table, folder / "t.parquet", row_group_size=GROUP)
    with pa.ipc.new_file(str(folder / "t.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=GROUP)


def measure(folder: Path, suffix: str, steps: int) -> float:
    """Rows per second of the training batches of some steps."""
    names = tuple(f"c{i}" for i in range(COLUMNS))
    table = Table(
        files=(str(folder / f"t.{suffix}"),),
        features=FEATURES,
        columns={"x": names},
        batch_size=BATCH,
        eval_files=("none",),
    )
    source, seen = table.open("train"), 0
    start = time.perf_counter()
    for batch in loader.train_batches(source, batch_size=BATCH, seed=0, stop=steps):
        seen += len(batch["x"])
    return seen / (time.perf_counter() - start)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--quick", action="store_true", help="few rows: does it run?")
    args = parser.parse_args()
    rows = 100_000 if args.quick else args.rows
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), rows)
        print(f"{'format':>8}  {'rows/s':>12}")
        for suffix in ("arrow", "parquet"):
            best = max(measure(Path(folder), suffix, rows // BATCH) for _ in range(2))
            print(f"{suffix:>8}  {best:>12,.0f}")


if __name__ == "__main__":
    main()
