"""Sparse tables on every mesh and strategy, against the dense gradients of one device."""

from __future__ import annotations

import dataclasses
import functools
import re
from types import MappingProxyType
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st

from spmd import Experiment, optim
from spmd.core import tree
from spmd.data import Arrays
from spmd.models.layers.linear import Dense
from spmd.optim import RowWise
from spmd.parallel import mesh, owners, routing, sparse, tables
from spmd.parallel.mesh import MeshConfig
from spmd.parallel.packing import pack_tables
from spmd.parallel.routing import bucket_slots, slots_of_bins
from spmd.parallel.tables import Lookup, Placement, SparseTable, stack
from spmd.strategies import AllReduce, Auto, Compression, Local, Server, base
from spmd.strategies.privacy import Privacy
from spmd.tasks import PCGrad, Task
from spmd.train import TrainConfig
from spmd.weights.config import InitConfig
from tests.marks import slow_but

STEPS, BATCH, USERS, ITEMS = 3, 16, 300, 500


def declared(users: Any, items: Any, words: Any) -> Any:
    """The tables, with the placement of each."""
    of_items = (
        Lookup(feature="bag", pool="mean", weights="times"),
        Lookup(feature="list", pool="none"),
    )
    of_user, of_word = (Lookup(feature="user"),), (Lookup(feature="word"),)
    return MappingProxyType(
        {
            "users": SparseTable(ids=USERS, dim=4, lookups=of_user, placement=users),
            "items": SparseTable(ids=ITEMS, dim=4, lookups=of_items, scale=0.1, placement=items),
            "words": SparseTable(ids=70, dim=8, lookups=of_word, hashed=True, placement=words),
        }
    )


class Ratings(nnx.Module):
    """A rating from a user, a weighted bag of items, three items by themselves, and a hashed word."""

    tables = declared("rows", "rows", "rows")

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = Dense(rngs, (20, 8), ("input", "mlp"))
        self.last = Dense(rngs, (8, 1), ("mlp", "classes"))

    def __call__(self, user, bag, items, word):
        rows = jnp.concatenate([user * bag, bag, items.sum(1), word], axis=1)
        return self.last(jnp.tanh(self.first(rows)))[:, 0]


class Mixed(Ratings):
    tables = declared("replicated", "rows", "auto")  # replicated by its size


class Replicated(Ratings):
    tables = declared("replicated", "replicated", "replicated")


class Complete(Ratings):
    """Users and items in a bin each; words, a table alone, in one that all devices share."""

    tables = declared("tables", "tables", "tables")


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


def parts_of(layout: Any, rows: RowWise, model: Any = Ratings, **changes: Any) -> base.Parts:
    _, config, num, accumulate = layout
    task = Rated().build(model, "float64")
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


def dense_tables(arrays: Any, model: Any = Ratings) -> dict[str, np.ndarray]:
    """Each table by its ids, [ids, D], and the state of its optimizer, by numpy."""
    result = {}
    for stacked in stack(model.tables):
        p = stacked.placement
        for name, offset in stacked.offsets.items():
            place = p.place(offset + np.arange(Ratings.tables[name].ids))
            for slot, x in arrays[stacked.name].items():
                by_row = np.asarray(x).reshape(p.rows, *(() if x.ndim == 1 else (p.dim,)))
                result[f"{name}/{slot}"] = by_row[place]
    return result


def looked_up(values: dict[str, Any], batch: Any) -> dict[str, jax.Array]:
    """The rows of a batch by jnp.take of complete tables, as the task reads them."""
    found = {}
    for name, table in Ratings.tables.items():
        for lookup in table.lookups:
            ids = batch[lookup.feature].reshape(BATCH, -1)
            ids = tables.hash_ids(ids, table.ids) if table.hashed else ids
            weights = batch[lookup.weights] if lookup.weights else jnp.ones(ids.shape)
            factor = jnp.where(ids >= 0, weights, 0)
            each = jnp.take(values[name], jnp.maximum(ids, 0), axis=0) * factor[..., None]
            if lookup.pool == "mean":
                each = each / jnp.maximum(factor.sum(1), 1e-30)[:, None, None]
            found[f"rows/{lookup.feature}"] = each if lookup.pool == "none" else each.sum(1)
    return found


def named_rows(batch: Any, name: str) -> np.ndarray:
    """Which rows of a table the batch names."""
    table = Ratings.tables[name]
    named = np.zeros(table.ids, bool)
    for lookup in table.lookups:
        ids = jnp.asarray(batch[lookup.feature].ravel())
        ids = np.asarray(tables.hash_ids(ids, table.ids) if table.hashed else ids)
        named[ids[ids >= 0]] = True
    return named


