"""Tasks with frozen parameters and low-rank adapters.

Frozen arrays are no parameters of the adapted task: they are part of its model state, under `frozen`, with
the same shardings. So no strategy, optimizer, average or checkpoint treats them specially.
"""

from __future__ import annotations

import math
import string
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd import optim
from spmd.core import narrow, tree
from spmd.core.fields import check, match_names
from spmd.parallel import scope
from spmd.tasks import FROZEN, VARIABLES, Objective
from spmd.weights import quantized
from spmd.weights.config import InitConfig

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


def adapt(task: Objective, config: InitConfig) -> Objective:
    """A task whose frozen parameters are model state, and whose adapters are parameters.

    Raises:
        ValueError: a pattern matches nothing, or no parameter is left to train.
    """
    if not (config.freeze or config.lora):
        return task
    abstract, state = jax.eval_shape(task.init, jax.random.key(0))
    check(FROZEN not in state, f"the model has a state of its own named {FROZEN!r}; rename it")
    shapes = tree.named_leaves(abstract)
    matrices = _adapted_matrices(shapes, task.dims, config) if config.lora else {}
    frozen = _frozen_names(shapes, config)
    scale = (config.lora_alpha or config.lora) / max(config.lora, 1)
    axes = _stored_axes(shapes, task.dims) if config.quantize != "none" else {}
    dtypes = {name: shapes[name].dtype for name in axes}
    # The trained model as it starts is its base: no second copy of the parameters.
    based = tuple(f"{FROZEN}/{name}" for name in task.initial) if config.lora else ()

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        params, state = task.init(key)
        leaves = tree.named_leaves(params)
        trained = _pick(params, lambda name: name not in frozen)
        for name, shape in matrices.items():
            adapter_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            pair = _draw_adapter(adapter_key, shape, config.lora, leaves[name].dtype)
            trained = _insert(trained, _leaf_path(params, name), pair)
        base = quantized.store(_pick(params, frozen.__contains__), axes)
        return trained, _drop_copies(state, based) | {FROZEN: base}

    def join(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        model_state = {k: v for k, v in state.items() if k != FROZEN}
        base = quantized.restore(state[FROZEN], dtypes)
        model_state = _share_base(model_state, based, base)
        return _join(params, base, matrices, scale), model_state

    def loss(params, state, batch, step_key, scale):
        varying = state | {FROZEN: scope.mark_varying(state[FROZEN])}  # typed as trained ones
        joined, model_state = join(params, varying)
        base = quantized.restore(state[FROZEN], dtypes) if based else {}
        shared = _share_base(model_state, based, base)  # typed by the task
        total, (sums, new) = task.loss(joined, shared, batch, step_key, scale)
        return total, (sums, _drop_copies(new, based) | {FROZEN: state[FROZEN]})

    def dims_of(name: str) -> tuple[Any, ...] | None:
        return task.dims.get(name)

    return task._replace(
        init=init,
        dims={n: dims_of(n) for n in shapes if n not in frozen}
        | _adapter_dims(matrices, task.dims),
        state_dims=_drop_dims(task.state_dims, based) | _base_dims(task.dims, frozen, axes),
        loss=loss,
        plain=lambda p, s: task.plain(*join(p, s)),
        evaluate=lambda p, s, batch: task.evaluate(*join(p, s), batch),
        predict=lambda p, s, batch: task.predict(*join(p, s), batch),
        call=lambda p, s, fn: task.call(*join(p, s), fn),
        staged=_refuse_stages,
    )


def _frozen_names(shapes: Mapping[str, Any], config: InitConfig) -> set[str]:
    """The parameters that are not trained; ValueError where none would be."""
    if config.lora:
        return {name for name in shapes if not name.startswith(f"{VARIABLES}/")}
    frozen = set(match_names(shapes, config.freeze, "init.freeze"))
    check(
        len(frozen) < len(shapes),
        f"init.freeze={' '.join(config.freeze)} leaves no parameter to train",
    )
    return frozen


def _stored_axes(shapes: Mapping[str, Any], dims: optim.Dims) -> dict[str, tuple[int, ...]]:
    """Name -> input dims of the matrices that are stored in int8: the hidden ones."""
    hidden = {n: of for n in shapes if (of := dims.get(n)) and optim.is_hidden_matrix(of)}
    check(bool(hidden), "init.quantize: the model has no hidden matrix with logical dims to store")
    return {name: optim.matrix_axes(of)[0] for name, of in hidden.items()}


def _drop_copies(state: PyTree, based: Sequence[str]) -> PyTree:
    """A model state without the parameters of frozen models that are the base of the adapters."""
    return state | {name: {k: v for k, v in state[name].items() if k != "params"} for name in based}


def _share_base(state: PyTree, based: Sequence[str], base: PyTree) -> PyTree:
    """A model state in which these frozen models have the parameters of the base."""
    return state | {name: state[name] | {"params": base} for name in based}


def _base_dims(
    dims: optim.Dims, frozen: Collection[str], axes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The dims of the base in the model state, by the name of each array there."""
    found = {f"{FROZEN}/{n}": dims.get(n) for n in frozen if n not in axes}
    for name, of in axes.items():
        found |= quantized.stored_dims(f"{FROZEN}/{name}", dims.get(name), of)
    return found


def _drop_dims(dims: Mapping[str, Any], based: Sequence[str]) -> dict[str, Any]:
    """The dims of a model state without those parameters."""
    dropped = tuple(f"{name}/params/" for name in based)
    return {name: of for name, of in dims.items() if not name.startswith(dropped)}


def _refuse_stages() -> Any:
    raise ValueError(
        "mesh.stage: a pipeline trains all layers, and init.freeze or init.lora leave some out; use"
        " --mesh.fsdp or --mesh.tensor for these, or --mesh.stage 1"
    )


def merge(kernel: jax.Array, a: jax.Array, b: jax.Array, shape: Shape, scale: float) -> jax.Array:
    """kernel + scale a @ b, added in float32 at least, in the kernel's type.

    For a narrow kernel the result has the adapters' type, float32 in training, as then does its gradient.
    """
    sum_dtype = tree.at_least_float32(kernel.dtype)
    dtype = a.dtype if narrow.is_narrow(kernel.dtype) else kernel.dtype
    return (kernel.astype(sum_dtype) + scale * shape.product(a, b).astype(sum_dtype)).astype(dtype)


def stack_shape(x: Any, dims: tuple[str | None, ...] | None) -> Shape:
    """The shape of a kernel with these logical dims as a stack of matrices."""
    inputs, outputs = optim.matrix_axes(dims or (None,) * len(x.shape))
    stack = tuple(i for i in range(len(x.shape)) if i not in (*inputs, *outputs))
    return Shape(*(tuple(x.shape[i] for i in axes) for axes in (stack, inputs, outputs)))


def _adapted_matrices(
    shapes: Mapping[str, Any], dims: optim.Dims, config: InitConfig
) -> dict[str, Shape]:
    """Name -> shape of the matrices that have adapters."""

    def is_matrix(name: str) -> bool:
        leaf_dims = dims.get(name)
        return bool(optim.matrix_axes(leaf_dims)[0]) if leaf_dims else len(shapes[name].shape) >= 2

    def is_hidden(name: str) -> bool:
        leaf_dims = dims.get(name)
        return not leaf_dims or optim.is_hidden_matrix(leaf_dims)

    if config.lora_match:
        names = [
            n for n in match_names(shapes, config.lora_match, "init.lora_match") if is_matrix(n)
        ]
    else:
        names = [n for n in shapes if is_matrix(n) and is_hidden(n)]
    subject = f"init.lora_match={' '.join(config.lora_match)}" if config.lora_match else "the model"
    check(
        bool(names),
        f"{subject} has no hidden matrix for adapters; name some with init.lora_match, of:"
        f" {', '.join(filter(is_matrix, shapes))}",
    )
    matrices = {}
    for name in sorted(names):
        shape = stack_shape(shapes[name], dims.get(name))
        check(
            tuple(shapes[name].shape) == (*shape.stack, *shape.inputs, *shape.outputs),
            f"{name} of dims {dims.get(name)} has no adapters: its stacked dims do not stand first",
        )
        max_rank = min(math.prod(shape.inputs), math.prod(shape.outputs))
        check(
            config.lora <= max_rank,
            f"init.lora={config.lora} is more than the rank of {name} of shape {list(shapes[name].shape)}:"
            f" at most {max_rank}, or leave it out with init.lora_match",
        )
        matrices[name] = shape
    return matrices


def _adapter_dims(matrices: Mapping[str, Shape], dims: optim.Dims) -> dict[str, Any]:
    """Logical dims of the adapters: those of their matrix, None for the rank."""
    adapter_dims: dict[str, Any] = {}
    for name, shape in matrices.items():
        kernel_dims = dims.get(name)
        if kernel_dims is None:
            adapter_dims |= {f"{name}/{part}": None for part in ADAPTERS}
            continue
        stack, inside = len(shape.stack), len(shape.stack) + len(shape.inputs)
        adapter_dims[f"{name}/lora_a"] = (*kernel_dims[:inside], None)
        adapter_dims[f"{name}/lora_b"] = (*kernel_dims[:stack], None, *kernel_dims[inside:])
    return adapter_dims


def _draw_adapter(key: jax.Array, shape: Shape, rank: int, dtype: Any) -> dict[str, jax.Array]:
    """An initial adapter, whose product is 0: a is drawn, b is 0."""
    std = math.prod(shape.inputs) ** -0.5
    a = std * jax.random.normal(
        key, (*shape.stack, *shape.inputs, rank), tree.at_least_float32(dtype)
    )
    return {
        "lora_a": a.astype(dtype),
        "lora_b": jnp.zeros((*shape.stack, rank, *shape.outputs), dtype),
    }


# ---- nested dicts


def _pick(params: PyTree, keep: Any, prefix: str = "") -> PyTree:
    """The leaves whose names `keep` accepts, without empty dicts."""
    picked = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            if inner := _pick(value, keep, f"{name}/"):
                picked[key] = inner
        elif keep(name):
            picked[key] = value
    return picked


def _leaf_path(params: PyTree, name: str) -> tuple[Any, ...]:
    """The keys of the leaf with a path name."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    return next(tuple(k.key for k in path) for path, _ in flat if tree.path_name(path) == name)


def _insert(params: PyTree, path: tuple[Any, ...], value: Any) -> PyTree:
    """A copy with `value` at `path`."""
    first, *rest = path
    inner = _insert(params.get(first, {}), tuple(rest), value) if rest else value
    return params | {first: inner}


def _join(
    trained: PyTree, frozen: PyTree, matrices: Mapping[str, Shape], scale: float, prefix: str = ""
) -> PyTree:
    """The parameters of the unadapted model, adapters added to their matrices."""
    joined = {}
    for key in {**frozen, **trained}:
        name = f"{prefix}{key}"
        if key not in frozen or key not in trained:
            joined[key] = trained[key] if key in trained else frozen[key]
        elif name in matrices:
            a, b = (trained[key][part] for part in ADAPTERS)
            joined[key] = merge(frozen[key], a, b, matrices[name], scale)
        else:
            joined[key] = _join(trained[key], frozen[key], matrices, scale, f"{name}/")
    return joined
