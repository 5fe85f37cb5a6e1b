"""Run by test_collectives.py in each of its processes: what comes over the wire, against numpy."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import tree
from spmd.data import loader
from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig
from spmd.runtime import RuntimeConfig, agree
from spmd.runtime.join import join


def on(cut, spec, value):
    """A global array of which every process knows the whole."""
    return jax.make_array_from_callback(value.shape, NamedSharding(cut, spec), lambda i: value[i])


def check(cut, function, inputs, out_spec, want):
    """`function` of per-device blocks along data, held to `want`, shard by shard."""
    mapped = jax.shard_map(
        function, mesh=cut, in_specs=P("data"), out_specs=out_spec, check_vma=False
    )  # gathers and rings are typed varying; the oracle is the check
    got = jax.jit(mapped)(on(cut, P("data"), inputs))
    for shard in got.addressable_shards:
        np.testing.assert_allclose(np.asarray(shard.data), want[shard.index], rtol=1e-6)


def main() -> None:
    join(RuntimeConfig(), {})
    mesh.simulate(2)
    index, num = agree.process()
    cut = mesh.make(MeshConfig())
    n = cut.size
    assert n == 2 * num
    x = np.random.default_rng(0).normal(size=(n * n, 3)).astype(np.float32)
    blocks = np.split(x, n)
    total = np.sum(blocks, axis=0)
    check(cut, lambda x: jax.lax.psum(x, "data"), x, P(), total)
    check(cut, lambda x: jax.lax.all_gather(x, "data", tiled=True), x, P(), x)
    scatter = lambda x: jax.lax.psum_scatter(x, "data", tiled=True)
    check(cut, scatter, x, P("data"), total)
    ring = [(i, (i + 1) % n) for i in range(n)]
    check(cut, lambda x: jax.lax.ppermute(x, "data", ring), x, P("data"), np.roll(x, n, 0))
    swapped = np.concatenate([np.concatenate([b[i : i + 1] for b in blocks]) for i in range(n)])
    swap = lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True)
    check(cut, swap, x, P("data"), swapped)
    print("collectives: as numpy says", flush=True)

    # ---- replica over processes: each replica is one process's devices
    hybrid = mesh.make(MeshConfig(replica=num, data=-1))
    owners = [{d.process_index for d in hybrid.devices[r].flat} for r in range(num)]
    assert owners == [{i} for i in range(num)], owners
    print("replica: over processes", flush=True)

    # ---- each process loads its own rows, whatever the mesh
    batch = {"x": np.arange(8 * n).reshape(2 * n, 4), "weight": np.arange(2 * n)}
    for config in (MeshConfig(), MeshConfig(data=num, tensor=2), MeshConfig(data=2, tensor=num)):
        placed = NamedSharding(mesh.make(config), P(mesh.BATCH_AXES))
        rows = loader.process_rows(placed, 2 * n)
        put = loader.put({k: v[rows] for k, v in batch.items()}, placed, 2 * n)
        for name, array in put.items():
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), batch[name][shard.index])
    print("rows: each in its place", flush=True)

    # ---- agreement
    assert agree.gather(index * 10, "test") == [10 * i for i in range(num)]
    assert agree.from_first(lambda: tree.human_bytes(1024), "test") == "1.0 KiB"
    with pytest.raises(ValueError, match="mine") as error:
        agree.from_first(lambda: (_ for _ in ()).throw(ValueError("mine")), "test")
    assert (error.type is agree.FirstProcessMistake) == (index > 0)
    print("agreement: reached", flush=True)


if __name__ == "__main__":
    main()
