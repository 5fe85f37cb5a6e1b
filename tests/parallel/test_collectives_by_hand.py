"""collectives: each against a list of blocks in numpy, one block for each device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from spmd.parallel import collectives
from spmd.parallel import mesh as meshes
from spmd.parallel.communicator import Communicator
from spmd.parallel.mesh import MeshConfig
from spmd.strategies import compress

pytestmark = pytest.mark.usefixtures("devices")
AXES = ("replica", "data")
MESHES = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (3, 2), 8: (2, 4)}
DTYPES = ("int8", "int32", "uint32", "float32", "bfloat16")
draws = settings(max_examples=6, deadline=None, derandomize=True)  # each compiles a program


def on(num: int):
    replica, data = MESHES[num]
    return meshes.make(MeshConfig(replica=replica, data=data), jax.devices()[:num])


def each(function, num, blocks):
    """What each device has after `function` of its block of the list; blocks and results are pytrees."""
    spread = jax.shard_map(
        lambda x: jax.tree.map(lambda y: y[None], function(jax.tree.map(lambda y: y[0], x))),
        mesh=on(num),
        in_specs=P(AXES),
        out_specs=P(AXES),
        check_vma=False,  # rings are typed varying; every device's result is looked at here
    )
    stacked = jax.tree.map(lambda *x: np.stack(x), *blocks)
    out = jax.tree.map(np.asarray, jax.jit(spread)(stacked))
    return [jax.tree.map(lambda x, i=i: x[i], out) for i in range(num)]


def drawn(rng, shape, dtype):
    if np.issubdtype(np.dtype(dtype), np.integer):
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    return rng.normal(size=shape).astype(dtype)


def total(blocks):
    """The sum of a list of arrays, in their own type: integers wrap, floats are summed in float64."""
    dtype = blocks[0].dtype
    wide = dtype if np.issubdtype(dtype, np.integer) else np.float64
    return np.sum(np.stack(blocks).astype(wide), axis=0, dtype=wide).astype(dtype)


def assert_sum(got, blocks):
    want = total(blocks)
    assert got.dtype == want.dtype and got.shape == want.shape
    if np.issubdtype(want.dtype, np.integer):
        np.testing.assert_array_equal(got, want)
        return
    eps = 1e-6 if want.dtype == np.float32 else 2e-2
    scale = np.abs(np.stack(blocks).astype(np.float64)).sum(axis=0).max(initial=1)
    np.testing.assert_allclose(
        got.astype(np.float64), want.astype(np.float64), rtol=0, atol=eps * scale
    )


cases = given(
    num=st.sampled_from(list(MESHES)),
    shapes=st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=4, max_size=4),
    bucket=st.sampled_from([0, 64, 1e9]),
    seed=st.integers(0, 2**32 - 1),
)

ALL_REDUCES = {
    "ring": lambda x: collectives.ring_all_reduce(x, AXES),
    "both ways": lambda x: collectives.ring_all_reduce(x, AXES, bidirectional=True),
    "reduce-scatter": lambda x: collectives.scatter_gather(x, AXES),
    "hierarchical": lambda x: collectives.hierarchical(x, ("data",), ("replica",)),
}


@pytest.mark.parametrize("name", ALL_REDUCES)
@cases
@draws
def test_all_reduces_of_pytrees(name, num, shapes, dtypes, bucket, seed):
    rng = np.random.default_rng(seed)
    make = lambda: [drawn(rng, s, np.dtype(d)) for s, d in zip(shapes, dtypes, strict=False)]
    blocks = [make() for _ in range(num)]
    reduce = lambda grads: collectives.reduce_buckets(ALL_REDUCES[name], grads, bucket)
    for got in each(reduce, num, blocks):
        for leaf, parts in zip(got, zip(*blocks, strict=True), strict=True):
            assert_sum(leaf, parts)


@pytest.mark.parametrize("both", [False, True])
@given(
    num=st.sampled_from(list(MESHES)),
    chunk=st.integers(1, 7),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
@draws
def test_halves_of_a_ring(both, num, chunk, dtype, seed):
    """Chunk i of the sum ends on device i; gathered, every device has all chunks in order."""
    rng = np.random.default_rng(seed)
    blocks = [drawn(rng, (num, chunk), np.dtype(dtype)) for _ in range(num)]
    scatter = lambda x: collectives.ring_reduce_scatter(x, AXES, bidirectional=both)
    for i, got in enumerate(each(scatter, num, blocks)):
        assert_sum(got, [block[i] for block in blocks])
    gather = lambda x: collectives.ring_all_gather(x, AXES, bidirectional=both)
    for got in each(gather, num, [block[0] for block in blocks]):
        np.testing.assert_array_equal(got, np.stack([block[0] for block in blocks]))


def test_a_long_ring_is_a_loop(monkeypatch):
    blocks = [drawn(np.random.default_rng(i), (11,), np.dtype("int32")) for i in range(8)]
    unrolled = each(ALL_REDUCES["both ways"], 8, blocks)
    monkeypatch.setattr(collectives, "UNROLLED", 4)
    looped = lambda x: collectives.ring_all_reduce(x, AXES, bidirectional=True)
    np.testing.assert_array_equal(each(looped, 8, blocks), unrolled)


@given(
    num=st.sampled_from(list(MESHES)),
    rows=st.integers(1, 3),
    dim=st.sampled_from([0, 1, None]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
@draws
def test_owners(num, rows, dim, dtype, seed):
    """Device i has its part of the sum, and of what is whole already its part."""
    rng = np.random.default_rng(seed)
    shape = [2, 3]
    shape[dim or 0] = rows * num
    blocks = [drawn(rng, shape, np.dtype(dtype)) for _ in range(num)]
    part = lambda x, i: x if dim is None else np.split(x, num, axis=dim)[i]
    for i, got in enumerate(each(lambda x: collectives.reduce_scatter(x, AXES, dim), num, blocks)):
        assert_sum(got, [part(block, i) for block in blocks])
    same = [blocks[0]] * num
    for i, got in enumerate(each(lambda x: collectives.local_shard(x, AXES, dim), num, same)):
        np.testing.assert_array_equal(got, part(blocks[0], i))


# ---- int8: the oracle quantises each block of each device by itself


def np_quantised(x, block):
    padded = np.pad(x, (0, -len(x) % block)).reshape(-1, block)
    scale = (np.abs(padded).max(1) / 127).astype(np.float32)[:, None]
    q = np.round(padded / np.where(scale == 0, np.float32(1), scale)).clip(-127, 127)
    return (q * scale).reshape(-1)[: len(x)].astype(x.dtype)


@given(
    num=st.sampled_from(list(MESHES)),
    chunk=st.integers(1, 40),
    block=st.sampled_from([4, 16]),
    seed=st.integers(0, 2**32 - 1),
)
@draws
def test_int8(num, chunk, block, seed):
    """Sums of quantised chunks, and the errors: what was meant is what was sent plus what is kept."""
    rng = np.random.default_rng(seed)
    blocks = [drawn(rng, (num, chunk), np.dtype("float32")) for _ in range(num)]
    blocks[0][0] = 0  # a block of zeros
    sent = [np.stack([np_quantised(row, block) for row in x]) for x in blocks]
    group = Communicator(AXES, num)
    int8 = compress.with_error_feedback(compress.int8(block))

    def scatter(x):
        message, feedback = int8.encode(x, int8.init(x))
        return int8.decode(group.all_to_all(message), x).sum(axis=0), feedback.errors

    def gather(x):
        message, feedback = int8.encode(x, int8.init(x))
        return int8.decode(group.all_gather(message), x), feedback.errors

    for i, (mine, error) in enumerate(each(scatter, num, blocks)):
        np.testing.assert_allclose(mine, np.sum([x[i] for x in sent], axis=0), atol=2e-6)
        np.testing.assert_allclose(sent[i] + error, blocks[i], atol=1e-6)
        assert abs(error).max() <= abs(blocks[i]).max() / 127 / 2 * 1.001
    want = np.stack([np_quantised(x[0], block) for x in blocks])
    for i, (whole, error) in enumerate(each(gather, num, [x[0] for x in blocks])):
        np.testing.assert_allclose(whole, want, atol=1e-6)
        np.testing.assert_allclose(want[i] + error, blocks[i][0], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad):
    x = jnp.array([1.0, bad, 2.0, 3.0])
    int8 = compress.int8(2)
    message, _ = int8.encode(x, {})
    decoded = int8.decode(message, x)
    assert not np.isfinite(decoded[:2]).any() and np.isfinite(decoded[2:]).all()


def test_buckets():
    sizes = [(10, "float32"), (6, "bfloat16"), (10, "float32"), (100, "float32"), (1, "float32")]
    leaves = [
        jax.ShapeDtypeStruct((n,), ml_dtypes.bfloat16 if d[0] == "b" else d) for n, d in sizes
    ]
    assert collectives.buckets(leaves, 80) == [[0, 2], [1], [3], [4]]
    assert collectives.buckets(leaves, 0) == [[0], [1], [2], [3], [4]]
    assert collectives.buckets(leaves, 1e9) == [[0, 2, 3, 4], [1]]