@functools.cache
def dense_gradients() -> Any:
    task = Rated().build(Ratings, "float64")

    def loss(params, values, batch):
        batch = {**batch, **looked_up(values, batch)}
        scale = task.scale(task.weigh(batch))
        return task.loss(params, {}, batch, jax.random.key(0), scale)[0]

    return jax.jit(jax.grad(loss, (0, 1)))


@functools.cache
def oracle(
    rows: RowWise, drawn: tuple[tuple[str, int], ...], model: Any = Ratings
) -> dict[str, Any]:
    """Parameters and tables after some steps on one device, from the gradients of complete tables."""
    parts = parts_of(ONE, rows)
    state = built(ONE, rows, model).init(jax.random.key(0))
    params, held = state.params, dict[str, Any](dense_tables(state.tables, model))
    for step, batch in enumerate(batches_of(drawn)):
        values = {name: held[f"{name}/rows"] for name in Ratings.tables}
        grads, row_grads = dense_gradients()(params, values, batch)
        rate = jnp.asarray(parts.rate(jnp.int32(step)))
        for name, old in values.items():
            slots = {k.split("/")[1]: x for k, x in held.items() if k.startswith(f"{name}/")}
            del slots["rows"]
            new, slots = rows.update(old, slots, row_grads[name], rate, jnp.int32(step))
            named = named_rows(batch, name)
            for slot, x in {"rows": new, **slots}.items():
                keep = named.reshape(-1, *(1,) * (x.ndim - 1))
                held[f"{name}/{slot}"] = np.where(keep, x, held[f"{name}/{slot}"])
        params = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, grads)
    return jax.device_get(tree.named_leaves(params) | held)


def batches_of(drawn: tuple[tuple[str, int], ...]) -> list[dict[str, np.ndarray]]:
    """A batch for each (kind of ids, seed)."""
    return [batch_of(functools.partial(adversary, kind, seed)) for kind, seed in drawn]


@functools.cache
def built(layout: Any, rows: RowWise, model: Any = Ratings, **changes: Any) -> base.Strategy:
    return layout[0].build(parts_of(layout, rows, model, **changes))


def run_steps(strategy: base.Strategy, batches: list[Any]) -> tuple[Any, Any]:
    """(the state after steps on these batches, the metrics of the last)."""
    state, metrics = strategy.init(jax.random.key(0)), {}
    for batch in batches:
        placed = jax.device_put({k: v.copy() for k, v in batch.items()}, strategy.batch_shardings)
        state, metrics = strategy.step(state, placed)
    return jax.device_get(state), metrics


def assert_exact(
    layout: Any, rows: RowWise, drawn: tuple[tuple[str, int], ...], model: Any = Ratings
) -> None:
    want = oracle(rows, drawn, model)
    state, metrics = run_steps(built(layout, rows, model), batches_of(drawn))
    got = tree.named_leaves(state.params) | dense_tables(state.tables, model)
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
    "sgd": RowWise(kind="sgd"),
    "adagrad": RowWise(rate=0.3),
    "adam": RowWise(kind="adam", rate=0.1),
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
        drawn = (("holes", 0), ("zipf", 1), ("one owner", 2))
        assert_exact(LAYOUTS[layout], OPTIMIZERS[kind], drawn)


PLACED = [
    (model, layout, kind)
    for model in (Mixed, Replicated, Complete)
    for layout in LAYOUTS
    for kind in OPTIMIZERS
]


@pytest.mark.parametrize(
    "model,layout,kind",
    slow_but(
        [(Mixed, "auto tensor2 fsdp2", "adam")],
        PLACED,
        gate=[
            (Replicated, "allreduce4 accumulated", "adagrad"),
            (Complete, "allreduce4 accumulated", "adam"),  # two devices share a bin
        ],
    ),
)
def test_placements_compute_the_same(model, layout, kind, devices):
    with jax.enable_x64(True):
        drawn = (("holes", 0), ("zipf", 1), ("one owner", 2))
        assert_exact(LAYOUTS[layout], OPTIMIZERS[kind], drawn, model)


