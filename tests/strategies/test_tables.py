"""Sparse tables on every mesh and strategy, against the dense gradients of one device."""

from __future__ import annotations

import dataclasses
import functools
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spmd import optim
from spmd.core import tree
from spmd.models.layers.linear import Dense
from spmd.optim import RowWise
from spmd.parallel import mesh, tables
from spmd.parallel.mesh import MeshConfig
from spmd.parallel.tables import Lookup, Placement, SparseTable, stack
from spmd.strategies import AllReduce, Auto, Server, base
from spmd.tasks import Task
from tests.marks import slow_but

STEPS, BATCH, USERS, ITEMS = 3, 16, 300, 500


class Ratings(nnx.Module):
    """A rating from a user, a weighted bag of items, three items by themselves, and a hashed word."""

    tables = MappingProxyType(
        {
            "users": SparseTable(ids=USERS, dim=4, lookups=(Lookup(feature="user"),)),
            "items": SparseTable(
                ids=ITEMS,
                dim=4,
                lookups=(
                    Lookup(feature="bag", pool="mean", weights="times"),
                    Lookup(feature="list", pool="none"),
                ),
                scale=0.1,
            ),
            "words": SparseTable(ids=70, dim=8, lookups=(Lookup(feature="word"),), hashed=True),
        }
    )

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = Dense(rngs, (20, 8), ("input", "mlp"))
        self.last = Dense(rngs, (8, 1), ("mlp", "classes"))

    def __call__(self, user, bag, items, word):
        rows = jnp.concatenate([user * bag, bag, items.sum(1), word], axis=1)
        return self.last(jnp.tanh(self.first(rows)))[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rated(Task):
    def inputs(self, batch):
        return tuple(batch[f"rows/{name}"] for name in ("user", "bag", "list", "word"))

    def values(self, outputs, batch, *, train):
        return {"loss": jnp.square(outputs - batch["rating"])}


def batch_of(draw: Any) -> dict[str, np.ndarray]:
    """A batch whose ids are draw(number of ids, shape)."""
    rng = np.random.default_rng(0)
    weight = np.ones(BATCH)
    weight[[2, 9, 10]] = [0, 0.25, 0]
    return {
        "user": draw(USERS, (BATCH,)),
        "bag": draw(ITEMS, (BATCH, 5)),
        "times": rng.uniform(0.1, 2, (BATCH, 5)),
        "list": draw(ITEMS, (BATCH, 3)),
        "word": draw(2**31 - 1, (BATCH, 2)),
        "rating": rng.normal(size=BATCH),
        "example_id": np.arange(BATCH, dtype=np.int32),
        "weight": weight,
    }


def adversary(kind: str, seed: int, ids: int, shape: tuple[int, ...]) -> np.ndarray:
    """Ids as an adversary would choose them; -1 is none."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, ids, shape)
    if kind == "one id":
        drawn = np.full(shape, 7)
    elif kind == "one owner":  # of eight: all in a few stripes
        near = np.arange(min(ids, 500))
        near = near[Placement(800, 4).place(near) < Placement(800, 4).rows // 8]
        drawn = rng.choice(near, shape)
    elif kind == "zipf":
        drawn = np.minimum(rng.zipf(1.2, shape) - 1, ids - 1)
    elif kind == "holes":
        drawn[rng.random(shape) < 0.4] = -1
        drawn[::3] = -1
    elif kind == "nothing":
        drawn = np.full(shape, -1)
    return drawn.astype(np.int32)


KINDS = ("uniform", "one id", "one owner", "zipf", "holes", "nothing")


def parts_of(layout: Any, rows: RowWise, **changes: Any) -> base.Parts:
    _, config, num, accumulate = layout
    task = Rated().build(Ratings, "float64")
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    sgd = optim.SGD(learning_rate=0.3, warmup_steps=1, momentum=0)
    batch = batch_of(lambda ids, shape: np.zeros(shape, np.int32))
    return base.Parts(
        task=task,
        tx=sgd.transformation(STEPS, optim.decay_mask(params, task.dims), task.dims),
        rate=sgd.rate(STEPS),
        mesh=mesh.make(config, jax.devices()[:num]),
        batch=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch),
        accumulate=accumulate,
        rows=rows,
    )._replace(**changes)


ONE = (Auto(), MeshConfig(), 1, 1)


def dense_tables(arrays: Any) -> dict[str, np.ndarray]:
    """Each table by its ids, [ids, D], and the state of its optimizer, by numpy."""
    result = {}
    for stacked in stack(Ratings.tables):
        p = stacked.placement
        for name, offset in stacked.offsets.items():
            place = p.place(offset + np.arange(Ratings.tables[name].ids))
            for slot, x in arrays[stacked.name].items():
                by_row = np.asarray(x).reshape(p.rows, *(() if x.ndim == 1 else (p.dim,)))
                result[f"{name}/{slot}"] = by_row[place]
    return result


def oracle(parts: base.Parts, state: Any, batches: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Parameters and tables after some steps, by jnp.take and the gradients of complete tables."""
    task, rows = parts.task, parts.rows
    params, held = state.params, {k: jnp.asarray(v) for k, v in dense_tables(state.tables).items()}

    def looked_up(values, batch):
        found = {}
        for name, table in Ratings.tables.items():
            for lookup in table.lookups:
                ids = batch[lookup.feature].reshape(BATCH, -1)
                if table.hashed:
                    ids = tables.hash_ids(jnp.asarray(ids), table.ids)
                weights = batch[lookup.weights] if lookup.weights else np.ones(ids.shape)
                factor = jnp.where(ids >= 0, weights, 0)
                each = jnp.take(values[name], jnp.maximum(ids, 0), axis=0) * factor[..., None]
                if lookup.pool == "mean":
                    each = each / jnp.maximum(factor.sum(1), 1e-30)[:, None, None]
                found[f"rows/{lookup.feature}"] = each if lookup.pool == "none" else each.sum(1)
        return found

    def loss(params, values, batch, key, scale):
        return task.loss(params, {}, {**batch, **looked_up(values, batch)}, key, scale)[0]

    for step, batch in enumerate(batches):
        scale = task.scale(task.weigh(batch))
        values = {name: held[f"{name}/rows"] for name in Ratings.tables}
        named = {name: np.zeros(len(x), bool) for name, x in values.items()}
        for name, table in Ratings.tables.items():
            for lookup in table.lookups:
                ids = batch[lookup.feature].ravel()
                ids = (
                    np.asarray(tables.hash_ids(jnp.asarray(ids), table.ids))
                    if table.hashed
                    else ids
                )
                named[name][ids[ids >= 0]] = True
        grads, row_grads = jax.grad(loss, (0, 1))(params, values, batch, jax.random.key(0), scale)
        rate = parts.rate(jnp.int32(step))
        for name, old in values.items():
            slots = {k.split("/")[1]: x for k, x in held.items() if k.startswith(f"{name}/")}
            del slots["rows"]
            new, slots = rows.update(old, slots, row_grads[name], rate, jnp.int32(step))
            for slot, x in {"rows": new, **slots}.items():
                keep = named[name].reshape(-1, *(1,) * (x.ndim - 1))
                held[f"{name}/{slot}"] = jnp.where(keep, x, held[f"{name}/{slot}"])
        params = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, grads)
    return jax.device_get(tree.named_leaves(params) | held)


