"""Digests: what numpy says, on every mesh; any change is noticed; no index array is made."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import digest
from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig

DTYPES = ["float32", "int32", "uint32", "bfloat16", "float16", "int8", "uint8", "int16", "bool"]
DTYPES += ["float8_e4m3fn", "float64", "int64", "uint64", "complex64", "int4"]
SHAPES = ((), (0,), (1,), (7,), (3, 5), (4, 0, 2), (16, 8), (2, 3, 4, 5))


def oracle(x: np.ndarray) -> np.ndarray:
    """The same arithmetic on the flat words, in 64 bits with an explicit modulus."""
    x = np.ascontiguousarray(x)
    if x.dtype.itemsize >= 4:
        words = x.reshape(-1).view(np.uint32)
    elif x.dtype.kind in "iub" or x.dtype == ml_dtypes.int4:
        words = x.reshape(-1).astype(np.int32).view(np.uint32)
    else:
        words = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}")
    words, at = words.astype(np.uint64), np.arange(words.size, dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    sums = []
    for multiplier, added in ((0x9E3779B9, 0x85EBCA6B), (0x27D4EB2F, 0x165667B1)):
        h = words ^ ((at * np.uint64(multiplier) + np.uint64(added)) & low)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) & low
        h ^= h >> np.uint64(16)
        sums.append(np.uint32(int(h.sum()) % 2**32))
    return np.array(sums)


def random_array(rng, shape, dtype) -> np.ndarray:
    size = int(np.prod(shape))
    kind = np.dtype(dtype) if dtype in np.sctypeDict else np.dtype(getattr(ml_dtypes, dtype))
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype == "int4":
        return rng.integers(-8, 8, shape).astype(kind)
    # any bits: NaNs of all kinds, subnormals, negative zeros
    return np.frombuffer(rng.bytes(size * kind.itemsize), kind).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_what_numpy_says(dtype):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for shape in SHAPES:
            x = random_array(rng, shape, dtype)
            np.testing.assert_array_equal(jax.jit(digest.digest_block)(jnp.asarray(x)), oracle(x))


@pytest.mark.parametrize(
    ("config", "num", "spec"),
    [
        (MeshConfig(), 1, P()),
        (MeshConfig(data=2), 2, P("data")),
        (MeshConfig(data=2, fsdp=4), 8, P("fsdp", "data")),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, P(None, ("fsdp", "tensor"))),
        (MeshConfig(fsdp=8), 8, P()),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_is_the_same_on_every_mesh(config, num, spec, dtype):
    x = random_array(np.random.default_rng(1), (16, 24), dtype)
    placed = NamedSharding(mesh.make(config, jax.devices()[:num]), spec)
    whole = NamedSharding(placed.mesh, P())
    leaves = {"b": jax.device_put(x, placed), "a": jax.device_put(np.int32(3), whole)}
    np.testing.assert_array_equal(digest.compute(leaves), [oracle(np.int32(3)), oracle(x)])


def test_every_single_bit_and_every_exchange_is_noticed():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((8, 8)).astype(np.float32)
    stored = digest.compute({"x": jnp.asarray(x)})
    for bit in range(x.size * 32):
        changed = x.copy()
        changed.reshape(-1).view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
        assert digest.find_differences({"x": jnp.asarray(changed)}, stored) == ["x"]
    for _ in range(100):
        i, j = rng.choice(x.size, 2, replace=False)
        changed = x.copy().reshape(-1)
        changed[[i, j]] = changed[[j, i]]
        assert digest.find_differences({"x": jnp.asarray(changed.reshape(8, 8))}, stored) == ["x"]
    assert digest.find_differences({"x": jnp.asarray(x)}, stored) == []
    assert digest.find_differences({"x": jnp.asarray(x.T.copy())}, stored) == ["x"]


@pytest.mark.parametrize("spec", [P(), P("fsdp", "data")])
def test_makes_no_array_of_the_size_of_the_leaf(spec):
    placed = NamedSharding(mesh.make(MeshConfig(data=2, fsdp=4), jax.devices()), spec)
    for dtype in (jnp.float32, jnp.bfloat16):
        leaf = jax.ShapeDtypeStruct((2048, 1024), dtype, sharding=placed)
        compiled = digest._device_digests(placed).lower(leaf).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2**16
