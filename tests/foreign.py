"""What tests of Hugging Face's directories share: arrays on eight devices, drawn parameters."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import numpy as np
import pytest

from spmd.core import tree
from spmd.models.functional import functionalize
from spmd.parallel import mesh, sharding
from spmd.weights.huggingface import read

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None,
    reason="needs requirements/peers.txt",
)


def wanted_of(model: Any) -> Any:
    """Shapes and shardings of the parameters on fsdp=4 tensor=2."""
    cut = mesh.make(mesh.MeshConfig(data=1, fsdp=4, tensor=2), jax.devices())
    net = functionalize(model)
    params, _ = jax.eval_shape(net.init, jax.random.key(0))
    placed = sharding.param_shardings(params, net.dims, cut, fsdp=True)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), params, placed
    )


def read_onto_a_mesh(path: Any, model: Any) -> Any:
    """The parameters of a directory, sharded."""
    source, wanted = read.find(path, model), wanted_of(model)
    named = tree.named_leaves({"params": wanted})
    source.check(named)
    got = source.read(named)
    return tree.map_named(lambda name, _: got[f"params/{name}"], wanted)


def drawn(model: Any, deviation: float) -> Any:
    """Parameters whose every value is drawn: zeros and ones would fit any array."""
    rng = np.random.default_rng(1)
    shapes, _ = jax.eval_shape(functionalize(model).init, jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(0.1, deviation, x.shape).astype(np.float32), shapes)