def test_a_group_has_a_rate_of_its_own_and_a_frozen_table_stays(devices):
    """Half the rate of words, none of items, as runs of steps with those rates alone."""
    with jax.enable_x64(True):
        layout, rows = LAYOUTS["auto2"], OPTIMIZERS["sgd"]
        drawn = batches_of((("zipf", 1),))
        groups = (
            optim.Group(match="tables/w*", rate=0.5),
            optim.Group(match="tables/items", freeze=True),
        )
        rates = optim.row_rates(groups, Ratings.tables)
        assert rates == {"words": 0.5, "items": 0.0}
        first = dense_tables(jax.device_get(built(layout, rows).init(jax.random.key(0)).tables))
        grouped = dense_tables(run_steps(built_with_rates(layout, rows), drawn)[0].tables)
        halved = dense_tables(
            run_steps(built(layout, dataclasses.replace(rows, rate=0.5)), drawn)[0].tables
        )
        plain = dense_tables(run_steps(built(layout, rows), drawn)[0].tables)
        np.testing.assert_array_equal(grouped["items/rows"], first["items/rows"])
        np.testing.assert_array_equal(grouped["words/rows"], halved["words/rows"])
        np.testing.assert_array_equal(grouped["users/rows"], plain["users/rows"])
        with pytest.raises(ValueError, match="take a rate"):
            optim.row_rates((optim.Group(match="tables/*", decay=0.1),), Ratings.tables)
        with pytest.raises(ValueError, match=r"optimizer\.groups.* 'tables/nothing'"):
            optim.row_rates((optim.Group(match="tables/nothing", rate=2.0),), Ratings.tables)


def built_with_rates(layout: Any, rows: RowWise) -> base.Strategy:
    return layout[0].build(parts_of(layout, rows, row_rates={"words": 0.5, "items": 0.0}))


@pytest.mark.gate
@pytest.mark.parametrize("platforms", [("cpu", "tpu")])
def test_narrow_rows_are_the_same_on_every_mesh(platforms, devices):
    """Rows of bfloat16, rounded by seed, step and row: the same after steps on two devices and on eight, by
    gathers of rows and by those of lines.
    """
    rows, drawn = RowWise(rate=0.3, narrow=True), batches_of((("uniform", 0), ("zipf", 1)))
    states, first = [], {}
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        for name, platform in zip(("auto2", "auto tensor2 fsdp2"), platforms, strict=True):
            patch.setattr(sparse, "platform_of", lambda mesh, platform=platform: platform)
            strategy = LAYOUTS[name][0].build(parts_of(LAYOUTS[name], rows, Mixed))
            first = jax.device_get(strategy.init(jax.random.key(0))).tables
            states.append(run_steps(strategy, drawn)[0].tables)
    for (stack_, held), other in zip(states[0].items(), states[1].values(), strict=True):
        assert held["rows"].dtype == jnp.bfloat16 and held["sum"].dtype == np.float64
        # The last bit of a float64 sum may decide a rounding, if seldom.
        same = held["rows"] == other["rows"]
        assert same.mean() > 0.999 and (held["rows"] != first[stack_]["rows"]).any()
        np.testing.assert_allclose(held["sum"], other["sum"], rtol=1e-6)


@pytest.mark.gate
@hypothesis.given(
    layout=st.sampled_from(["auto2", "auto8 accumulated"]),
    model=st.sampled_from([Ratings, Mixed, Complete]),
    drawn=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 99)), min_size=1, max_size=3),
)
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
def test_adversarial_ids_change_nothing(layout, model, drawn):
    with jax.enable_x64(True):
        assert_exact(LAYOUTS[layout], OPTIMIZERS["adagrad"], tuple(drawn), model)


def test_places_are_a_permutation_of_the_rows():
    in_bins = Placement(5000, 4, bins=4)
    for placement in (
        *(Placement(3000, 4, stripes=8), Placement(5000, 1), Placement(10, 24)),
        *(in_bins, Placement(9000, 128, stripes=64, bins=8)),
    ):
        every = np.arange(placement.rows)
        assert sorted(placement.place(every)) == [*every]
        np.testing.assert_array_equal(placement.id(placement.place(every)), every)

    np.testing.assert_array_equal(
        in_bins.place(np.arange(in_bins.rows)) // in_bins.bin_rows,
        np.arange(in_bins.rows) // in_bins.bin_rows,
    )


