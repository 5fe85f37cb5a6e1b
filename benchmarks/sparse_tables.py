"""Time of a training step against the number of rows of its sparse table, and against jnp.take and optax.

python benchmarks/sparse_tables.py [--rounds 10] [--simulate 8]        # 5 minutes, 8 GB of memory

A batch looks up 8,192 ids of rows of 16 numbers, with row-wise Adagrad. Tables of two sizes take turns, since
machines drift; ratios are taken within rounds, of seconds by the clock and of CPU seconds of all threads,
which other programs on the cores stretch less. The small table stays in the cores' caches from step to step
unless something else passes through them: the second row.

The other contestant differentiates the table as any parameter: rows sharded over the devices, jnp.take,
jax.grad, optax.adagrad.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EXAMPLES, BAG, DIM = 1024, 8, 16
Contestant = Callable[[], Any]  # runs a step; what it returns is ready when the step is done


def batches(rows: int) -> dict[str, Any]:
    """Bags of ids drawn uniformly, and targets."""
    import numpy as np

    rng = np.random.default_rng(0)
    ids = rng.integers(0, rows, (EXAMPLES, BAG), dtype=np.int32)
    return {"bag": ids, "target": rng.normal(size=EXAMPLES).astype(np.float32)}


def sparse(rows: int, simulate: int) -> tuple[Contestant, int]:
    """(a step of an experiment whose table has so many rows, bytes of its temporaries)."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from spmd import Experiment, optim
    from spmd.data import Arrays
    from spmd.parallel.tables import Lookup, SparseTable
    from spmd.tasks import Task
    from spmd.train import TrainConfig

    class Bags(nnx.Module):
        tables: ClassVar = {
            "items": SparseTable(ids=rows, dim=DIM, lookups=(Lookup(feature="bag"),))
        }

        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(DIM, 8, use_bias=False, rngs=rngs)
            self.last = nnx.Linear(8, 1, use_bias=False, rngs=rngs)

        def __call__(self, bag: jax.Array) -> jax.Array:
            return self.last(jnp.tanh(self.first(bag)))[:, 0]

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Regression(Task):
        def inputs(self, batch: Any) -> tuple[Any, ...]:
            return (batch["rows/bag"],)

        def values(self, outputs: Any, batch: Any, *, train: bool) -> dict[str, jax.Array]:
            return {"loss": jnp.square(outputs - batch["target"])}

    def log() -> dict[str, Any]:
        return batches(rows)

    features = {"bag": ((BAG,), "int32"), "target": ((), "float32")}
    exp = Experiment(
        model=Bags,
        task=Regression(),
        optimizer=optim.SGD(learning_rate=0.01, momentum=0),
        data=Arrays(train=log, eval=log, features=features, batch_size=EXAMPLES),
        train=TrainConfig(steps=10**6),
        simulate=simulate,
    )
    program = exp.build()
    strategy = program.strategy
    batch = jax.device_put(next(program.host_batches(0, 1)), strategy.batch_shardings)
    state = [program.init()]
    compiled = strategy.step.lower(state[0], batch).compile()

    def step() -> Any:
        state[0], metrics = compiled(state[0], batch, dict(strategy.step.knobs))
        return metrics

    memory: Any = compiled.memory_analysis()
    return step, memory.temp_size_in_bytes


