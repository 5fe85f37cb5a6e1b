"""Which links a mesh axis crosses, and how long a collective takes on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from spmd.fields import check, closest
from spmd.hardware import Links
from spmd.mesh import AXES
from spmd.plan.targets import Target

# Of a nominal bandwidth, what a large collective gets on a switch or the slower network: nccl-tests on eight
# H100 reach 360 to 370 of 450 GB/s. The table has TPU links as a program gets them.
SHARE = 0.8
# Seconds of one hop. ICI: scaling-book, chapter 3. The others: of the order of what nccl-tests shows for
# small messages; they matter for small arrays only.
HOP = {"ICI": 1e-6, "NVLink": 2e-6, "DCN": 20e-6, "scale-out": 10e-6}


class Network(NamedTuple):
    """What may join devices, by name. bandwidth: bytes/s that one sends, as a program gets them; hop: seconds
    of a small message to another.
    """

    name: str
    bandwidth: float
    hop: float
    source: str


NETWORKS: dict[str, Network] = {
    "nvlink": Network(
        "NVLink",
        SHARE * 450e9,
        HOP["NVLink"],
        "NVIDIA H100 data sheet: 900 GB/s, both ways together",
    ),
    "ici": Network(
        "ICI", 2 * 90e9, HOP["ICI"], "scaling-book, chapter 2: the two links of a v5p ring"
    ),
    "infiniband": Network(
        "scale-out",
        SHARE * 400e9 / 8,
        HOP["scale-out"],
        "DGX H100: ConnectX-7, 400 Gb/s for each GPU",
    ),
    "10gbe": Network(
        "10 GbE",
        SHARE * 10e9 / 8,
        20e-6,
        "10 Gb/s: IEEE 802.3ae; 20 us between programs by TCP: Hurwitz and Feng, Hot Interconnects 11 (2003)",
    ),
    "wan": Network(
        "WAN",
        SHARE * 5e9 / 8,
        36e-3,
        "5 Gb/s: what EC2 grants to other regions (user guide, instance network bandwidth); 72 ms there and"
        " back across North America: Azure network latency statistics",
    ),
    "home": Network(
        "home",
        SHARE * 20e6 / 8,
        20e-3,
        "20 Mb/s up: the FCC's benchmark of 2024; 20 ms through two last miles, of the order of its"
        " Measuring Broadband America reports",
    ),
}
HOP |= {network.name: network.hop for network in NETWORKS.values()}
PASSES = {
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-reduce": 2,
    "collective-broadcast": 1,
}


class Dim(NamedTuple):
    """Of a torus: its size, what a device sends along it, and over one of its links, in bytes/s."""

    size: int
    bandwidth: float
    link: float


class Level(NamedTuple):
    """One network that an axis crosses: `ways` groups of devices, each device sending bandwidth bytes/s.
    dims: of a torus, those that it lies on.
    """

    network: str
    ways: int
    bandwidth: float
    dims: tuple[Dim, ...] = ()

    @property
    def link(self) -> float:
        """Bytes/s to one other device."""
        return min((dim.link for dim in self.dims), default=self.bandwidth)


Levels = Mapping[str, tuple[Level, ...]]  # mesh axis -> what it crosses, the fastest first


def levels(target: Target, sizes: Mapping[str, int], slices: int = 1) -> Levels:
    """What each axis larger than 1 crosses. ValueError when the mesh does not fit the slice, or when the
    chip's links are not known.
    """
    links = target.chip.links if target.chip else None
    if links is None:
        check(
            math.prod(sizes.values()) == 1,
            f"the links between devices of {target.name} are not known: plan for one of them, or for a"
            " target with links (v4, v5e, v5p, v6e, 7x, a100, h100, h200, b200, gb200)",
        )
        return {}
    return _torus(target, links, sizes, slices) if links.axes else _switch(links, sizes)


def named(text: str, sizes: Mapping[str, int]) -> Levels:
    """What each axis larger than 1 crosses, by the names of NETWORKS: `10gbe` for all of them, or
    `replica=wan,data=nvlink`. ValueError says which are known, and which axis has none.
    """
    known = ", ".join(NETWORKS)
    wide = [axis for axis in AXES if sizes.get(axis, 1) > 1]
    chosen: dict[str, Network] = {}
    for part in sorted(text.split(","), key=lambda part: "=" in part):  # one for all axes first
        axis, _, name = part.strip().rpartition("=")
        check(
            name in NETWORKS,
            f"unknown network {name!r}.{closest(name, NETWORKS)} Known: {known}; one for all axes,"
            " or one for each: replica=wan,data=nvlink",
        )
        check(
            not axis or axis in AXES,
            f"network {text!r}: {axis!r} is no mesh axis.{closest(axis, AXES)} Axes: {', '.join(AXES)}",
        )
        chosen |= dict.fromkeys([axis] if axis else wide, NETWORKS[name])
    missing = [axis for axis in wide if axis not in chosen]
    check(
        not missing,
        f"network {text!r} says nothing of {', '.join(f'mesh.{axis}={sizes[axis]}' for axis in missing)};"
        f" add {missing[0] if missing else ''}=NAME, a name of {known}",
    )
    return {axis: (Level(chosen[axis].name, sizes[axis], chosen[axis].bandwidth),) for axis in wide}


def seconds(crossed: Sequence[Level], kind: str, bytes: float) -> float:
    """Time of one collective over axes that cross `crossed` (see `join`).

    bytes: of the whole array, as hlo.Collective counts them: gathered, or before the reduction. By rings,
    level after level: the slower network carries what one device of the faster one holds, its 1 / ways.
    """
    if kind == "collective-permute":  # to one other device: who has the slowest way decides
        return max((bytes / level.link + HOP[level.network] for level in crossed), default=0.0)
    if kind == "all-to-all":
        return _all_to_all(crossed, bytes)
    total = 0.0
    for level in crossed:
        wire = (level.ways - 1) / level.ways * bytes / level.bandwidth
        hops = level.ways / 2 if level.network == "ICI" else math.log2(level.ways)
        total += PASSES[kind] * (wire + hops * HOP[level.network])
        bytes /= level.ways
    return total


def _all_to_all(crossed: Sequence[Level], bytes: float) -> float:
    """A part of `bytes` to each device. In a ring of n a part takes n / 4 steps on the average, and a device
    passes on what is not for it; the busiest link of a line carries as much. All dims of a torus work at
    once. To a switch each device sends what is not for itself, to a slower network what is not for its own
    switch.
    """
    total = 0.0
    for level in crossed:
        wire = (level.ways - 1) / level.ways * bytes / level.bandwidth
        if level.dims:
            wire = max(dim.size / 4 * bytes / dim.bandwidth for dim in level.dims)
        total += wire + (level.ways - 1) * HOP[level.network]
    return total


def join(found: Levels, axes: Sequence[str]) -> list[Level]:
    """What a collective over all of `axes` crosses, the fastest first. The dims of a torus work side by side;
    a switch gives each device the same bandwidth, however many it talks to.
    """
    together: dict[str, Level] = {}
    for level in (level for axis in axes for level in found.get(axis, ())):
        before = together.get(level.network)
        if before is None:
            together[level.network] = level
            continue
        adds = level.bandwidth if level.network == "ICI" else 0.0
        together[level.network] = Level(
            level.network,
            before.ways * level.ways,
            before.bandwidth + adds,
            before.dims + level.dims,
        )
    return sorted(together.values(), key=lambda level: -level.bandwidth)


# ---- TPU slices


def _torus(target: Target, links: Links, sizes: Mapping[str, int], slices: int) -> Levels:
    inside, found = dict(sizes), {}
    if slices > 1:
        crossing = next((axis for axis in AXES if sizes.get(axis, 1) % slices == 0), None)
        check(
            crossing is not None,
            f"no mesh axis is a multiple of the {slices} slices; set --mesh.replica {slices}",
        )
        assert crossing
        inside[crossing] //= slices
        found[crossing] = (Level("DCN", slices, links.scale_out * SHARE),)
    for axis, dims in assign(target, inside).items():
        lies = tuple(_of_dim(target, links, dim) for dim in dims)
        ici = Level("ICI", inside[axis], sum(dim.bandwidth for dim in lies), lies)
        found[axis] = (ici, *found.get(axis, ()))
    return found


def assign(target: Target, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Mesh axis -> dims of the slice whose product it is, as jax.make_mesh chooses them: innermost axis
    first, over as many dims as possible. ValueError where there are none.
    """
    shape = _shape(target)
    free = list(range(len(shape)))
    found: dict[str, list[int]] = {}
    for axis in reversed([axis for axis in AXES if sizes.get(axis, 1) > 1]):
        choices = (dims for num in range(len(free), 0, -1) for dims in combinations(free, num))
        fits = (dims for dims in choices if math.prod(shape[d] for d in dims) == sizes[axis])
        chosen = next(fits, None)
        check(
            chosen is not None,
            f"mesh.{axis}={sizes[axis]} is not a product of the dims of {target.name} that are left"
            f" ({' x '.join(str(shape[d]) for d in free)}); use one of"
            f" {', '.join(map(str, _products([shape[d] for d in free])))}",
        )
        assert chosen
        found[axis] = list(chosen)
        free = [dim for dim in free if dim not in chosen]
    return found


