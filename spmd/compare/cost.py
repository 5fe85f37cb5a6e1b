"""What a step of a strategy costs: bytes from the compiled program, seconds from a model of the network.

    step = computation, measured on one device + each collective on the network that its axes cross

Nothing hides behind anything: the communication of a strategy is shown whole. Collectives of one kind over
the same axes run as one, since XLA combines them; of what runs in every n-th step (an outer step) the n-th
part counts. Left out of the time: the scalars of loss and metrics, for which no parameter waits; what a
strategy computes beside the gradient (compression, outer updates); stragglers.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from spmd import hlo
from spmd.plan import compile, network, targets
from spmd.plan.comms import SCALAR

if TYPE_CHECKING:
    from spmd.experiment import Experiment
    from spmd.train.program import Program

COMBINED = ("all-reduce", "all-gather", "reduce-scatter")
BLOCKS = 5  # of steps, the median of which is taken
BLOCK_SECONDS = 0.2


class Charge(NamedTuple):
    """Of one device: program is the step that trains, sizes the mesh that it was compiled for."""

    program: hlo.Program
    sizes: dict[str, int]

    @property
    def num_devices(self) -> int:
        """Of the mesh."""
        return math.prod(self.sizes.values())

    @property
    def sent(self) -> dict[str, float]:
        """Mesh axes (`data`, `replica x data`) -> bytes that a device sends over them in a step."""
        found: dict[str, float] = {}
        for (axes, _), total in hlo.ledger(self.program).items():
            name = " x ".join(axes) or "?"
            found[name] = found.get(name, 0.0) + total.wire_bytes
        return found

    @property
    def sent_bytes(self) -> float:
        """Over all axes."""
        return sum(self.sent.values())

    def seconds(self, name: str) -> float:
        """Of a step's collectives on a network, `10gbe` or `replica=wan,data=nvlink`. Groups that span no
        product of axes count for the whole mesh.
        """
        levels = network.named(name, self.sizes)
        together: dict[tuple[Any, ...], float] = {}
        for i, c in enumerate(self.program.collectives):
            if c.bytes <= SCALAR:
                continue
            alone = None if c.kind in COMBINED else i
            key = (c.kind, c.axes or tuple(levels), c.count, c.dtype, alone)
            together[key] = together.get(key, 0.0) + c.bytes
        return sum(
            count * network.seconds(network.join(levels, axes), kind, size)
            for (kind, axes, count, *_), size in together.items()
        )


def charge(exp: Experiment, program: Program) -> Charge:
    """Of the step that trains, as it is partitioned for as many devices."""
    num = program.mesh.size
    if program.mesh.devices.flat[0].platform == "cpu":
        made = compile.compiled(program, targets.Target(f"cpu:{num}", num, None))
    else:  # in a process that has simulated devices
        from spmd import ahead

        made = ahead.compiled(exp, f"cpu:{num}")
    return Charge(made.program, made.mesh)


def measured(exp: Experiment, source: Any) -> float:
    """Seconds of a step on one device of this machine, with the part of the batch that each device has.

    The same for all strategies: on simulated devices, which share the cores, their own times would say less.
    """
    import jax

    from spmd import mesh
    from spmd.strategies import Auto

    devices = jax.devices()[: exp.simulate or None]
    ways = mesh.batch_shards(mesh.make(exp.mesh, devices))
    alone = dataclasses.replace(
        exp,
        mesh=mesh.MeshConfig(data=1),
        strategy=Auto(),
        data=dataclasses.replace(exp.data, batch_size=exp.data.batch_size // ways),
    )
    program = alone.build(devices[:1], source=source)
    state = program.init()
    batch: Any = next(program.host_batches(0, 1))

    def steps(state: Any, num: int) -> tuple[Any, float]:
        begin = time.perf_counter()
        for _ in range(num):
            state, metrics = program.strategy.step(state, batch)
            jax.block_until_ready(metrics)
        return state, (time.perf_counter() - begin) / num

    state, _ = steps(state, 1)  # which compiles
    state, once = steps(state, 1)
    num, found = max(1, min(50, int(BLOCK_SECONDS / once))), []
    for _ in range(BLOCKS):
        state, spent = steps(state, num)
        found.append(spent)
    return statistics.median(found) * ways / len(devices)