def dense(rows: int, simulate: int) -> tuple[Contestant, int]:
    """As `sparse`, by jnp.take, jax.grad and optax.adagrad."""
    import jax
    import jax.numpy as jnp
    import optax

    mesh = jax.make_mesh((simulate,), ("data",), (jax.sharding.AxisType.Auto,))
    over, everywhere = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    rows = -(-rows // simulate) * simulate
    tx = optax.adagrad(0.01)
    shape = {"table": (rows, DIM), "first": (DIM, 8), "last": (8, 1)}
    placed = {"table": over, "first": everywhere, "last": everywhere}

    def loss(params: Any, batch: Any) -> jax.Array:
        bag = jnp.take(params["table"], batch["bag"], axis=0).sum(1)
        outputs = (jnp.tanh(bag @ params["first"]) @ params["last"])[:, 0]
        return jnp.square(outputs - batch["target"]).mean()

    def init() -> Any:
        key = jax.random.key(0)
        params = {name: jax.random.normal(key, size) / 4 for name, size in shape.items()}
        return params, tx.init(params)

    def update(state: Any, batch: Any) -> Any:
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, moments = tx.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    def place(path: Any, leaf: Any) -> Any:
        return placed.get(path[-1].key, everywhere) if hasattr(path[-1], "key") else everywhere

    shardings = jax.tree.map_with_path(place, jax.eval_shape(init))
    batch = jax.device_put(batches(rows), over)
    state = [jax.jit(init, out_shardings=shardings)()]
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(shardings, everywhere))
    compiled = jitted.lower(state[0], batch).compile()

    def step() -> Any:
        state[0], value = compiled(state[0], batch)
        return value

    memory: Any = compiled.memory_analysis()
    return step, memory.temp_size_in_bytes


def timed(
    step: Contestant, steps: int, between: Callable[[], Any] | None = None
) -> tuple[float, float]:
    """Milliseconds of a step, by the clock and of the CPU; `between` runs before each, and is not timed."""
    import jax

    jax.block_until_ready(step())
    spent = cpu = 0.0
    for _ in range(steps):
        if between:
            between()
        start, cpu_start = time.perf_counter(), time.process_time()
        jax.block_until_ready(step())
        spent += time.perf_counter() - start
        cpu += time.process_time() - cpu_start
    return spent / steps * 1e3, cpu / steps * 1e3


def overwriting_caches() -> Callable[[], Any]:
    """A function that reads and writes 64 MiB, more than the cores' caches hold."""
    import numpy as np

    numbers = np.zeros(2**24, np.float32)
    return lambda: np.add(numbers, 1, out=numbers)


def compare(
    title: str,
    pair: list[tuple[Contestant, int]],
    rounds: int,
    steps: list[int],
    between: Callable[[], Any] | None = None,
) -> None:
    """Prints medians, their ratio within rounds, and the temporaries of two contestants.

    between: as `timed` takes it.
    """
    times = []
    for turn in range(rounds):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        measured = {i: timed(pair[i][0], steps[i], between) for i in order}
        times.append((measured[0], measured[1]))
    cells = ""
    for kind in (0, 1):  # by the clock, of the CPU
        first, second = (statistics.median(x[i][kind] for x in times) for i in (0, 1))
        ratio = statistics.median(b[kind] / a[kind] for a, b in times)
        cells += f"{first:>9.1f}{second:>9.1f}{ratio:>7.2f}"
    temporaries = " ".join(f"{size / 1e6:.1f}" for _, size in pair)
    print(f"{title:<44}{cells}   {temporaries}", flush=True)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--simulate", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="small tables: does it run?")
    args = parser.parse_args()

    from spmd.parallel import mesh

    mesh.simulate(args.simulate)
    few, many, peer = (10**4, 10**5, 10**5) if args.quick else (10**5, 5 * 10**7, 10**7)
    rounds = 2 if args.quick else args.rounds
    header = f"{'first':>9}{'second':>9}{'ratio':>7}{'CPU':>9}{'CPU':>9}{'ratio':>7}"
    print(f"{'ms a step':<44}{header}   MB of temporaries")
    small = sparse(few, args.simulate)
    large = [small, sparse(many, args.simulate)]
    compare(f"{few:,} rows / {many:,} rows", large, rounds, [20, 20])
    overwrite = overwriting_caches()
    compare("the same, caches overwritten between steps", large, rounds, [20, 20], overwrite)
    large.clear()  # the larger table goes before the next is made
    other = [sparse(peer, args.simulate), dense(peer, args.simulate)]
    compare(f"{peer:,} rows / jnp.take and optax", other, max(2, rounds // 2), [20, 2])


if __name__ == "__main__":
    main()
