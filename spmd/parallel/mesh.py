"""Mesh sizes from the command line to a jax Mesh, on real, simulated or ahead-of-time devices."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spmd.core.fields import check

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Mesh

# Outermost first: `replica` crosses the slow network, `tensor` needs the fastest links.
AXES = ("replica", "data", "fsdp", "stage", "context", "expert", "tensor")
BATCH_AXES = ("replica", "data", "fsdp", "expert")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes. One may be -1: the devices that remain. All default: all data parallel."""

    replica: int = 1
    """Copies over the slow network (slices, pods, clouds)."""
    data: int = -1
    """Data parallel: batch sharded, parameters replicated."""
    fsdp: int = 1
    """Batch, parameters and optimizer state sharded (FSDP, ZeRO)."""
    stage: int = 1
    """Pipeline stages."""
    context: int = 1
    """Sequences sharded along time (context parallel)."""
    expert: int = 1
    """Experts sharded (expert parallel)."""
    tensor: int = 1
    """Matrices sharded (tensor parallel)."""

    def __post_init__(self) -> None:
        for axis, size in self.sizes().items():
            check(
                size >= 1 or size == -1,
                f"mesh.{axis}={size} must be at least 1, or -1 for the rest",
            )
        unresolved = [axis for axis, size in self.sizes().items() if size == -1]
        check(
            len(unresolved) <= 1,
            f"only one mesh axis may be -1, given: {', '.join(unresolved)}"
            f" (mesh.data is -1 by default: give it a size too)",
        )

    def sizes(self) -> dict[str, int]:
        """`{axis: size}`, -1 unresolved."""
        return {axis: getattr(self, axis) for axis in AXES}

    def resolve(self, num_devices: int) -> dict[str, int]:
        """`{axis: size}` whose product is num_devices; ValueError when there is none."""
        sizes = self.sizes()
        fixed = math.prod(size for size in sizes.values() if size != -1)
        product = (
            " * ".join(f"{a}={s}" for a, s in sizes.items() if s not in (1, -1)) or "all axes 1"
        )
        unresolved = next((axis for axis, size in sizes.items() if size == -1), None)
        check(
            num_devices % fixed == 0 and (unresolved is not None or fixed == num_devices),
            f"mesh sizes ({product}) multiply to {fixed}, but there are {num_devices} devices; "
            + (
                f"use a product that divides {num_devices}"
                if unresolved
                else f"set one axis to -1, or use sizes that multiply to {num_devices}"
            )
            + f" ({_divisors_text(num_devices)})",
        )
        return sizes | ({unresolved: num_devices // fixed} if unresolved else {})


def _divisors_text(n: int) -> str:
    return "divisors: " + ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def make(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A Mesh with every axis of AXES (size 1 included, so that rules never change with the mesh)."""
    import jax
    from jax.sharding import AxisType

    devices = jax.devices() if devices is None else list(devices)
    sizes = config.resolve(len(devices))
    types = (AxisType.Auto,) * len(AXES)
    if num_slices(devices) > 1:
        return jax.sharding.Mesh(across_slices(devices, sizes), AXES, axis_types=types)
    try:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
    except NotImplementedError as error:  # of a TPU slice whose axes are not to be split
        requested = " ".join(f"{a}={s}" for a, s in sizes.items() if s > 1)
        axes = [len({device.coords[i] for device in devices}) for i in range(3)]
        axes.append(len(devices) // math.prod(axes))  # devices of a chip
        products = {math.prod(a for i, a in enumerate(axes) if n >> i & 1) for n in range(16)}
        raise ValueError(
            f"mesh ({requested}) does not fit this TPU slice of {' x '.join(map(str, axes[:3]))} chips:"
            " each mesh axis must be a product of some of its physical axes, each of these used once;"
            f" possible sizes: {', '.join(map(str, sorted(products)))}"
        ) from error


def num_slices(devices: Sequence[Any]) -> int:
    """How many TPU slices, joined by the data-center network only, the devices belong to."""
    return len({getattr(device, "slice_index", 0) or 0 for device in devices})


def across_slices(devices: Sequence[Any], sizes: dict[str, int]) -> np.ndarray:
    """Devices in mesh order. Only one axis crosses the network between slices: the first whose size the
    number of slices divides, so `replica` where it is used. ValueError when there is none.
    """
    from jax.experimental import mesh_utils

    num = num_slices(devices)
    crossing = next((axis for axis, size in sizes.items() if size % num == 0), None)
    requested = " ".join(f"{a}={s}" for a, s in sizes.items() if s > 1)
    if crossing is None:
        raise ValueError(
            f"the devices are {num} slices, and one mesh axis must cross between them: no size in"
            f" ({requested}) is a multiple of {num}; set --mesh.replica {num}"
        )
    inside = [size // num if axis == crossing else size for axis, size in sizes.items()]
    across = [num if axis == crossing else 1 for axis in sizes]
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices)


def batch_shards(mesh: Mesh) -> int:
    """Number of shards of the batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def describe(mesh: Mesh) -> str:
    """`data=4 fsdp=2`: the axes larger than 1."""
    return " ".join(f"{a}={s}" for a, s in mesh.shape.items() if s > 1) or "one device"


def reserve_threads(num_devices: int) -> None:
    """Give the CPU client's thread pools room for every collective that may wait at a time.

    A collective of CPU devices blocks its thread until all participants arrive. XLA makes one thread for each
    device, but a device runs independent collectives, and steps in flight, side by side. When all threads
    wait, the missing participant finds no thread, and XLA aborts after 40 s ("rendezvous ... may be stuck").
    NPROC is the variable from which XLA reads the size of its pools; the last bits of a sum may depend on
    it, so a single device keeps XLA's own. Must come before the backend starts.
    """
    wanted = max(16, 4 * num_devices)
    given = os.environ.get("NPROC", "")
    if (int(given) if given.isdigit() else _usable_cores()) < wanted:
        os.environ["NPROC"] = str(wanted)


def _usable_cores() -> int:
    """Cores of this process: XLA's own number of threads, which is never lowered."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def simulate(num_devices: int) -> None:
    """Gives this process `num_devices` simulated CPU devices; must come before the backend starts."""
    import jax

    check(num_devices >= 1, f"simulate={num_devices} must be at least 1")
    if num_devices > 1:
        reserve_threads(num_devices)
    try:
        jax.config.update("jax_platforms", "cpu")
        config: Any = jax.config
        if config.jax_num_cpu_devices < num_devices:
            config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError:
        pass  # the backend has started: fine if it has as many devices, checked below
    devices = jax.local_devices()
    check(
        len(devices) >= num_devices and devices[0].platform == "cpu",
        f"simulate={num_devices} came after jax had started with {len(devices)} "
        f"{devices[0].platform} device(s); restart Python, or set it before jax is used",
    )
