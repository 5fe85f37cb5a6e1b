"""Networks that a mesh axis crosses, and the time of collectives on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from spmd.core.fields import check, closest
from spmd.hardware.chips import Links
from spmd.hardware.targets import Target
from spmd.parallel.mesh import AXES

# Fraction of the nominal bandwidth that a large collective reaches on a switch or a scale-out network:
# nccl-tests on eight H100 reach 360 to 370 of 450 GB/s. The bandwidth of TPU links is the measured one.
SHARE = 0.8
# Seconds of a hop. ICI: scaling-book, chapter 3. The others: the order of magnitude that nccl-tests shows for
# small messages; they matter for small arrays only.
HOP = {"ICI": 1e-6, "NVLink": 2e-6, "DCN": 20e-6, "scale-out": 10e-6}


class Network(NamedTuple):
    """A network between devices. bandwidth: bytes/s that a device sends, as a program can use them. hop:
    seconds of a small message to another device.
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
        "NVIDIA H100 data sheet: 900 GB/s, both directions together",
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
    """A dim of a torus: its size, and the bytes/s that a device sends along it and over one of its links."""

    size: int
    bandwidth: float
    link: float


class Level(NamedTuple):
    """A network that an axis crosses. size: groups of devices that it joins. bandwidth: bytes/s that each
    device sends. dims: dims of a torus that the axis spans.
    """

    network: str
    size: int
    bandwidth: float
    dims: tuple[Dim, ...] = ()

    @property
    def link(self) -> float:
        """Bytes/s to one other device."""
        return min((dim.link for dim in self.dims), default=self.bandwidth)


Levels = Mapping[str, tuple[Level, ...]]  # mesh axis -> networks that it crosses, the fastest first


def levels(target: Target, sizes: Mapping[str, int], slices: int = 1) -> Levels:
    """Networks that each axis larger than 1 crosses. ValueError if the mesh does not fit the slice, or the
    links of the chip are not known.
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


def by_name(text: str, sizes: Mapping[str, int]) -> Levels:
    """The network of each axis larger than 1, from names of NETWORKS: `10gbe` for all of them, or
    `replica=wan,data=nvlink`. ValueError for an unknown name, or an axis without a network.
    """
    names = ", ".join(NETWORKS)
    used = [axis for axis in AXES if sizes.get(axis, 1) > 1]
    chosen: dict[str, Network] = {}
    for part in sorted(
        text.split(","), key=lambda part: "=" in part
    ):  # a default for all axes first
        axis, _, name = part.strip().rpartition("=")
        check(
            name in NETWORKS,
            f"unknown network {name!r}.{closest(name, NETWORKS)} Known: {names}; give one for all axes,"
            " or one per axis: replica=wan,data=nvlink",
        )
        check(
            not axis or axis in AXES,
            f"network {text!r}: {axis!r} is no mesh axis.{closest(axis, AXES)} Axes: {', '.join(AXES)}",
        )
        chosen |= dict.fromkeys([axis] if axis else used, NETWORKS[name])
    missing = [axis for axis in used if axis not in chosen]
    check(
        not missing,
        f"network {text!r} has no entry for {', '.join(f'mesh.{axis}={sizes[axis]}' for axis in missing)};"
        f" add {missing[0] if missing else ''}=NAME, a name of {names}",
    )
    return {axis: (Level(chosen[axis].name, sizes[axis], chosen[axis].bandwidth),) for axis in used}


def seconds(crossed: Sequence[Level], kind: str, bytes: float) -> float:
    """Seconds of a collective over axes that cross the networks `crossed` (see `join`).

    bytes: of the complete array, as in hlo.Collective: gathered, or before the reduction. The model is ring
    algorithms, one network after the other: the slower network carries the share of one device of the faster
    one, 1 / size of the array.
    """
    if kind == "collective-permute":  # to another device: the slowest link decides
        return max((bytes / level.link + HOP[level.network] for level in crossed), default=0.0)
    if kind == "all-to-all":
        return _all_to_all(crossed, bytes)
    total = 0.0
    for level in crossed:
        wire = (level.size - 1) / level.size * bytes / level.bandwidth
        hops = level.size / 2 if level.network == "ICI" else math.log2(level.size)
        total += PASSES[kind] * (wire + hops * HOP[level.network])
        bytes /= level.size
    return total


def _all_to_all(crossed: Sequence[Level], bytes: float) -> float:
    """Seconds in which each device sends a part of `bytes` to every other. In a ring of n devices a part
    takes n / 4 hops on average, and devices forward what is not for them; the busiest link of a line carries
    as much. All dims of a torus work at once. A device sends to a switch all that is not for itself, and to a
    slower network all that is not for its own switch.
    """
    total = 0.0
    for level in crossed:
        wire = (level.size - 1) / level.size * bytes / level.bandwidth
        if level.dims:
            wire = max(dim.size / 4 * bytes / dim.bandwidth for dim in level.dims)
        total += wire + (level.size - 1) * HOP[level.network]
    return total


def join(levels: Levels, axes: Sequence[str]) -> list[Level]:
    """Networks that a collective over all of `axes` crosses, the fastest first. The dims of a torus add their
    bandwidths; a switch gives each device the same bandwidth, however many others it talks to.
    """
    joined: dict[str, Level] = {}
    for level in (level for axis in axes for level in levels.get(axis, ())):
        before = joined.get(level.network)
        if before is None:
            joined[level.network] = level
            continue
        adds = level.bandwidth if level.network == "ICI" else 0.0
        joined[level.network] = Level(
            level.network,
            before.size * level.size,
            before.bandwidth + adds,
            before.dims + level.dims,
        )
    return sorted(joined.values(), key=lambda level: -level.bandwidth)


# ---- TPU slices


def _torus(target: Target, links: Links, sizes: Mapping[str, int], slices: int) -> Levels:
    within_slice, levels = dict(sizes), {}
    if slices > 1:
        crossing = next((axis for axis in AXES if sizes.get(axis, 1) % slices == 0), None)
        check(
            crossing is not None,
            f"no mesh axis is a multiple of the {slices} slices; set --mesh.replica {slices}",
        )
        assert crossing
        within_slice[crossing] //= slices
        levels[crossing] = (Level("DCN", slices, links.scale_out * SHARE),)
    for axis, indices in assign(target, within_slice).items():
        dims = tuple(_dim(target, links, index) for index in indices)
        ici = Level("ICI", within_slice[axis], sum(dim.bandwidth for dim in dims), dims)
        levels[axis] = (ici, *levels.get(axis, ()))
    return levels


def assign(target: Target, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Mesh axis -> dims of the slice whose sizes multiply to its size, as jax.make_mesh assigns them:
    innermost axis first, to as many dims as possible. ValueError if there are none.
    """
    shape = _shape(target)
    free = list(range(len(shape)))
    assigned: dict[str, list[int]] = {}
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
        assigned[axis] = list(chosen)
        free = [dim for dim in free if dim not in chosen]
    return assigned