def test_complete_tables_are_packed_into_bins_that_devices_own():
    """As many bins as fit into 1.25 times the rows; no table is in two, and none overlaps another."""
    for sizes, num in (
        ((9, 9, 9, 9), 4),
        ((100, 3, 2, 1), 1),
        ((7,), 1),
        ((10,) * 9, 2),
        ((5, 5, 4, 4), 4),
    ):
        packed = pack_tables(sizes, 1024)
        assert packed.num_bins == num, sizes
        taken = set[tuple[int, int]]()
        for size, bin_, start in zip(sizes, packed.bins, packed.starts, strict=True):
            rows = {(bin_, start + i) for i in range(size)}
            assert start + size <= packed.size and not rows & taken
            taken |= rows
    pair, alone = stack(Complete.tables)
    assert [pair.name, alone.name] == ["dim4_bins2", "dim8_bins1"]
    assert tables.placement_of(pair.name, pair.placement.rows).place(7) == pair.placement.place(7)
    # Whatever the ids, an owner of complete bins is asked for the lookups in these at most.
    assert [slots_of_bins((1, 8), 9 * 16, num) for num in (1, 2)] == [9 * 16, 8 * 16]
    assert slots_of_bins((1, 8), 9 * 16, 8) == bucket_slots(8 * 16, 4)


def test_one_round_serves_complete_tables_on_as_many_devices_as_bins(devices):
    """Whatever the ids: here each item belongs to the first device, if rows are spread."""
    spread = next(each for each in stack(Ratings.tables) if "items" in each.offsets)
    owner = spread.placement.place(spread.offsets["items"] + np.arange(ITEMS))
    own = np.flatnonzero(owner < spread.placement.rows // 2).astype(np.int32)
    drawn, rounds = batches_of((("uniform", 3),)), dict[str, int]()
    drawn[0] |= {
        "bag": own[: BATCH * 5].reshape(BATCH, 5),
        "list": own[-BATCH * 3 :].reshape(BATCH, 3),
    }
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "MARGIN", 0)
        for kind in ("rows", "tables"):
            model = type("Placed", (Ratings,), {"tables": declared(kind, kind, "replicated")})
            strategy = built(LAYOUTS["auto2"], OPTIMIZERS["sgd"], model)
            rounds[kind] = int(run_steps(strategy, drawn)[1]["lookup_rounds"])
    assert rounds["tables"] == 1 < rounds["rows"]


def test_several_steps_of_a_dispatch_and_a_skipped_one(devices):
    """A scan takes the steps one by one; one that is not finite, or has an unknown id, touches nothing."""
    with jax.enable_x64(True):
        layout, rows = LAYOUTS["auto2"], OPTIMIZERS["adagrad"]
        skipping = built(layout, rows, skip=True)
        batches = batches_of((("uniform", 0), ("zipf", 1), ("holes", 2)))
        batches[1]["rating"][5] = np.nan
        batches[2]["user"][3] = USERS
        first, _ = run_steps(skipping, batches[:1])
        last, metrics = run_steps(skipping, batches)
        assert float(metrics["finite"]) == 0 and int(last.step) == 3
        jax.tree.map(np.testing.assert_array_equal, last.tables, first.tables)
        jax.tree.map(np.testing.assert_array_equal, last.params, first.params)
        several = base.scanned(skipping)
        stacked = jax.tree.map(lambda *x: np.stack(x), batches[0], *batches_of((("zipf", 1),)))
        state = several.init(jax.random.key(0))
        state, _ = several.step(state, jax.device_put(stacked, several.batch_shardings))
        want, _ = run_steps(skipping, [batches[0], *batches_of((("zipf", 1),))])
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.tables), want.tables)


def sized(ids: int) -> Any:
    """The compiled step of a table with so many rows, and its state's shapes; nothing is allocated."""

    class Sized(nnx.Module):
        tables = MappingProxyType(
            {"items": SparseTable(ids=ids, dim=16, lookups=(Lookup(feature="bag"),))}
        )

        def __init__(self, rngs: nnx.Rngs) -> None:
            self.last = Dense(rngs, (16, 1), ("mlp", "classes"))

        def __call__(self, bag):
            return self.last(bag)[:, 0]

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class OfBag(Rated):
        def inputs(self, batch):
            return (batch["rows/bag"],)

    layout = (Auto(), MeshConfig(), 8, 1)
    parts = parts_of(layout, RowWise(), task=OfBag().build(Sized, "float64"), skip=True)
    strategy = Auto().build(parts)
    for chosen, lead in ((strategy, ()), (base.scanned(strategy), (2,))):
        shapes = jax.eval_shape(chosen.init, jax.random.key(0))
        batch = {
            k: jax.ShapeDtypeStruct((*lead, *v.shape), v.dtype) for k, v in parts.batch.items()
        }
        yield chosen.step.lower(shapes, batch).compile()


