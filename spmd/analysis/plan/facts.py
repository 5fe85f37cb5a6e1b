"""Facts about an experiment that do not depend on how it is sharded: arrays, FLOPs, activations.

They come from shapes only: nothing is compiled, and no data are read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from spmd.analysis.plan.blocks import BlockModel, block_model, declared_stacks
from spmd.analysis.plan.shardings import GROUPS, OTHER, owner
from spmd.analysis.plan.tables import StackFacts, table_facts
from spmd.core import narrow, tree
from spmd.hardware import flops
from spmd.parallel import sharding
from spmd.parallel.mesh import AXES, MeshConfig
from spmd.parallel.tables import is_replicated
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
    if leaf.group == GROUPS["tables"] and is_replicated(leaf.name.split("/")[0]):
        return ()
    if leaf.group == GROUPS["tables"]:  # rows over all devices
        return tuple(axis for axis in AXES if mesh.shape[axis] > 1)
    if leaf.like is None:
        return ()
    spec = sharding.spec_of(leaf.name, leaf.like, leaf.dims, mesh, fsdp=fsdp)
    parts = (part for dim, part in enumerate(spec) if dim != leaf.drop and part)
    return tuple(a for part in parts for a in (part if isinstance(part, tuple) else (part,)))


class Facts(NamedTuple):
    """An experiment as the planner sees it.

    tokens: tokens of a global batch (examples, where there is no sequence), of the last stack of several.
    length: tokens of such a sequence, 1 without one. flops: model FLOPs of a step by dtype of the operands.
    saved: bytes that the backward pass keeps of a global batch, for a model without closed forms. compute:
    bytes of an element of an activation. chunks: chunks of the loss. model: the blocks of a model with closed
    forms, else None. gradients: number of gradients of a step, one for each loss term where the task combines
    them. tables: stacks of sparse tables.
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
    model: BlockModel | None
    gradients: int = 1
    tables: tuple[StackFacts, ...] = ()

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
    program = single.build(source=())
    inputs = jax.eval_shape(exp.task.inputs, program.task.with_rows(program.abstract_batch()))
    chunks = getattr(exp.task, "chunks", 1)
    return from_program(program, exp.model, inputs=inputs, chunks=chunks)


def from_program(
    program: Program, model: Any, *, inputs: Sequence[Any] | None = None, chunks: int = 1
) -> Facts:
    """Facts of a built experiment; its mesh does not matter.

    Args:
        program: the experiment, built.
        model: its config.
        inputs: shapes of what the model is called with; by default the feature `tokens`.
        chunks: of its loss.
    """
    batch = program.abstract_batch()
    params = jax.tree.leaves(program.abstract_state().params)
    param = max((leaf.dtype for leaf in params), key=lambda dtype: dtype.itemsize)
    model, leaves = narrow.with_compute_type(model, str(param)), _leaves(program)
    blocks = _block_model(model, inputs or [batch.get("tokens")], leaves)
    rows = program.data.batch_size
    length = blocks.lengths[-1] if blocks else 1
    if blocks is None and "tokens" in batch:
        length = batch["tokens"].shape[1]
    counted = flops.count_step(program.task, batch) if blocks is None else {}
    dtype = getattr(model, "dtype", "float32" if narrow.is_narrow(param) else "")
    return Facts(
        name=program.name,
        leaves=leaves,
        batch_size=rows,
        tokens=rows * length,
        length=length,
        batch_bytes=tree.num_bytes(batch),
        flops=dict(counted) if blocks is None else {blocks.dtype: blocks.flops(rows)},
        saved=0 if blocks else _saved(program, batch),
        compute=jnp.dtype(dtype or param).itemsize,
        chunks=chunks,
        model=blocks,
        gradients=program.task.num_gradients,
        tables=table_facts(
            program.task.tables,
            batch,
            program.abstract_state().tables,
            jnp.dtype(program.task.row_dtype).itemsize,
        ),
    )


def _block_model(
    model: Any, inputs: Sequence[Any], leaves: tuple[StateArray, ...]
) -> BlockModel | None:
    """The model in closed forms, its rows of logits from the shape of its head."""
    if not declared_stacks(model):
        return None
    dims = head_dims(getattr(model, "tied", False))
    heads = [leaf for leaf in leaves if leaf.like is not None and leaf.dims == dims]
    rows = heads[0].like[dims.index("vocab")] if heads and heads[0].like else 0
    return block_model(model, inputs, rows)


def head_dims(tied: bool) -> tuple[str, str]:
    """Logical dims of the array whose matmul gives the logits."""
    return ("vocab", "embed") if tied else ("embed", "vocab")


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
