"""Digests of a state: GB/s by type and devices, and what they cost a run of 50 ms steps.

python benchmarks/digest.py [--mib 512]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

REPEATS = 5
STEP_SECONDS = 0.05


def measure(num_devices: int, mib: int) -> None:
    """Prints the rows of one device count; in a process of its own, since that count is fixed at start."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from spmd.core import digest
    from spmd.parallel import mesh

    mesh.simulate(num_devices)
    placed = NamedSharding(
        mesh.make(mesh.MeshConfig(fsdp=num_devices), jax.devices()[:num_devices]), P("fsdp")
    )
    for dtype in (jnp.float32, jnp.bfloat16):
        shape = (64, mib * 2**20 // 16 // 64 // jnp.dtype(dtype).itemsize)
        made = jax.jit(lambda i: jnp.full(shape, i, dtype), out_shardings=placed)  # noqa: B023
        state = {f"leaf{i}": made(i) for i in range(16)}
        jax.block_until_ready(digest.compute(state))
        seconds, waits = [], []
        for _ in range(REPEATS):
            start = time.perf_counter()
            digests = digest.compute(state)
            waits.append(time.perf_counter() - start)
            jax.block_until_ready(digests)
            seconds.append(time.perf_counter() - start)
        took, size = statistics.median(seconds), mib * 2**20
        row = f"{num_devices:>7}  {jnp.dtype(dtype).name:>8}  {size / took / 1e9:>6.2f}"
        per_gb = took * 1e9 / size
        share = took * 100 * 2**20 / size / (100 * STEP_SECONDS)
        print(f"{row}  {per_gb:>12.2f}  {statistics.median(waits) * 1e3:>11.2f}  {share:>22.2%}")


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512, help="size of the state")
    parser.add_argument("--devices", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a small state: does it run?")
    args = parser.parse_args()
    args.mib = 8 if args.quick else args.mib
    if args.devices:
        measure(args.devices, args.mib)
        return
    print(
        f"{'devices':>7}  {'type':>8}  {'GB/s':>6}  {'s for 1 GB':>12}  {'host waits':>11}"
        f"  {'100 MiB, every 100':>22}"
    )
    print(
        f"{'':>7}  {'':>8}  {'':>6}  {'':>12}  {'ms':>11}  {'share of 50 ms steps':>22}", flush=True
    )
    for devices in (1, 2):
        command = [sys.executable, __file__, "--devices", str(devices), "--mib", str(args.mib)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