def _shape(target: Target) -> list[int]:
    """The slice in devices: its dims in chips, and the devices of a chip."""
    per_chip = target.num_devices // math.prod(target.topology)
    return [*target.topology, *([per_chip] if per_chip > 1 else [])]


def _products(sizes: Sequence[int]) -> list[int]:
    return sorted(
        {math.prod(c) for num in range(1, len(sizes) + 1) for c in combinations(sizes, num)}
    )


def _of_dim(target: Target, links: Links, dim: int) -> Dim:
    """A device sends along a dim of the slice over two links of a ring, one of a line, whose ends have no
    more. The devices of one chip share all its links.
    """
    if dim == len(target.topology):
        within = links.link * 2 * links.axes
        return Dim(target.num_devices // math.prod(target.topology), within, within)
    closed = target.topology if links.axes > 2 else target.topology[dim : dim + 1]
    ways = 2 if all(size % links.ring == 0 for size in closed) else 1
    return Dim(target.topology[dim], links.link * ways, links.link)


# ---- GPUs


def _switch(links: Links, sizes: Mapping[str, int]) -> Levels:
    """Devices are numbered row by row over the mesh: inner axes stay on one switch as long as they fit."""
    found: dict[str, tuple[Level, ...]] = {}
    stride = 1
    for axis in reversed([axis for axis in AXES if sizes.get(axis, 1) > 1]):
        size = sizes[axis]
        near = math.gcd(size, max(links.pod // stride, 1))
        parts = []
        if near > 1:
            parts.append(Level("NVLink", near, links.link * SHARE))
        if size > near:
            parts.append(Level("scale-out", size // near, links.scale_out * SHARE))
        found[axis] = tuple(parts)
        stride *= size
    return found
