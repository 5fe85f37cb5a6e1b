"""Cost of a step of a strategy: bytes from the compiled program, seconds from a model of the network.

    step = computation, measured on a device + each collective on the network that its axes cross

Communication is not overlapped, so that its complete time is visible. Collectives of the same kind over the
same axes run as one, since XLA combines them; a collective in every n-th step (an outer step) counts 1 / n.
Not counted: the scalars of loss and metrics, which no parameter waits for; computation beside the gradient
(compression, outer updates); stragglers.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from spmd.analysis.plan import compile, network
from spmd.analysis.plan.collective import SCALAR
from spmd.hardware import hlo, targets

if TYPE_CHECKING:
    from spmd.experiment.base import Experiment
    from spmd.train.program import Program

COMBINED = ("all-reduce", "all-gather", "reduce-scatter")
BLOCKS = 5  # blocks of steps; their median is taken
BLOCK_SECONDS = 0.2


class Charge(NamedTuple):
    """Communication of a device. program: the training step. sizes: the mesh that it was compiled for."""

    program: hlo.CompiledProgram
    sizes: dict[str, int]

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.sizes.values())

    @property
    def sent(self) -> dict[str, float]:
        """Mesh axes (`data`, `replica x data`) -> bytes that a device sends over them in a step."""
        sent: dict[str, float] = {}
        for (axes, _), total in hlo.ledger(self.program).items():
            name = " x ".join(axes) or "?"
            sent[name] = sent.get(name, 0.0) + total.wire_bytes
        return sent

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends in a step over all axes."""
        return sum(self.sent.values())

    def seconds(self, name: str) -> float:
        """Seconds of a step's collectives on a network, `10gbe` or `replica=wan,data=nvlink`. Groups that are
        no product of axes count for the complete mesh.
        """
        levels = network.by_name(name, self.sizes)
        combined: dict[tuple[Any, ...], float] = {}
        for i, c in enumerate(self.program.collectives):
            if c.bytes <= SCALAR:
                continue
            separate = None if c.kind in COMBINED else i
            key = (c.kind, c.axes or tuple(levels), c.count, c.dtype, separate)
            combined[key] = combined.get(key, 0.0) + c.bytes
        return sum(
            count * network.seconds(network.join(levels, axes), kind, size)
            for (kind, axes, count, *_), size in combined.items()
        )


def charge(exp: Experiment, program: Program) -> Charge:
    """Charge of the training step, partitioned for the devices of the program."""
    num = program.mesh.size
    if program.mesh.devices.flat[0].platform == "cpu":
        step = compile.compile_step(program, targets.Target(f"cpu:{num}", num, None))
    else:  # in a process with simulated devices
        from spmd.analysis.plan import isolated

        step = isolated.compile_step(exp, f"cpu:{num}")
    return Charge(step.program, step.mesh)


def measure_compute(exp: Experiment, source: Any) -> float:
    """Measures the seconds of a step on one device of this machine, with a device's shard of the batch.

    The same for all strategies: times on simulated devices, which share the cores, would say less.
    """
    import jax

    from spmd.parallel import mesh
    from spmd.strategies import Auto

    devices = jax.devices()[: exp.simulate or None]
    shards = mesh.batch_shards(mesh.make(exp.mesh, devices))
    single = dataclasses.replace(
        exp,
        mesh=mesh.MeshConfig(data=1),
        strategy=Auto(),
        data=dataclasses.replace(exp.data, batch_size=exp.data.batch_size // shards),
    )
    program = single.build(devices[:1], source=source)
    state = program.init()
    batch: Any = next(program.host_batches(0, 1))

    def steps(state: Any, num: int) -> tuple[Any, float]:
        begin = time.perf_counter()
        for _ in range(num):
            state, metrics = program.strategy.step(state, batch)
            jax.block_until_ready(metrics)
        return state, (time.perf_counter() - begin) / num

    state, _ = steps(state, 1)  # compiles
    state, once = steps(state, 1)
    num, times = max(1, min(50, int(BLOCK_SECONDS / once))), []
    for _ in range(BLOCKS):
        state, spent = steps(state, num)
        times.append(spent)
    return statistics.median(times) * shards / len(devices)
