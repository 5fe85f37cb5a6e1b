"""Facts about an experiment that do not depend on how it is sharded: arrays, FLOPs, activations.

They come from shapes only: nothing is compiled, and no data are read.
"""

# B batch, T time, D embed, H query heads, G key and value heads, K head_dim, F mlp, V vocab

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from spmd.analysis.plan.shardings import GROUPS, OTHER, owner
from spmd.core import narrow, tree
from spmd.hardware import flops
from spmd.models.transformer import Transformer
from spmd.parallel import sharding
from spmd.parallel.mesh import AXES, MeshConfig
from spmd.train.program import Program

if TYPE_CHECKING:
    from spmd.experiment.base import Experiment

FLOAT32_BYTES = 4
Sizes = Mapping[str, int]  # mesh axis -> size; all of AXES


class StateArray(NamedTuple):
    """An array of the state. dims, like: logical dims and shape of the parameter that it is sharded like
    (None: replicated on every device). drop: the dim of that parameter which a factored moment lacks, or -1.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    itemsize: int
    dims: tuple[str | None, ...] | None
    like: tuple[int, ...] | None
    drop: int = -1

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stacked(self) -> int:
        """Number of layers stacked in it; 0 for an array that is not stacked."""
        return self.shape[0] if self.dims and self.dims[0] == "layers" else 0

    def axes(self, mesh: AbstractMesh, fsdp: bool) -> tuple[str, ...]:
        """Mesh axes that shard it by the rules; ValueError if one does not divide."""
        return _axes(self, mesh, fsdp)

    def bytes(self, mesh: AbstractMesh, fsdp: bool) -> int:
        """Bytes on each device."""
        return _bytes(self, mesh, fsdp)

    @property
    def widening(self) -> int:
        """Bytes of its gradient per byte of the array: gradients are at least float32 (spmd.core.narrow)."""
        return max(self.itemsize, FLOAT32_BYTES) // self.itemsize


@functools.lru_cache(maxsize=2**16)
def _bytes(leaf: StateArray, mesh: AbstractMesh, fsdp: bool) -> int:
    num_shards = math.prod(mesh.shape[axis] for axis in leaf.axes(mesh, fsdp))
    return leaf.size * leaf.itemsize // num_shards


@functools.lru_cache(maxsize=2**16)  # a search asks for the same shardings thousands of times
def _axes(leaf: StateArray, mesh: AbstractMesh, fsdp: bool) -> tuple[str, ...]:
    if leaf.group == GROUPS["tables"]:  # rows over all devices
        return tuple(axis for axis in AXES if mesh.shape[axis] > 1)
    if leaf.like is None:
        return ()
    spec = sharding.spec_of(leaf.name, leaf.like, leaf.dims, mesh, fsdp=fsdp)
    parts = (part for dim, part in enumerate(spec) if dim != leaf.drop and part)
    return tuple(a for part in parts for a in (part if isinstance(part, tuple) else (part,)))


class Facts(NamedTuple):
    """An experiment as the planner sees it.

    tokens: tokens of a global batch (examples, where there is no sequence). length: tokens of a sequence, 1
    without one. flops: model FLOPs of a step by dtype of the operands. saved: bytes that the backward pass
    keeps of a global batch, for a model without closed forms. compute: bytes of an element of an activation.
    chunks: chunks of the loss. model: the config of a model with closed forms, else None. gradients: number
    of gradients of a step, one for each loss term where the task combines them.
    """

    name: str
    leaves: tuple[StateArray, ...]
    batch_size: int
    tokens: int
    length: int
    batch_bytes: int
    flops: dict[str, int]
    saved: int
    compute: int
    chunks: int
    model: Transformer | None
    gradients: int = 1

    @property
    def params(self) -> list[StateArray]:
        """Trained parameters."""
        return [leaf for leaf in self.leaves if leaf.group == GROUPS["params"]]

    @property
    def weights(self) -> list[StateArray]:
        """Trained and frozen parameters, which are sharded and gathered alike."""
        frozen = GROUPS["model_state"]
        return self.params + [x for x in self.leaves if x.group == frozen and x.like is not None]

    @property
    def num_params(self) -> int:
        """Number of elements of all parameters, frozen ones included."""
        return sum(leaf.size for leaf in self.weights)


def abstract_mesh(sizes: Sizes) -> AbstractMesh:
    """A mesh without devices; an axis that is not in `sizes` has size 1."""
    return _mesh(tuple(sizes.get(axis, 1) for axis in AXES))


@functools.lru_cache(maxsize=2**10)
def _mesh(sizes: tuple[int, ...]) -> AbstractMesh:
    return AbstractMesh(sizes, AXES)


def from_experiment(exp: Experiment) -> Facts:
    """The facts of `exp` that do not depend on its mesh; touches no device and reads no data."""
    unread = exp.unread(1)
    single = dataclasses.replace(
        unread,
        mesh=MeshConfig(data=1),
        train=dataclasses.replace(unread.train, accumulate=1),
    )
    return from_program(single.build(source=()), exp.model, chunks=getattr(exp.task, "chunks", 1))


def from_program(program: Program, model: Any, *, chunks: int = 1) -> Facts:
    """Facts of a built experiment; its mesh does not matter. model: its config; chunks: of its loss."""
    batch = program.abstract_batch()
    params = jax.tree.leaves(program.abstract_state().params)
    param = max((leaf.dtype for leaf in params), key=lambda dtype: dtype.itemsize)
    model = narrow.with_compute_type(model, str(param))
    transformer = model if isinstance(model, Transformer) else None
    shape = batch["tokens"].shape if "tokens" in batch else (program.data.batch_size, 1)
    counted = (
        transformer_flops(transformer, *shape)
        if transformer
        else flops.count_step(program.task, batch)
    )
    dtype = getattr(model, "dtype", "float32" if narrow.is_narrow(param) else "")
    return Facts(
        name=program.name,
        leaves=_leaves(program),
        batch_size=shape[0],
        tokens=shape[0] * shape[1],
        length=shape[1],
        batch_bytes=tree.num_bytes(batch),
        flops=dict(counted),
        saved=0 if transformer else _saved(program, batch),
        compute=jnp.dtype(dtype or param).itemsize,
        chunks=chunks,
        model=transformer,
        gradients=program.task.num_gradients,
    )


def _leaves(program: Program) -> tuple[StateArray, ...]:
    state, dims = program.abstract_state(), program.task.dims
    params = tree.named_leaves(state.params)
    leaves = []
    for name, leaf in tree.named_leaves(state).items():
        field, _, rest = name.partition("/")
        group = GROUPS.get(field, OTHER)
        in_model_state = group == GROUPS["model_state"]
        if in_model_state and rest in program.task.state_dims:  # frozen
            frozen_dims = program.task.state_dims[rest] or (None,) * len(leaf.shape)
            size = leaf.dtype.itemsize
            leaves.append(StateArray(rest, group, leaf.shape, size, frozen_dims, leaf.shape))
            continue
        unowned = in_model_state or group in (OTHER, GROUPS["tables"])
        param = "" if unowned else owner(rest, params)
        like = params[param].shape if param else None
        drop = -1
        if like is not None and leaf.shape != like:
            reduced = sharding.missing_dim(name, leaf.shape, like)
            like, drop = (None, -1) if reduced is None else (like, reduced)
        leaf_dims = dims.get(param) if like is not None else None
        leaf_dims = leaf_dims or ((None,) * len(like) if like is not None else None)
        itemsize = leaf.dtype.itemsize
        leaves.append(StateArray(rest or name, group, leaf.shape, itemsize, leaf_dims, like, drop))
    return tuple(leaves)


def _saved(program: Program, batch: Any) -> int:
    """Bytes of the residuals of the backward pass that have a row per example, without remat."""
    task = program.task
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    scale = jax.eval_shape(lambda b: task.scale(task.weigh(b)), batch)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def backward(params: Any, *rest: Any) -> Any:
        return jax.vjp(lambda p: task.loss(p, *rest)[0], params)[1]

    batch = task.with_rows(batch)
    residuals = jax.tree.leaves(jax.eval_shape(backward, params, model_state, batch, key, scale))
    rows = program.data.batch_size
    return sum(tree.num_bytes(leaf) for leaf in residuals if leaf.shape[:1] == (rows,))


# ---- the transformer


def widths(model: Transformer) -> dict[str, int]:
    """Elements per token of the activations of a block, by the names of model.saved, and of its residual."""
    query, key = model.heads * model.width, model.num_kv_heads * model.width
    hidden = model.mlp or 4 * model.embed
    if (
        model.experts.num
    ):  # the experts that a token is routed to; the router's matmul is not counted
        hidden *= model.experts.top_k + model.experts.shared
    gate = {"gate": hidden} if model.activation == "swiglu" else {}
    activations = {"query": query, "key": key, "value": key, "attended": query, "up": hidden}
    return {"residual": model.embed, **activations, **gate}


def matmul_flops(model: Transformer, length: int) -> dict[str, float]:
    """Forward FLOPs per token of the matmuls of a block, by the name of their output, and of the logits.

    attended: scores and their weighted sum, with the masked half included (the convention of PaLM); of a
    window only the keys in reach.
    """
    width = widths(model)
    matmuls = {name: 2.0 * model.embed * width[name] for name in width if name != "residual"}
    seen = [model.keys_seen(block, length) for block in range(model.layers)]
    matmuls["attended"] = 4.0 * width["query"] * statistics.fmean(seen)
    matmuls["out"] = 2.0 * width["query"] * model.embed
    matmuls["down"] = 2.0 * width["up"] * model.embed
    return matmuls | {"logits": 2.0 * model.embed * model.rows}


def transformer_flops(model: Transformer, batch_size: int, length: int) -> dict[str, int]:
    """Model FLOPs of a step, as flops.count_step counts them (frozen weights as if they were trained), but
    with attention included where a fused kernel hides it from the jaxpr, and without what XLA's attention
    computes beyond a window.
    """
    matmuls = matmul_flops(model, length)
    block = sum(count for name, count in matmuls.items() if name != "logits")
    total = 3 * batch_size * length * (model.layers * block + matmuls["logits"])
    return {model.dtype or "float32": int(total)}
