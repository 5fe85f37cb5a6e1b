"""The order of examples: each once per epoch, whatever reads it."""

from __future__ import annotations

import itertools
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from spmd.data import loader
from spmd.data.sources import ArraySource
from spmd.parallel import mesh, sharding
from spmd.parallel.mesh import MeshConfig

N = 103


@pytest.fixture
def source():
    return numbers(N)


def numbers(num):
    return ArraySource({"x": np.arange(num, dtype=np.int64) * 10})


def ids(source, seed=1, **kwargs):
    return [b["example_id"] for b in loader.train_batches(source, seed=seed, **kwargs)]


@pytest.mark.parametrize("batch_size", [1, 7, 64, 103, 250])
def test_every_example_once_per_epoch(source, batch_size):
    epochs = 3
    steps = -(-epochs * N // batch_size)
    stream = np.concatenate(ids(source, batch_size=batch_size, stop=steps))[: epochs * N]
    orders = stream.reshape(epochs, N)
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(N))
    assert all((a != b).any() for a, b in itertools.pairwise(orders))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_cut_of_the_stream_is_that_piece_of_it(data):
    """Batch size, first step, steps per dispatch and rows only say where the one stream is cut."""
    num, batch_size = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 40))
    start, count = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 6))
    steps = data.draw(st.integers(1, 4))
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, batch_size - 1), min_size=1))))
    stop, source = start + count, numbers(num)
    epochs = ids(source, batch_size=num, stop=-(-stop * batch_size // num))  # a batch is an epoch
    assert all(len(np.unique(e)) == num for e in epochs)
    want = np.concatenate(epochs)[: stop * batch_size].reshape(stop, batch_size)[start:, rows]
    got = ids(
        source, batch_size=batch_size, start=start, stop=stop, steps_per_dispatch=steps, rows=rows
    )
    shape = (count, len(rows))
    np.testing.assert_array_equal(np.concatenate(got).reshape(shape), want)


def test_seeds_give_different_orders(source):
    orders = [ids(source, seed=seed, batch_size=N, stop=1)[0] for seed in (0, 1, 2, 0)]
    assert all((a != b).any() for a, b in itertools.combinations(orders[:3], 2))
    np.testing.assert_array_equal(orders[0], orders[3])


def test_features_belong_to_their_ids(source):
    for batch in loader.train_batches(source, seed=0, batch_size=16, stop=9):
        np.testing.assert_array_equal(batch["x"], batch["example_id"].astype(np.int64) * 10)
        np.testing.assert_array_equal(batch["weight"], 1)
        assert (batch["example_id"].dtype, batch["weight"].dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_do_not_change_the_order(source, threads):
    want = ids(source, batch_size=8, stop=40, threads=1, buffer=1)
    for a, b in zip(
        want, ids(source, batch_size=8, stop=40, threads=threads, buffer=7), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_processes_together_read_the_whole_batch(source):
    whole = ids(source, batch_size=12, stop=30)
    parts = [
        ids(source, batch_size=12, stop=30, rows=np.arange(i * 4, i * 4 + 4)) for i in range(3)
    ]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(batch, np.concatenate([p[step] for p in parts]))


def test_resumed_at_a_step_equals_straight_through(source):
    whole = ids(source, batch_size=8, stop=40)
    for a, b in zip(whole[17:], ids(source, batch_size=8, start=17, stop=40), strict=True):
        np.testing.assert_array_equal(a, b)


class Sparse:
    """An order with empty rows: the last third of each step, and all of step 2."""

    def __init__(self, batch_size):
        self._batch_size = batch_size

    def __getitem__(self, positions):
        step, row = np.divmod(positions, self._batch_size)
        empty = (row >= self._batch_size * 2 // 3) | (step == 2)
        return np.where(empty, -1, (step * 31 + row * 7) % N)


def test_an_order_may_be_given_and_leave_rows_empty(source):
    order, read = Sparse(12), {"seed": 1, "batch_size": 12}
    batches = list(loader.train_batches(source, **read, stop=5, order=order))
    for step, batch in enumerate(batches):
        want = order[np.arange(12) + 12 * step]
        np.testing.assert_array_equal(batch["example_id"], want)
        np.testing.assert_array_equal(batch["weight"], np.where(want < 0, 0, 1))
        np.testing.assert_array_equal(batch["x"], np.where(want < 0, 0, want * 10))
        assert (batch["example_id"].dtype, batch["weight"].dtype) == (np.int32, np.float32)
    assert [b["weight"].sum() for b in batches] == [8, 8, 0, 8, 8]
    # However it is cut: by processes, threads, dispatches, or a start in the middle.
    rows = [np.arange(6), np.arange(6, 12)]
    for kwargs in ({"threads": 4, "buffer": 7}, {"steps_per_dispatch": 2}):
        parts = [
            list(
                loader.train_batches(source, **read, stop=5, start=1, rows=r, order=order, **kwargs)
            )
            for r in rows
        ]
        for name in ("x", "example_id", "weight"):
            shape = (4, 6)
            halves = [np.concatenate([b[name] for b in p]).reshape(shape) for p in parts]
            want = np.stack([b[name] for b in batches[1:]])
            np.testing.assert_array_equal(np.concatenate(halves, axis=1), want)


def test_dispatches_hold_the_same_steps(source):
    single = ids(source, batch_size=8, stop=10)
    many = ids(source, batch_size=8, stop=10, steps_per_dispatch=4)
    assert [len(x) for x in many] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(many), np.stack(single))


def test_a_finished_run_reads_nothing(source):
    assert ids(source, batch_size=8, start=5, stop=5) == []


def test_a_source_that_fails_says_so():
    class Broken:
        def __len__(self):
            return N

        def take(self, indices):
            raise ValueError("the disk is gone")

    with pytest.raises(ValueError, match="the disk is gone"):
        ids(Broken(), batch_size=8, stop=5)


def test_an_abandoned_iterator_stops(source):
    batches = loader.train_batches(source, batch_size=8, seed=0, stop=10**9)
    next(batches)
    batches.close()
    assert next(batches, None) is None


@pytest.mark.parametrize("batch_size", [1, 8, 103, 128])
def test_evaluation_counts_each_example_once(source, batch_size):
    seen = [
        b["example_id"][b["weight"] == 1]
        for b in loader.eval_batches(source, batch_size=batch_size)
    ]
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(N))
    total = sum(len(b["weight"]) for b in loader.eval_batches(source, batch_size=batch_size))
    assert total % batch_size == 0


def test_evaluation_is_split_over_processes(source):
    whole = list(loader.eval_batches(source, batch_size=12))
    parts = [
        list(loader.eval_batches(source, batch_size=12, rows=np.arange(i * 6, i * 6 + 6)))
        for i in range(2)
    ]
    for batch, *halves in zip(whole, *parts, strict=True):  # also the same number of batches
        for name, value in batch.items():
            np.testing.assert_array_equal(value, np.concatenate([h[name] for h in halves]))
    assert sum(b["weight"].sum() for b in whole) == N


@pytest.mark.parametrize(
    "axes", [{}, {"fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 8}]
)
def test_rows_of_a_process_and_placement(axes, devices):
    placed = NamedSharding(mesh.make(MeshConfig(**axes), devices), sharding.batch_spec())
    np.testing.assert_array_equal(loader.process_rows(placed, 32), np.arange(32))
    array = loader.put({"x": np.arange(32)}, placed, 32)["x"]
    assert array.sharding == placed
    np.testing.assert_array_equal(array, np.arange(32))
    size = 32 * axes.get("tensor", 1) // 8
    assert {s.data.shape for s in array.addressable_shards} == {(size,)}


@pytest.mark.parametrize("tensor", [1, 2])
def test_two_processes_hold_the_batch_between_them(tensor, devices):
    placed = NamedSharding(mesh.make(MeshConfig(tensor=tensor), devices), sharding.batch_spec())

    def rows(local):
        """process_rows as a process with these devices sees it."""
        held = lambda shape: {
            d: at for d, at in placed.devices_indices_map(shape).items() if d in local
        }
        return loader.process_rows(types.SimpleNamespace(addressable_devices_indices_map=held), 32)

    halves = rows(devices[:4]), rows(devices[4:])
    assert [len(h) for h in halves] == [16, 16]
    np.testing.assert_array_equal(np.sort(np.concatenate(halves)), np.arange(32))
    np.testing.assert_array_equal(halves[0], np.arange(16))


def test_position_is_the_whole_state():
    assert loader.position(30, 8, N) == {"step": 30, "examples": 240, "epoch": 2}


GROUP = 5


class Grouped(ArraySource):
    """A source whose groups of rows are shuffled, and the rows within each."""

    def order(self, seed):
        return GroupOrder(seed, len(self) // GROUP)


class GroupOrder:
    def __init__(self, seed, groups):
        self.groups = loader.Order(seed, groups)
        self.rows = loader.Order(seed, GROUP, 1)

    def __getitem__(self, positions):
        return self.groups[positions // GROUP] * GROUP + self.rows[positions]


def test_a_source_may_have_an_order_of_its_own():
    source = Grouped({"x": np.arange(40)})
    whole = np.concatenate(ids(source, batch_size=10, stop=8))
    for epoch in whole.reshape(-1, len(source)):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(len(source)))
    groups = whole.reshape(-1, GROUP) // GROUP
    assert (groups == groups[:, :1]).all() and (np.diff(whole) != 1).any()
    rest = np.concatenate(ids(source, batch_size=10, start=3, stop=8, threads=3))
    np.testing.assert_array_equal(rest, whole[30:])
