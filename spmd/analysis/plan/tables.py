"""Sparse tables in a plan: the exchange of ids and rows, memory traffic, and what a TPU pads.

A round of `pull` sends the places of the rows that a device asks for, int32, and gets the rows; a round of
`push` sends the places again, and the gradients of the rows. Each is an all-to-all over all devices, of a
bucket of C slots for each device (parallel.routing.slots_of_bins). ROUNDS rounds are assumed: one, as when
the ids of a batch are spread evenly over the devices; `lookup_rounds` among a run's metrics counts those of a
step. Of replicated tables the dense gradient is all-reduced, and how often each row is named.

Before the first round and after each, a bound for each device is all-reduced. Where devices share the
examples of a batch (mesh.tensor, mesh.context), each looks up a part of them, and the rows are all-gathered.
"""

# N devices, U = B L / N lookups of a device, C slots of a bucket, D width of a row

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from spmd.analysis.plan.collective import EstimatedCollective
from spmd.core import tree
from spmd.core.fields import check
from spmd.hardware.chips import Chip
from spmd.parallel.mesh import AXES, BATCH_AXES
from spmd.parallel.routing import slots_of_bins
from spmd.parallel.tables import LANES, STRIPES, Tables, stack

if TYPE_CHECKING:
    from spmd.analysis.plan.layout import Layout

ROUNDS = 1
INDEX_BYTES = 4
PAYLOAD = "lookups"