def run_steps(layout: Any, rows: RowWise, batches: list[Any], **changes: Any) -> tuple[Any, Any]:
    """(the state after steps on these batches, the metrics of the last)."""
    strategy = layout[0].build(parts_of(layout, rows, **changes))
    state, metrics = strategy.init(jax.random.key(0)), {}
    for batch in batches:
        placed = jax.device_put({k: v.copy() for k, v in batch.items()}, strategy.batch_shardings)
        state, metrics = strategy.step(state, placed)
    return jax.device_get(state), metrics


def assert_exact(layout: Any, rows: RowWise, batches: list[Any]) -> None:
    parts = parts_of(ONE, rows)
    want = oracle(parts, Auto().build(parts).init(jax.random.key(0)), batches)
    state, metrics = run_steps(layout, rows, batches)
    got = tree.named_leaves(state.params) | dense_tables(state.tables)
    assert got.keys() == want.keys()
    for name, leaf in want.items():
        assert np.abs(got[name] - leaf).max() <= 1e-12 * max(np.abs(leaf).max(), 1), name
    assert float(metrics["finite"]) == 1


LAYOUTS = {
    "auto1": ONE,
    "auto2": (Auto(), MeshConfig(), 2, 1),
    "allreduce4 accumulated": (AllReduce(), MeshConfig(), 4, 2),
    "auto tensor2 fsdp2": (Auto(), MeshConfig(data=2, fsdp=2, tensor=2), 8, 1),
    "server4": (Server(), MeshConfig(replica=2, data=2), 4, 1),
    "auto8 accumulated": (Auto(), MeshConfig(), 8, 2),
    "zero1": (Auto(zero=1), MeshConfig(data=2, fsdp=4), 8, 1),
    "ring2x4": (AllReduce(reduction="ring"), MeshConfig(replica=2, data=4), 8, 1),
    "allreduce fsdp2": (AllReduce(), MeshConfig(data=2, fsdp=2), 4, 2),
    "server tensor2": (Server(), MeshConfig(data=2, tensor=2), 4, 1),
}
OPTIMIZERS = {
    kind: RowWise(kind=kind, rate=rate)
    for kind, rate in (("sgd", 1.0), ("adagrad", 0.3), ("adam", 0.1))
}
QUICK = [
    ("auto2", "adagrad"),
    ("allreduce4 accumulated", "adam"),
    ("auto tensor2 fsdp2", "adagrad"),
    ("server4", "sgd"),
]
CASES = [(layout, kind) for layout in LAYOUTS for kind in OPTIMIZERS]


@pytest.mark.parametrize("layout,kind", slow_but(QUICK, CASES))
def test_a_step_is_that_of_dense_gradients_on_one_device(layout, kind, devices):
    with jax.enable_x64(True):
        for ids in ("holes", "zipf"):
            batches = [batch_of(functools.partial(adversary, ids, seed)) for seed in range(STEPS)]
            assert_exact(LAYOUTS[layout], OPTIMIZERS[kind], batches)
