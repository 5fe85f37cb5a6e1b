"""The order of examples: each once per epoch, whatever reads it."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from spmd import mesh, sharding
from spmd.data import loader
from spmd.data.sources import ArraySource
from spmd.mesh import MeshConfig

N = 103


@pytest.fixture
def source():
    return ArraySource({"x": np.arange(N, dtype=np.int64) * 10})


def ids(source, **kwargs):
    return [b["example_id"] for b in loader.train_batches(source, seed=1, **kwargs)]


@pytest.mark.parametrize("batch_size", [1, 7, 64, 103, 250])
def test_every_example_once_per_epoch(source, batch_size):
    epochs = 3
    steps = -(-epochs * N // batch_size)
    stream = np.concatenate(ids(source, batch_size=batch_size, stop=steps))[: epochs * N]
    orders = stream.reshape(epochs, N)
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(N))
    assert any((a != b).any() for a, b in itertools.pairwise(orders))


def test_features_belong_to_their_ids(source):
    for batch in loader.train_batches(source, seed=0, batch_size=16, stop=9):
        np.testing.assert_array_equal(batch["x"], batch["example_id"].astype(np.int64) * 10)
        np.testing.assert_array_equal(batch["weight"], 1)


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


def test_dispatches_hold_the_same_steps(source):
    single = ids(source, batch_size=8, stop=10)
    many = ids(source, batch_size=8, stop=10, steps_per_dispatch=4)
    assert [len(x) for x in many] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(many), np.stack(single))


@pytest.mark.parametrize("batch_size", [1, 8, 103, 128])
def test_evaluation_counts_each_example_once(source, batch_size):
    seen = [
        b["example_id"][b["weight"] == 1]
        for b in loader.eval_batches(source, batch_size=batch_size)
    ]
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(N))
    total = sum(len(b["weight"]) for b in loader.eval_batches(source, batch_size=batch_size))
    assert total % batch_size == 0


def test_rows_of_a_process_and_placement():
    cut = mesh.make(MeshConfig(fsdp=2), jax.devices())
    placed = NamedSharding(cut, sharding.batch_spec())
    np.testing.assert_array_equal(loader.process_rows(placed, 32), np.arange(32))
    array = loader.put({"x": np.arange(32)}, placed, 32)["x"]
    assert {s.data.shape for s in array.addressable_shards} == {(4,)}
    np.testing.assert_array_equal(array, np.arange(32))


def test_position_is_the_whole_state():
    assert loader.position(30, 8, N) == {"step": 30, "examples": 240, "epoch": 2}
