"""What the planner knows of an experiment before it is cut: its arrays, its FLOPs, its activations.

Shapes only: nothing is compiled, and no data are read.
"""

# B batch, T time, D embed, H query heads, G key and value heads, K head_dim, F mlp, V vocab

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from spmd import flops, narrow, sharding, tree
from spmd.mesh import AXES
from spmd.models.transformer import Transformer
from spmd.plan.shardings import GROUPS, OTHER, owner
from spmd.train.program import Program

FLOAT32 = 4  # bytes
Sizes = Mapping[str, int]  # mesh axis -> size; all of AXES


class Leaf(NamedTuple):
    """An array of the state. dims, like: logical dims and shape of the parameter whose cut it takes (None:
    it lies whole on every device); drop: the dim of that parameter which a factored moment lacks, or -1.
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
        """Elements."""
        return math.prod(self.shape)

    @property
    def stacked(self) -> int:
        """Layers that it holds, stacked; 0 for an array of one."""
        return self.shape[0] if self.dims and self.dims[0] == "layers" else 0

    def axes(self, mesh: AbstractMesh, fsdp: bool) -> tuple[str, ...]:
        """The mesh axes that cut it, by the rules; ValueError when one does not divide."""
        return _axes(self, mesh, fsdp)

    def bytes(self, mesh: AbstractMesh, fsdp: bool) -> int:
        """On each device."""
        return _bytes(self, mesh, fsdp)

    @property
    def widening(self) -> int:
        """Bytes of its gradient for each byte of it: gradients are float32 at least (spmd.narrow)."""
        return max(self.itemsize, FLOAT32) // self.itemsize


@functools.lru_cache(maxsize=2**16)
def _bytes(leaf: Leaf, mesh: AbstractMesh, fsdp: bool) -> int:
    ways = math.prod(mesh.shape[axis] for axis in leaf.axes(mesh, fsdp))
    return leaf.size * leaf.itemsize // ways


@functools.lru_cache(maxsize=2**16)  # a search asks for the same cuts thousands of times
def _axes(leaf: Leaf, mesh: AbstractMesh, fsdp: bool) -> tuple[str, ...]:
    if leaf.like is None:
        return ()
    spec = sharding.spec_of(leaf.name, leaf.like, leaf.dims, mesh, fsdp=fsdp)
    parts = (part for dim, part in enumerate(spec) if dim != leaf.drop and part)
    return tuple(a for part in parts for a in (part if isinstance(part, tuple) else (part,)))


class Facts(NamedTuple):
    """An experiment. tokens: of a global batch (examples, where there is no sequence). length: tokens of a
    sequence, 1 without. flops: of one step's model, by dtype of the operands. saved: bytes that the backward
    pass of an unknown model keeps of the whole batch. compute: bytes of an activation. chunks: of the loss.
    model: the config where the planner knows it by heart, else None.
    """

    name: str
    leaves: tuple[Leaf, ...]
    batch_size: int
    tokens: int
    length: int
    batch_bytes: int
    flops: dict[str, int]
    saved: int
    compute: int
    chunks: int
    model: Transformer | None

    @property
    def params(self) -> list[Leaf]:
        """The parameters that are trained."""
        return [leaf for leaf in self.leaves if leaf.group == GROUPS["params"]]

    @property
    def weights(self) -> list[Leaf]:
        """The parameters, and those that are frozen: they are cut and gathered alike."""
        frozen = GROUPS["model_state"]
        return self.params + [x for x in self.leaves if x.group == frozen and x.like is not None]

    @property
    def num_params(self) -> int:
        """Elements of all parameters, frozen ones too."""
        return sum(leaf.size for leaf in self.weights)


def abstract_mesh(sizes: Sizes) -> AbstractMesh:
    """A mesh without devices; an axis that is not given has size 1."""
    return _mesh(tuple(sizes.get(axis, 1) for axis in AXES))


@functools.lru_cache(maxsize=2**10)
def _mesh(sizes: tuple[int, ...]) -> AbstractMesh:
    return AbstractMesh(sizes, AXES)


def of(program: Program, model: Any, *, chunks: int = 1) -> Facts:
    """Facts of a program, built on any devices: their cut does not matter. model: the experiment's config;
    chunks: of its loss.
    """
    batch = program.abstract_batch()
    params = jax.tree.leaves(program.abstract_state().params)
    param = max((leaf.dtype for leaf in params), key=lambda dtype: dtype.itemsize)
    model = narrow.with_compute_type(model, str(param))
    known = model if isinstance(model, Transformer) else None
    shape = batch["tokens"].shape if "tokens" in batch else (program.data.batch_size, 1)
    counted = transformer_flops(known, *shape) if known else flops.of_step(program.task, batch)
    dtype = getattr(model, "dtype", "float32" if narrow.is_narrow(param) else "")
    return Facts(
        name=program.name,
        leaves=_leaves(program),
        batch_size=shape[0],
        tokens=shape[0] * shape[1],
        length=shape[1],
        batch_bytes=tree.num_bytes(batch),
        flops=dict(counted),
        saved=0 if known else _saved(program, batch),
        compute=jnp.dtype(dtype or param).itemsize,
        chunks=chunks,
        model=known,
    )


def _leaves(program: Program) -> tuple[Leaf, ...]:
    whole, dims = program.abstract_state(), program.task.dims
    params = tree.named_leaves(whole.params)
    found = []
    for name, leaf in tree.named_leaves(whole).items():
        field, _, rest = name.partition("/")
        group = GROUPS.get(field, OTHER)
        state = group == GROUPS["model_state"]
        if state and rest in program.task.state_dims:  # frozen
            dims_of = program.task.state_dims[rest] or (None,) * len(leaf.shape)
            size = leaf.dtype.itemsize
            found.append(Leaf(rest, group, leaf.shape, size, dims_of, leaf.shape))
            continue
        owned = owner(rest, params) if group != OTHER and not state else ""
        like = params[owned].shape if owned else None
        drop = -1
        if like is not None and leaf.shape != like:
            reduced = sharding.reduced_dim(name, leaf.shape, like)
            like, drop = (None, -1) if reduced is None else (like, reduced)
        known = dims.get(owned) if like is not None else None
        known = known or ((None,) * len(like) if like is not None else None)
        itemsize = leaf.dtype.itemsize
        found.append(Leaf(rest or name, group, leaf.shape, itemsize, known, like, drop))
    return tuple(found)


def _saved(program: Program, batch: Any) -> int:
    """Bytes of what the backward pass keeps and has a row for each example, without any remat."""
    task = program.task
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    scale = jax.eval_shape(lambda b: task.scale(task.weigh(b)), batch)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def backward(params: Any, *rest: Any) -> Any:
        return jax.vjp(lambda p: task.loss(p, *rest)[0], params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, params, model_state, batch, key, scale))
    rows = program.data.batch_size
    return sum(tree.num_bytes(leaf) for leaf in kept if leaf.shape[:1] == (rows,))


# ---- the transformer


def widths(model: Transformer) -> dict[str, int]:
    """Elements for each token of what a block makes, by the names of model.saved, and of its residual."""
    query, key = model.heads * model.width, model.num_kv_heads * model.width
    wide = model.mlp or 4 * model.embed
    if model.experts.num:  # those that a token goes to; the router's own product is left out
        wide *= model.experts.top_k + model.experts.shared
    gate = {"gate": wide} if model.activation == "swiglu" else {}
    made = {"query": query, "key": key, "value": key, "attended": query, "up": wide}
    return {"residual": model.embed, **made, **gate}


def products(model: Transformer, length: int) -> dict[str, float]:
    """FLOPs for each token, forward, of one block's products by what they make, and of the logits.

    attended: scores and their weighted sum, counted whole though half is masked (PaLM's convention).
    """
    wide = widths(model)
    made = {name: 2.0 * model.embed * wide[name] for name in wide if name != "residual"}
    made["attended"] = 4.0 * wide["query"] * length
    made["out"] = 2.0 * wide["query"] * model.embed
    made["down"] = 2.0 * wide["up"] * model.embed
    return made | {"logits": 2.0 * model.embed * model.rows}


def transformer_flops(model: Transformer, batch_size: int, length: int) -> dict[str, int]:
    """Model FLOPs of a step, as flops.of_step counts them (frozen weights as if they were trained); attention
    too where a fused kernel hides it.
    """
    made = products(model, length)
    block = sum(count for name, count in made.items() if name != "logits")
    total = 3 * batch_size * length * (model.layers * block + made["logits"])
    return {model.dtype or "float32": int(total)}
