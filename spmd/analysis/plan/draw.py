"""Pictures of how arrays are sharded."""

from __future__ import annotations

import collections
import io
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spmd.analysis.plan.shardings import GROUPS, Array, ShardingReport

DRAWN = 3  # arrays
BLOCKS = 8  # rows and columns of a drawing
WIDTH = 120  # columns: eight blocks, each with two device ids and the number of further ones
COLOURS = ("blue", "green", "magenta", "cyan", "red", "yellow")


def plot(report: ShardingReport, place: str) -> None:
    """Draws the shards of the largest parameters on the `terminal`, or into a self-contained HTML file."""
    if place == "terminal":
        _draw(report, Console(width=WIDTH, highlight=False))
        return
    console = Console(file=io.StringIO(), record=True, width=WIDTH, highlight=False)
    _draw(report, console)
    console.save_html(place)


def _draw(report: ShardingReport, console: Console) -> None:
    """Draws the largest array of each sharding, the largest first."""
    shards: dict[Any, Array] = {}
    for array in sorted(report.arrays, key=lambda array: -array.bytes):
        if array.group == GROUPS["params"] and array.shape:
            shards.setdefault((array.dims, array.sharding.spec), array)
    for array in list(shards.values())[:DRAWN]:
        console.print(f"\n{escape(array.name)}: the devices of each block", soft_wrap=True)
        _blocks(array, console)


def _blocks(array: Array, console: Console) -> None:
    """Draws two dims (the sharded ones, then the largest) as rows and columns of blocks. Devices are numbered
    by their position in the mesh, since the position of a chip in its slice is not known here.
    """
    shape = array.shape
    shard = array.sharding.shard_shape(shape)
    shards = [size // part for size, part in zip(shape, shard, strict=True)]
    dims = sorted(sorted(range(len(shape)), key=lambda i: (shards[i] == 1, -shape[i]))[:2])
    devices = collections.defaultdict[tuple[int, ...], list[int]](list)
    for device, index in array.sharding.devices_indices_map(shape).items():
        devices[tuple((index[i].start or 0) // shard[i] for i in dims)].append(device.id)
    names = ("down", "across")[-len(dims) :]
    console.print(
        ", ".join(f"{n} {_label(array, i, shards[i])}" for n, i in zip(names, dims, strict=True))
    )
    rows, columns = (1, *(shards[i] for i in dims))[-2:]
    shown = min(columns, BLOCKS)
    table = Table(show_header=False, box=None)
    for r in range(min(rows, BLOCKS)):
        cells = []
        for c in range(shown):
            colour = COLOURS[(r * shown + c) % len(COLOURS)]
            cells.append(
                f"[white on {colour}] {_device_ids(sorted(devices[(r, c)[-len(dims) :]]))} [/]"
            )
        table.add_row(*cells)
    console.print(table)
    if rows > BLOCKS or columns > BLOCKS:
        console.print(f"and so on: {rows} x {columns} blocks")


def _label(array: Array, dim: int, shards: int) -> str:
    name = (array.dims or (None,) * len(array.shape))[dim] or f"dim {dim}"
    spec = [*array.sharding.spec, *[None] * len(array.shape)][dim]
    axes = " x ".join(spec) if isinstance(spec, tuple) else spec
    return f"{name} {array.shape[dim]}" + (f" / {axes} {shards}" if shards > 1 else "")


def _device_ids(ids: list[int]) -> str:
    if len(ids) > 2 and ids[-1] - ids[0] == len(ids) - 1:
        return f"{ids[0]}-{ids[-1]}"
    return " ".join(map(str, ids[:2])) + (f" +{len(ids) - 2}" if len(ids) > 2 else "")
