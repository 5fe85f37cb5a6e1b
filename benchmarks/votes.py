"""Cost of the loop's safeguards with two processes: stop votes, watchdog, phases; as a share of a step.

python benchmarks/votes.py [--rounds 10]

Blocks of steps with and without them take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STEPS = 20  # in a block
IN_FLIGHT = 2
WIDTHS = (256, 512)


def measure(rounds: int, quick: bool) -> None:
    """Run one process: it takes the blocks; the first process prints the rows."""
    import jax
    import numpy as np

    from spmd.parallel import mesh
    from spmd.runtime import RuntimeConfig, agree
    from spmd.runtime.join import join
    from spmd.runtime.stop import Votes
    from spmd.runtime.watchdog import Watchdog
    from spmd.train.log import Clock

    join(RuntimeConfig(), {})
    cut = mesh.make(mesh.MeshConfig())
    votes, watchdog = Votes(cut), Watchdog(RuntimeConfig().hang_timeout)
    placed, spread = (jax.NamedSharding(cut, spec) for spec in (jax.P(), jax.P("data")))

    def entering(phase: str) -> contextlib.AbstractContextManager[None]:
        watchdog.beat(phase, 0)
        return contextlib.nullcontext()

    clock = Clock(entering)

    def block(careful: bool, step, state) -> tuple[float, jax.Array]:
        pending = []
        if os.getppid() == 1:  # nobody reads the table any more
            sys.exit()
        start = time.perf_counter()
        for _ in range(STEPS):
            with clock("step") if careful else contextlib.nullcontext():
                state, metric = step(state)
                pending.append({"metric": metric} | (votes.cast(0) if careful else {}))
            with clock("step") if careful else contextlib.nullcontext():
                if len(pending) > IN_FLIGHT:
                    found = {name: np.asarray(x) for name, x in pending.pop(0).items()}
                    if "stop" in found:
                        votes.read(found["stop"])
        jax.block_until_ready((state, pending))
        return (time.perf_counter() - start) / STEPS, state

    for width in WIDTHS[:1] if quick else WIDTHS:

        def loss(weights, x):
            for _ in range(4):
                x = jax.numpy.tanh(x @ weights)
            return x.sum()

        def step(weights, width=width):
            """Data parallel: the gradient is summed over the processes, as in any real step."""
            x = jax.lax.with_sharding_constraint(jax.numpy.ones((2 * width, width)), spread)
            total, grad = jax.value_and_grad(loss)(weights, x)
            return weights - 1e-6 * grad, total

        jitted = jax.jit(step, out_shardings=placed, donate_argnums=0)
        whole = np.eye(width, dtype=np.float32)
        state = jax.make_array_from_callback(whole.shape, placed, lambda i, x=whole: x[i])
        _, state = block(True, jitted, state)
        pairs = []
        for turn in range(rounds):
            seconds = {}
            for careful in (turn % 2 == 0, turn % 2 == 1):
                seconds[careful], state = block(careful, jitted, state)
            pairs.append((seconds[False], seconds[True] - seconds[False]))
        plain, extra = (statistics.median(x) for x in zip(*pairs, strict=True))
        row = f"{plain * 1e3:>8.2f}  {extra * 1e6:>9.0f}  {extra / plain:>9.2%}"
        agree.say(f"{row}  {extra / max(plain, 0.05):>14.2%}")
    agree.leave(0)


def main() -> None:
    """Starts the two processes; prints one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="one short round: does it run?")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = 2 if args.quick else args.rounds
    if args.child:
        measure(args.rounds, args.quick)
        return
    print(f"{'ms/step':>8}  {'care, us':>9}  {'share':>9}  {'of 50 ms steps':>14}", flush=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ours = {"SPMD_COORDINATOR": f"127.0.0.1:{port}", "SPMD_NUM_PROCESSES": "2"}
    command = [sys.executable, *sys.argv, "--child"]
    environment = os.environ | ours | {"JAX_PLATFORMS": "cpu"}
    children = [
        subprocess.Popen(command, env=environment | {"SPMD_PROCESS_ID": str(i)}) for i in range(2)
    ]
    if sum(abs(child.wait()) for child in children):
        raise SystemExit("a process failed")


if __name__ == "__main__":
    main()
