"""Meshes over slices: one axis crosses the slow network, the others stay within a slice."""

from __future__ import annotations

import os
import types

import pytest

from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig
from tests.command import REPOSITORY, start


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


@pytest.mark.parametrize(
    "given, cores, kept", [("", 2, "32"), ("", 64, ""), ("1", 64, "32"), ("48", 2, "48")]
)
def test_threads_are_added_and_never_taken_away(given, cores, kept, monkeypatch):
    monkeypatch.setattr(mesh, "_usable_cores", lambda: cores)
    monkeypatch.setenv("NPROC", given)
    mesh.reserve_threads(8)
    assert os.environ["NPROC"] == kept


IN_FLIGHT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from spmd.parallel import mesh
mesh.simulate(2)
cut = mesh.make(mesh.MeshConfig(), jax.devices())
x = jax.device_put(np.arange(256.0).reshape(128, 2), jax.NamedSharding(cut, jax.P("data")))

@jax.jit
def step(total, x):
    for scale in (1.0, 2.0, 3.0):  # sums that a device may take side by side
        total = total + jnp.sum(jnp.tanh(scale * x) @ jnp.ones((2, 64)))
    return total

total = jnp.zeros(())
for _ in range(1500):
    total = step(total, x)
x = np.asarray(x)
want = 1500 * 64 * sum(np.tanh(scale * x).sum() for scale in (1.0, 2.0, 3.0))
np.testing.assert_allclose(float(total), want, rtol=1e-3)
print("summed")
"""


@pytest.mark.gate
def test_many_collectives_in_flight_on_simulated_devices(tmp_path):
    """With a thread for each device, XLA's default, this program waits for itself and is aborted."""
    script = tmp_path / "in_flight.py"
    script.write_text(IN_FLIGHT)
    process = start(
        cwd=REPOSITORY, script=script, env={"PYTHONPATH": str(REPOSITORY), "NPROC": "1"}
    )
    stdout, stderr = process.communicate(timeout=180)
    assert (process.returncode, stdout) == (0, "summed\n"), stderr[-2000:]