def _shape(target: Target) -> list[int]:
    """Shape of the slice in devices: its dims in chips, and the devices of a chip if several."""
    per_chip = target.num_devices // math.prod(target.topology)
    return [*target.topology, *([per_chip] if per_chip > 1 else [])]


def _products(sizes: Sequence[int]) -> list[int]:
    return sorted(
        {math.prod(c) for num in range(1, len(sizes) + 1) for c in combinations(sizes, num)}
    )


def _dim(target: Target, links: Links, dim: int) -> Dim:
    """A dim of the slice. Along a ring a device sends over two links, along a line over one, since the ends
    of a line have no other. The devices of a chip share all its links.
    """
    if dim == len(target.topology):
        within = links.link * 2 * links.axes
        return Dim(target.num_devices // math.prod(target.topology), within, within)
    sizes = target.topology if links.axes > 2 else target.topology[dim : dim + 1]
    directions = 2 if all(size % links.ring == 0 for size in sizes) else 1
    return Dim(target.topology[dim], links.link * directions, links.link)


# ---- GPUs


def _switch(links: Links, sizes: Mapping[str, int]) -> Levels:
    """Networks of a GPU mesh. Devices are numbered in row-major order: inner axes stay on one switch as long
    as they fit.
    """
    levels: dict[str, tuple[Level, ...]] = {}
    stride = 1
    for axis in reversed([axis for axis in AXES if sizes.get(axis, 1) > 1]):
        size = sizes[axis]
        near = math.gcd(size, max(links.pod // stride, 1))
        parts = []
        if near > 1:
            parts.append(Level("NVLink", near, links.link * SHARE))
        if size > near:
            parts.append(Level("scale-out", size // near, links.scale_out * SHARE))
        levels[axis] = tuple(parts)
        stride *= size
    return levels
