"""Meshes over slices: one axis crosses the slow network, the others stay within a slice."""

from __future__ import annotations

import types

import pytest

from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig


def slices(num, each):
    return [
        types.SimpleNamespace(
            id=i, process_index=i // 4, slice_index=i // each, platform="cpu", device_kind="x"
        )
        for i in range(num * each)
    ]


def crossing(config, num=2, each=8):
    """The axes along which the slice changes."""
    devices = slices(num, each)
    array = mesh.across_slices(devices, config.resolve(len(devices)))
    assert sorted(d.id for d in array.flat) == list(range(len(devices)))
    names = set()
    for dim, axis in enumerate(mesh.AXES):
        ends = [array.take(i, dim).flat[0].slice_index for i in range(array.shape[dim])]
        if len(set(ends)) > 1:
            names.add(axis)
    return names


def test_replica_crosses_slices_where_it_is_used():
    assert crossing(MeshConfig(replica=2, fsdp=4, data=2)) == {"replica"}
    assert crossing(MeshConfig(replica=4, fsdp=4, data=1)) == {"replica"}
    assert crossing(MeshConfig(data=-1)) == {"data"}
    assert crossing(MeshConfig(data=1, fsdp=-1)) == {"fsdp"}
    assert crossing(MeshConfig(replica=3, data=-1, tensor=2), num=3, each=4) == {"replica"}


def test_a_mesh_that_no_axis_can_cut_between_slices_is_refused():
    with pytest.raises(ValueError, match=r"are 3 slices.*\(data=2 fsdp=2\).*--mesh.replica 3"):
        mesh.across_slices(slices(3, 4), {"data": 2, "fsdp": 2})


def test_one_slice_is_no_hybrid(devices):
    assert mesh.num_slices(devices) == 1
    made = mesh.make(MeshConfig(replica=2, data=4), devices)
    assert [d.id for d in made.devices[0].flat] == [0, 1, 2, 3]
