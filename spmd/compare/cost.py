"""What a step of a strategy costs: bytes from the compiled program, seconds from a model of the network.

    step = computation, measured on one device + each collective on the network that its axes cross

Nothing hides behind anything: the communication of a strategy is shown whole. Collectives of one kind over
the same axes run as one, since XLA combines them; what runs in every n-th step (an outer step) counts by its
n-th part. Left out of the time: the scalars of loss and metrics, for which no parameter waits; what a strategy
computes beside the gradient (compression, outer updates); stragglers.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from spmd import hlo
from spmd.plan import compile, network, targets

if TYPE_CHECKING:
    from spmd.experiment import Experiment
    from spmd.train.loop import Program

COMBINED = ("all-reduce", "all-gather", "reduce-scatter")
SCALAR = 8  # bytes
BLOCKS = 5  # of steps, the median of which is taken
BLOCK_SECONDS = 0.2


class Charge(NamedTuple):
    """Per device and step. sent: bytes by mesh axes (`data`, `replica x data`). seconds: of collectives."""

    sent: dict[str, float]
    seconds: float
    num_devices: int

    @property
    def sent_bytes(self) -> float:
        """Over all axes."""
        return sum(self.sent.values())


def charge(exp: Experiment, program: Program, levels: network.Levels) -> Charge:
    """Of the step that trains, as it is partitioned for as many devices; levels: what each axis crosses."""
    num = program.mesh.size
    if program.mesh.devices.flat[0].platform == "cpu":
        made = compile.compiled(program, targets.Target(f"cpu:{num}", num, None))
    else:  # in a process that has simulated devices
        from spmd import ahead

        made = ahead.compiled(exp, f"cpu:{num}")
    sent: dict[str, float] = {}
    for (axes, _), total in hlo.ledger(made.program).items():
        name = " x ".join(axes) or "?"
        sent[name] = sent.get(name, 0.0) + total.wire_bytes
    return Charge(sent, seconds(made.program, levels), num)


def seconds(program: hlo.Program, levels: network.Levels) -> float:
    """Of the collectives of a step. Groups that span no product of axes count for the whole mesh."""
    together: dict[tuple[Any, ...], float] = {}
    for i, c in enumerate(program.collectives):
        if c.bytes <= SCALAR:
            continue
        alone = None if c.kind in COMBINED else i
        key = (c.kind, c.axes or tuple(levels), c.dtype, c.count, alone)
        together[key] = together.get(key, 0.0) + c.bytes
    total = 0.0
    for (kind, axes, _, count, _), size in together.items():
        total += count * network.seconds(network.join(levels, axes), kind, size)
    return total


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
