"""Checkpoints of sparse tables: damaged rows are named, on any number of devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import digest
from spmd.parallel.tables import STRIPES, Placement
from spmd.train import CheckpointConfig
from spmd.train.checkpoint import stripes
from spmd.train.checkpoint.store import Checkpoints

PLACEMENT = Placement(5000, 16)
BINS = Placement(5000, 16, bins=4)


def state(
    num: int, spoiled: tuple[int, ...] = (), stack: str = "dim16", placement: Placement = PLACEMENT
) -> dict:
    """A state on so many devices, with other numbers in the rows of some ids."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((num,), ("data",), axis_types=auto, devices=jax.devices()[:num])
    rng = np.random.default_rng(0)
    arrays = {
        "rows": rng.normal(size=placement.shape).astype(np.float32),
        "sum": rng.random(placement.rows).astype(np.float32),
    }
    arrays["rows"].reshape(-1, placement.dim)[[placement.place(i) for i in spoiled], 3] += 1e-3
    placed = NamedSharding(mesh, P("data"))
    held = {name: jax.device_put(x, placed) for name, x in arrays.items()}
    params = jax.device_put({"w": np.ones(3, np.float32)}, NamedSharding(mesh, P()))
    return {"params": params, "tables": {stack: held}}


def test_runs_add_up_to_the_array_on_every_number_of_devices(devices):
    wanted = None
    for num in (1, 2, 8):
        runs = np.zeros(0)
        for x in state(num)["tables"]["dim16"].values():
            runs = np.asarray(digest.compute_runs(x, STRIPES))
            total = np.asarray(digest.compute({"x": x}))[0]
            np.testing.assert_array_equal(runs.sum(0, dtype=np.uint32), total)
        wanted = runs if wanted is None else wanted
        np.testing.assert_array_equal(runs, wanted)


@pytest.mark.parametrize(
    ("num", "stack", "placement"), [(1, "dim16", PLACEMENT), (4, "dim16_bins4", BINS)]
)
def test_damaged_rows_are_named_by_stripe_and_id(
    num, stack, placement, devices, tmp_path, monkeypatch
):
    """Flipped after the digests were taken, as by a faulty memory: the file's own checks see nothing."""
    ids = (7, 4321)
    whole, spoiled = state(4, (), stack, placement), state(4, ids, stack, placement)
    saved, kept = stripes.compute, digest.compute
    checkpoints = Checkpoints(epath.Path(tmp_path) / "checkpoints", CheckpointConfig())
    flat = {"params.w": whole["params"]["w"]}
    flat |= {f"tables.{stack}.{name}": x for name, x in whole["tables"][stack].items()}
    with monkeypatch.context() as patch:
        patch.setattr(stripes, "compute", lambda _: saved(flat))
        patch.setattr(digest, "compute", lambda _: kept(flat))
        checkpoints.save(spoiled, 3, {}, {})
        checkpoints.wait()
    like = state(num, (), stack, placement)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    placed = jax.tree.map(lambda x: x.sharding, like)
    with pytest.raises(ValueError, match=rf"tables\.{stack}\.rows in stripes") as caught:
        checkpoints.restore(shapes, placed, 3)
    checkpoints.close()
    length = placement.rows // STRIPES
    for id_ in ids:
        stripe = int(placement.place(id_)) // length
        assert f"{stripe} (ids " in str(caught.value)
        assert stripe * length <= placement.place(id_) < (stripe + 1) * length
    assert f"{stack}.sum" not in str(caught.value)