class StackFacts(NamedTuple):
    """Tables of one width as the planner sees them.

    stack: its name. loads: ids of an example, in each bin. delivered: rows of an example that reach the
    model, pooled ones once.
    row_bytes: of a row in the table, and as it is sent. sent_bytes: of the gradient of a row. slot_bytes: of
    the optimizer's state of a row. rows: of the array. replicated: on each device.
    """

    stack: str
    names: tuple[str, ...]
    dim: int
    rows: int
    loads: tuple[int, ...]
    delivered: int
    row_bytes: int
    sent_bytes: int
    slot_bytes: int
    replicated: bool

    @property
    def title(self) -> str:
        """The names, or of many the first and the number."""
        more = f" and {len(self.names) - 3} more" if len(self.names) > 3 else ""
        return ", ".join(self.names[:3]) + more

    @property
    def padded(self) -> float:
        """Bytes that a TPU allocates for each byte of the rows: its lines have 128 numbers."""
        line = LANES // self.dim * self.dim if LANES % self.dim == 0 else self.dim
        return math.ceil(line / LANES) * LANES / line

    def padding(self, num_devices: int) -> int:
        """Bytes of padding on each of some TPUs."""
        num = 1 if self.replicated else num_devices
        return round(self.rows * self.row_bytes * (self.padded - 1) / num)

    def slots(self, batch_size: int, num_devices: int) -> int:
        """Slots of a bucket, C."""
        lookups = -(-batch_size // num_devices) * sum(self.loads)
        return slots_of_bins(self.loads, lookups, num_devices)


def table_facts(
    tables: Tables, batch: Mapping[str, Any], state: Mapping[str, Mapping[str, Any]], itemsize: int
) -> tuple[StackFacts, ...]:
    """The stacks of a model's tables.

    Args:
        tables: of the model.
        batch: shapes of its features.
        state: shapes of the arrays of each stack.
        itemsize: bytes of a number of a row that has been looked up.
    """
    facts = []
    for stacked in stack(tables):
        shapes = [
            (lookup, math.prod(batch[lookup.feature].shape[1:])) for lookup, *_ in stacked.lookups
        ]
        arrays = {name: x.size * x.dtype.itemsize for name, x in state[stacked.name].items()}
        rows, dim = stacked.placement.rows, stacked.placement.dim
        held = arrays.pop("rows")
        facts.append(
            StackFacts(
                stack=stacked.name,
                names=tuple(stacked.offsets),
                dim=dim,
                rows=rows,
                loads=stacked.loads([num for _, num in shapes]),
                delivered=sum(num if lookup.pool == "none" else 1 for lookup, num in shapes),
                row_bytes=held // rows,
                sent_bytes=dim * itemsize,
                slot_bytes=sum(arrays.values()) // rows,
                replicated=stacked.replicated,
            )
        )
    return tuple(facts)


def check_stripes(stacks: tuple[StackFacts, ...], num_devices: int) -> None:
    """ValueError where no run could share the tables among so many devices."""
    check(
        STRIPES % num_devices == 0 or all(each.replicated for each in stacks),
        f"tables are stored in {STRIPES} stripes, which {num_devices} devices do not divide; use"
        f" 1, 2, 4, 8, 16 or another power of two up to {STRIPES}",
    )


def table_collectives(
    stacks: tuple[StackFacts, ...],
    batch_size: int,
    layout: Layout,
    rounds: Mapping[str, int] | int = ROUNDS,
) -> list[EstimatedCollective]:
    """The collectives of pull and push.

    Args:
        stacks: of the model.
        batch_size: examples of a global batch.
        layout: how it is sharded.
        rounds: of each exchange.
    """
    axes = tuple(axis for axis in AXES if layout.size(axis) > 1)
    num, collectives = layout.num_devices, list[EstimatedCollective]()
    if num == 1:
        return []
    shared = tuple(axis for axis in axes if axis not in BATCH_AXES)
    for each in stacks:
        count = rounds if isinstance(rounds, int) else rounds[each.stack]
        rows = num * each.slots(batch_size, num)
        exchange = lambda kind, size, times: EstimatedCollective(
            kind, axes, num, size, times, PAYLOAD
        )
        if each.replicated:  # with how often each row is named
            size = each.rows * (each.sent_bytes + each.sent_bytes // each.dim)
            collectives.append(exchange("all-reduce", size, 1))
        else:
            collectives += [
                exchange("all-to-all", rows * INDEX_BYTES, 2 * count),
                exchange("all-to-all", rows * each.row_bytes, count),
                exchange("all-to-all", rows * each.sent_bytes, count),
                exchange("all-reduce", num * INDEX_BYTES, 2 * (count + 1)),
            ]
        if shared:
            size = batch_size / layout.size(*BATCH_AXES) * each.delivered * each.sent_bytes
            group = layout.size(*shared)
            collectives.append(EstimatedCollective("all-gather", shared, group, size, 1, PAYLOAD))
    return collectives


def is_tpu(chip: Chip | None) -> bool:
    """Whether the chip is a TPU, which pads lines to 128 numbers."""
    return bool(chip and chip.links and chip.links.axes)


def lookup_seconds(
    stacks: tuple[StackFacts, ...], batch_size: int, layout: Layout, chip: Chip
) -> float:
    """Seconds of the random accesses of a device: rows are read by pull, rows and the optimizer's state are
    read and written by push. A TPU moves complete lines of 128 numbers.
    """
    num, moved = layout.num_devices, 0.0
    tpu = is_tpu(chip)
    for each in stacks:
        accessed = each.rows if each.replicated else num * each.slots(batch_size, num)
        line = max(each.row_bytes, LANES * each.row_bytes // each.dim) if tpu else each.row_bytes
        moved += accessed * (3 * line + 2 * each.slot_bytes)
    return moved / chip.bandwidth


def padding_notes(stacks: tuple[StackFacts, ...], num_devices: int) -> list[str]:
    """A sentence for each stack whose width a TPU pads: what it costs, and a width that costs nothing."""
    notes = []
    for each in stacks:
        if each.padded > 1:
            padded = math.ceil(each.dim / LANES) * LANES
            width = padded if each.dim > LANES else 2 ** math.ceil(math.log2(each.dim))
            notes.append(
                f"tables {each.title}: rows of {each.dim} numbers take the memory of {padded} on"
                f" TPUs, {each.padded:.2f} times as much, {tree.human_bytes(each.padding(num_devices))} of a"
                f" device; a width of {width} is not padded"
            )
    return notes