@pytest.mark.gate
def test_no_step_copies_a_table(devices):
    """Temporaries do not grow with the rows, and the arrays of the state are updated in place."""
    with jax.enable_x64(True):
        pairs = [*zip(sized(10**5), sized(10**7), strict=True)]
    for small, large in pairs:
        held, more = small.memory_analysis(), large.memory_analysis()
        assert more.temp_size_in_bytes == held.temp_size_in_bytes
        assert more.alias_size_in_bytes >= 10**7 * 17 * 8 // 8
        assert not re.search(r"f64\[1\d{5,6}(,\d+)?\]\S* copy\(", large.as_text() or "")


def arrays() -> dict[str, np.ndarray]:
    batch = batch_of(functools.partial(adversary, "uniform", 0))
    single = lambda x: x.astype(np.float32) if x.dtype == float else x
    return {k: single(v) for k, v in batch.items() if k not in ("example_id", "weight")}


def experiment(**changes: Any) -> Experiment:
    features = {k: (v.shape[1:], str(v.dtype)) for k, v in arrays().items()}
    given = {
        "task": Rated(),
        "simulate": 4,
        "train": TrainConfig(steps=2),
        "optimizer": optim.SGD(),
    }
    given |= {"data": Arrays(train=arrays, eval=arrays, features=features, batch_size=8)}
    return Experiment(model=Ratings, **given | changes)


def combined() -> Task:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Combined(Rated):
        combine = PCGrad()

    return Combined()


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"strategy": Local(replicas=4, period=2)},
            "local gives each replica parameters of its own",
        ),
        ({"strategy": AllReduce(compress=Compression(kind="int8"))}, "kind=int8 would send a part"),
        ({"strategy": Server(staleness=1)}, "staleness=1 would pair new rows with old parameters"),
        ({"privacy": Privacy(noise_multiplier=1.0)}, "privacy clips the gradient of each example"),
        ({"optimizer": optim.SGD(ema=0.9)}, "optimizer.ema averages every row"),
        ({"mesh": MeshConfig(data=2, stage=2)}, "use --mesh.stage 1"),
        ({"init": InitConfig(from_="runs/other")}, "init.from reads parameters alone"),
        ({"task": combined()}, "combines gradients by loss term"),
    ],
)
def test_what_tables_do_not_take_is_refused(changes, message, devices):
    with pytest.raises(ValueError, match=message):
        experiment(**changes).build(source=())


def test_an_id_that_a_table_does_not_have_is_named(devices):
    wrong = arrays()
    wrong["list"][5, 2] = ITEMS
    program = experiment(simulate=1).build()
    with pytest.raises(
        ValueError, match=r"feature 'list' is 500 in example 5 .* .500 ids of table 'items'"
    ):
        program.expected("training").check_ranges(wrong | {"example_id": np.arange(BATCH)})


@pytest.mark.gate
@pytest.mark.parametrize(
    "platform,kind,model", [("gpu", "adagrad", Mixed), ("tpu", "adam", Ratings)]
)
def test_the_forms_of_other_platforms_give_the_same(platform, kind, model, devices):
    """Sums by doubling instead of scatter-adds, and gathers of complete lines: run here on a CPU."""
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "platform_of", lambda mesh: platform)
        drawn = (("holes", 0), ("zipf", 1), ("one owner", 2))
        layout, rows = LAYOUTS["auto2"], OPTIMIZERS[kind]
        state, _ = run_steps(layout[0].build(parts_of(layout, rows, model)), batches_of(drawn))
        want = oracle(rows, drawn, model)
        for name, leaf in dense_tables(state.tables, model).items():
            assert np.abs(leaf - want[name]).max() <= 1e-12 * max(np.abs(want[name]).max(), 1), name


def test_an_owner_is_asked_for_every_row_once(devices):
    """Buckets of three slots: many rounds, each id in one of them, all gradients of a row in the same."""
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(owners, "slots_of_bins", lambda loads, lookups, num: 3)
        layout, rows = LAYOUTS["auto8 accumulated"], OPTIMIZERS["adagrad"]
        strategy = layout[0].build(parts_of(layout, rows))
        drawn = (("one owner", 3), ("uniform", 4))
        state, metrics = run_steps(strategy, batches_of(drawn))
        want = oracle(rows, drawn)
        for name, leaf in dense_tables(state.tables).items():
            assert np.abs(leaf - want[name]).max() <= 1e-12 * max(np.abs(want[name]).max(), 1), name
        assert float(metrics["lookup_rounds"]) >= 3
