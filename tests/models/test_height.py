"""Windows over images whose rows are sharded: values and gradients are those of one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from spmd.models.layers import max_pool
from spmd.models.layers.conv import Conv
from spmd.models.resnet import ResNet
from spmd.parallel import collectives, mesh, scope, sharding

WINDOWS = [(3, 1), (1, 1), (2, 1), (7, 2), (3, 2), (1, 2), (2, 2)]
POOLS = [(2, 0), (3, 2), (3, 1)]
IMAGES = np.random.default_rng(0).normal(size=(4, 16, 10, 4))


@pytest.mark.parametrize("before, after, fill", [(1, 1, 0.0), (2, 0, -np.inf), (0, 3, -np.inf)])
def test_halo_by_its_definition(before, after, fill, devices):
    x = np.random.default_rng(0).normal(size=(2, 12, 3)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (before, after), (0, 0)), constant_values=fill)
    want = [padded[:, 3 * i : 3 * i + 3 + before + after] for i in range(4)]
    halo = lambda x: collectives.exchange_halo(x, ("x",), before, after, dim=1, fill=fill)
    four = jax.sharding.Mesh(np.array(devices[:4]), ("x",))
    run = jax.shard_map(halo, mesh=four, in_specs=P(None, "x"), out_specs=P(None, "x"))
    np.testing.assert_array_equal(jax.jit(run)(x), np.concatenate(want, 1))


MESHES = [
    mesh.MeshConfig(data=1, fsdp=2, context=2, tensor=2),
    pytest.param(mesh.MeshConfig(data=2, context=4), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("config", MESHES)
def test_convolutions_and_pools_of_sharded_rows(config, devices):
    """Channels sharded on the way in, on the way out or not at all."""
    cut = mesh.make(config, devices)
    kinds = [("channels", "features"), ("features", "channels"), ("channels", "channels")]
    convs = [
        Conv(nnx.Rngs(i), size, 4, 8, stride=stride, dims=kinds[i % 3])
        for i, (size, stride) in enumerate([*WINDOWS, *WINDOWS[:2]])
    ]
    with jax.enable_x64(True):
        kernels = [jnp.asarray(conv.kernel[...], jnp.float64) for conv in convs]
        graphs = [nnx.split(conv)[0] for conv in convs]
        x = jnp.asarray(IMAGES)

        def total(kernels, x):
            outputs = []
            for graph, conv, kernel in zip(graphs, convs, kernels, strict=True):
                x_BHWC = scope.constrain(x, "batch", "height", None, conv.dims[0])
                outputs.append(nnx.merge(graph, nnx.State({"kernel": nnx.Param(kernel)}))(x_BHWC))
            outputs += [max_pool(x, *window) for window in POOLS]
            return sum(jnp.sum(jnp.sin(y)) for y in outputs), outputs

        gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)

        def on_the_mesh(kernels, x):
            with scope.bind(**sharding.placement(cut)):
                return gradients(kernels, x)

        got = jax.jit(on_the_mesh)(kernels, x)
        want = jax.jit(gradients)(kernels, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_rows_that_do_not_divide_are_refused(devices):
    cut = mesh.make(mesh.MeshConfig(data=1, context=4), devices[:4])
    model = ResNet(depth=20, width=4)
    message = r"mesh.context=4 .* does not divide their 18 rows; use one of 1, 2, 3, 6, 9, 18"
    with scope.bind(**sharding.placement(cut)), pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: model.build(nnx.Rngs(0))(jnp.zeros((4, 18, 16, 3))))
