"""Pipelines: whether a program grows with its stages and microbatches, and 1F1B beside GPipe in turns.

python benchmarks/pipeline.py             # some minutes on 2 CPU cores
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZES = ((4, 16), (16, 64))  # stages, microbatches
TURNS = 9


def gradient(kind: str, stages: int, microbatches: int, width: int, rows: int) -> tuple[Any, Any]:
    """(the jitted gradient of a pipeline of a language model, its arguments: their shapes)."""
    import jax
    import jax.numpy as jnp

    from spmd import tasks
    from spmd.models.transformer import Transformer
    from spmd.parallel import mesh, scope, sharding
    from spmd.strategies.grads.pipeline import execute, schedules

    model = Transformer(
        vocab=256, length=64, layers=2 * stages, heads=4, embed=width, dtype="float32"
    )
    task = tasks.LanguageModel().build(model)
    cut = mesh.make(mesh.MeshConfig(data=1, stage=stages), jax.devices()[:stages])
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
    table = schedules.make(kind, stages, microbatches)  # type: ignore[arg-type]
    grads_of = execute.grads_of(task.staged(), task.dims, cut, table)

    def run(params: Any, batch: Any) -> Any:
        with scope.bind(**sharding.placement(cut)):
            scale = task.scale(task.weigh(batch))
            return grads_of(params, {}, batch, jax.random.key(0), scale)[:2]

    tokens = jax.ShapeDtypeStruct((rows * microbatches, model.length), jnp.int32)
    of_rows = lambda dtype: jax.ShapeDtypeStruct(tokens.shape[:1], dtype)
    batch = {"tokens": tokens, "targets": tokens}
    batch |= {"example_id": of_rows(jnp.int32), "weight": of_rows(jnp.float32)}
    placed = sharding.param_shardings(shapes, task.dims, cut, fsdp=True)
    return jax.jit(run, in_shardings=(placed, None), out_shardings=(placed, None)), (shapes, batch)


def compile_seconds(quick: bool) -> None:
    """Prints how long each size takes to compile."""
    seconds = []
    for stages, microbatches in ((2, 2), (2, 4)) if quick else SIZES:
        made, shapes = gradient("1f1b", stages, microbatches, 64, 1)
        start = time.perf_counter()
        made.lower(*shapes).compile()
        seconds.append(time.perf_counter() - start)
        ratio = f"{seconds[-1] / seconds[0]:.2f} x" if len(seconds) > 1 else ""
        print(f"compile  {stages:>2} stages x {microbatches:>2}  {seconds[-1]:>8.2f} s  {ratio}")


def step_seconds(quick: bool) -> None:
    """Prints 1F1B beside GPipe, 2 stages, 16 microbatches, in turns: the ratio is the median of pairs."""
    import jax
    import jax.numpy as jnp

    microbatches, width, rows = (2, 16, 1) if quick else (16, 128, 8)
    made, args = {}, None
    for kind in ("gpipe", "1f1b"):
        jitted, shapes = gradient(kind, 2, microbatches, width, rows)
        args = args or jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
        made[kind] = jitted.lower(*shapes).compile()
        args = jax.device_put(args, made[kind].input_shardings[0])
        jax.block_until_ready(made[kind](*args))
    seconds = {kind: [] for kind in made}
    for _ in range(2 if quick else TURNS):
        for kind, run in made.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            seconds[kind].append(time.perf_counter() - start)
    for kind, took in seconds.items():
        print(f"step     {kind:<14}  {statistics.median(took) * 1e3:>8.1f} ms")
    pairs = [b / a for a, b in zip(seconds["gpipe"], seconds["1f1b"], strict=True)]
    print(f"1f1b / gpipe, median of pairs: {statistics.median(pairs):.2f}")


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    quick = parser.parse_args().quick
    from spmd.parallel import mesh

    mesh.simulate(2 if quick else max(stages for stages, _ in SIZES))
    compile_seconds(quick)
    step_seconds(quick)


if __name__ == "__main__":
    main()
