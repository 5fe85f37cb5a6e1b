"""A task of which only some parameters are trained: frozen arrays, low-rank adapters beside matrices.

What is frozen is no parameter of the new task: it lies in the model state, under `frozen`, cut over the mesh
as it was. So no strategy, optimizer, average or checkpoint needs to know.
"""

from __future__ import annotations

import math
import string
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd import optim
from spmd.core import narrow, tree
from spmd.core.fields import check
from spmd.parallel import scope
from spmd.tasks import FROZEN, Task
from spmd.weights.config import InitConfig, matching

PyTree = Any
ADAPTERS = ("lora_a", "lora_b")


class Shape(NamedTuple):
    """A kernel as a stack of matrices: the product a @ b of adapters [stack, inputs, rank] and [stack, rank,
    outputs] has its shape.
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def product(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a @ b, in float32 at least."""
        letters = iter(string.ascii_lowercase)
        stack, inputs, outputs = ("".join(next(letters) for _ in part) for part in self)
        spec = f"{stack}{inputs}z,{stack}z{outputs}->{stack}{inputs}{outputs}"
        return jnp.einsum(spec, a, b, preferred_element_type=tree.at_least_float32(a.dtype))


def adapt(task: Task, config: InitConfig) -> Task:
    """`task` with the parameters that `config` freezes in its model state, and with its adapters; ValueError
    when a pattern matches nothing, or when nothing is left to train.
    """
    if not (config.freeze or config.lora):
        return task
    abstract, state = jax.eval_shape(task.init, jax.random.key(0))
    check(FROZEN not in state, f"the model has a state of its own named {FROZEN!r}; rename it")
    shapes = tree.named_leaves(abstract)
    matrices = _adapted(shapes, task.dims, config) if config.lora else {}
    frozen = set(shapes) if config.lora else matching(shapes, config.freeze, "init.freeze")
    check(
        bool(matrices) or len(frozen) < len(shapes),
        f"init.freeze={' '.join(config.freeze)} leaves no parameter to train",
    )
    scale = (config.lora_alpha or config.lora) / max(config.lora, 1)

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        params, state = task.init(key)
        leaves = tree.named_leaves(params)
        trained = _picked(params, lambda name: name not in frozen)
        for name, shape in matrices.items():
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            pair = _drawn(own, shape, config.lora, leaves[name].dtype)
            trained = _with(trained, _leaf_path(params, name), pair)
        return trained, state | {FROZEN: _picked(params, frozen.__contains__)}

    def plain(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        rest = {k: v for k, v in state.items() if k != FROZEN}
        return task.plain(_joined(params, state[FROZEN], matrices, scale), rest)

    def loss(params, state, batch, step_key, scale):
        used = state | {FROZEN: scope.varying(state[FROZEN])}  # as the trained ones are
        total, (sums, new) = task.loss(*plain(params, used), batch, step_key, scale)
        return total, (sums, new | {FROZEN: state[FROZEN]})

    def dims_of(name: str) -> tuple[Any, ...] | None:
        return task.dims.get(name)

    return task._replace(
        init=init,
        dims={n: dims_of(n) for n in shapes if n not in frozen}
        | _adapter_dims(matrices, task.dims),
        state_dims={f"{FROZEN}/{n}": dims_of(n) for n in shapes if n in frozen},
        loss=loss,
        plain=plain,
        evaluate=lambda p, s, batch: task.evaluate(*plain(p, s), batch),
        predict=lambda p, s, batch: task.predict(*plain(p, s), batch),
        call=lambda p, s, fn: task.call(*plain(p, s), fn),
        staged=_unstaged,
    )


def _unstaged() -> Any:
    raise ValueError(
        "mesh.stage: a pipeline trains all layers, and init.freeze or init.lora leave some out; use"
        " --mesh.fsdp or --mesh.tensor for these, or --mesh.stage 1"
    )


def merged(kernel: jax.Array, a: jax.Array, b: jax.Array, shape: Shape, scale: float) -> jax.Array:
    """kernel + scale a @ b, added in float32 at least, as the kernel's type; of a narrow kernel in float32
    where the adapters are (in training), so that the gradient of the sum is.
    """
    wide = tree.at_least_float32(kernel.dtype)
    dtype = a.dtype if narrow.is_narrow(kernel.dtype) else kernel.dtype
    return (kernel.astype(wide) + scale * shape.product(a, b).astype(wide)).astype(dtype)


def shape_of(x: Any, dims: tuple[str | None, ...] | None) -> Shape:
    """How a kernel of these logical dims is a stack of matrices."""
    inputs, outputs = optim.matrix_axes(dims or (None,) * len(x.shape))
    stack = tuple(i for i in range(len(x.shape)) if i not in (*inputs, *outputs))
    return Shape(*(tuple(x.shape[i] for i in axes) for axes in (stack, inputs, outputs)))


def _adapted(shapes: Mapping[str, Any], dims: optim.Dims, config: InitConfig) -> dict[str, Shape]:
    """The matrices that get adapters, by name."""

    def is_matrix(name: str) -> bool:
        known = dims.get(name)
        return bool(optim.matrix_axes(known)[0]) if known else len(shapes[name].shape) >= 2

    def is_hidden(name: str) -> bool:
        known = dims.get(name)
        return not known or optim.is_hidden_matrix(known)

    if config.lora_match:
        names = [n for n in matching(shapes, config.lora_match, "init.lora_match") if is_matrix(n)]
    else:
        names = [n for n in shapes if is_matrix(n) and is_hidden(n)]
    given = f"init.lora_match={' '.join(config.lora_match)}" if config.lora_match else "the model"
    check(
        bool(names),
        f"{given} has no hidden matrix for adapters; name some with init.lora_match, of:"
        f" {', '.join(filter(is_matrix, shapes))}",
    )
    found = {}
    for name in sorted(names):
        shape = shape_of(shapes[name], dims.get(name))
        check(
            tuple(shapes[name].shape) == (*shape.stack, *shape.inputs, *shape.outputs),
            f"{name} of dims {dims.get(name)} has no adapters: its stacked dims do not stand first",
        )
        smaller = min(math.prod(shape.inputs), math.prod(shape.outputs))
        check(
            config.lora <= smaller,
            f"init.lora={config.lora} is more than {name} of shape {list(shapes[name].shape)} has rank:"
            f" at most {smaller}, or leave it out with init.lora_match",
        )
        found[name] = shape
    return found


def _adapter_dims(matrices: Mapping[str, Shape], dims: optim.Dims) -> dict[str, Any]:
    """Logical dims of the adapters: those of their matrix, none for the rank."""
    found: dict[str, Any] = {}
    for name, shape in matrices.items():
        known = dims.get(name)
        if known is None:
            found |= {f"{name}/{part}": None for part in ADAPTERS}
            continue
        stack, inside = len(shape.stack), len(shape.stack) + len(shape.inputs)
        found[f"{name}/lora_a"] = (*known[:inside], None)
        found[f"{name}/lora_b"] = (*known[:stack], None, *known[inside:])
    return found


def _drawn(key: jax.Array, shape: Shape, rank: int, dtype: Any) -> dict[str, jax.Array]:
    """An adapter that adds nothing yet: a is drawn, b is 0."""
    std = math.prod(shape.inputs) ** -0.5
    a = std * jax.random.normal(
        key, (*shape.stack, *shape.inputs, rank), tree.at_least_float32(dtype)
    )
    return {
        "lora_a": a.astype(dtype),
        "lora_b": jnp.zeros((*shape.stack, rank, *shape.outputs), dtype),
    }


# ---- nested dicts


def _picked(params: PyTree, keep: Any, prefix: str = "") -> PyTree:
    """The leaves whose names `keep` takes; no empty dicts."""
    found = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            if inner := _picked(value, keep, f"{name}/"):
                found[key] = inner
        elif keep(name):
            found[key] = value
    return found


def _leaf_path(params: PyTree, name: str) -> tuple[Any, ...]:
    """The keys that lead to the leaf of a path name."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    return next(tuple(k.key for k in path) for path, _ in flat if tree.path_name(path) == name)


def _with(params: PyTree, path: tuple[Any, ...], value: Any) -> PyTree:
    """A copy with `value` at `path`."""
    first, *rest = path
    inner = _with(params.get(first, {}), tuple(rest), value) if rest else value
    return params | {first: inner}


def _joined(
    trained: PyTree, frozen: PyTree, matrices: Mapping[str, Shape], scale: float, prefix: str = ""
) -> PyTree:
    """The parameters of the model itself, adapters added to their matrices."""
    found = {}
    for key in {**frozen, **trained}:
        name = f"{prefix}{key}"
        if key not in frozen or key not in trained:
            found[key] = trained[key] if key in trained else frozen[key]
        elif name in matrices:
            a, b = (trained[key][part] for part in ADAPTERS)
            found[key] = merged(frozen[key], a, b, matrices[name], scale)
        else:
            found[key] = _joined(trained[key], frozen[key], matrices, scale, f"{name}/")
    return found
