"""Logical dims -> mesh axes -> NamedShardings, for any abstract pytree."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import tree
from spmd.core.fields import check, closest
from spmd.parallel.mesh import BATCH_AXES

PyTree = Any
Dims = tuple[str | None, ...]

# Mesh axes that shard each logical dim. `fsdp` is absent on purpose: it shards the largest free dim that it
# divides, since for a parameter that is gathered before use any dim will do.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "time": ("context",),
    "residual_time": ("context",),  # between the blocks: see sequence_parallel
    "position": (),
    "layers": ("stage",),
    "embed": (),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "choice": (),  # the router's outputs: each device chooses among all experts
    "height": ("context",),  # rows of images between convolutions, never of parameters
    "conv": (),
    "input": (),
    "channels": (),
    "features": ("tensor",),  # channels between the convolutions of a pair
    "classes": (),
}


def sequence_parallel(rules: Mapping[str, tuple[str, ...]] = RULES) -> dict[str, tuple[str, ...]]:
    """Rules that also shard norms and residuals over `tensor`, along time (Korthikanti et al. 2022,
    arXiv 2205.05198).
    """
    return {**rules, "residual_time": (*rules["residual_time"], "tensor")}


def whole_sequences(rules: Mapping[str, tuple[str, ...]] = RULES) -> dict[str, tuple[str, ...]]:
    """Rules without sequence sharding, for decoding: a prompt may have any length."""
    return {**rules, "time": (), "residual_time": ()}


def unknown_dim(name: str, dim: str, names: Iterable[str] = ()) -> ValueError:
    """The error for a dim that is none of RULES nor of `names`; name, dim: of the array, and its dim."""
    known = [*names, *RULES]
    return ValueError(
        f"{name}: unknown logical dim {dim!r}.{closest(dim, known)} Known: {', '.join(known)}; a dim of the"
        f' model\'s own follows one of them: follows = {{"{dim}": "vocab"}} in the model\'s config'
    )


# Below this, one all-gather costs more than the memory it saves.
MIN_FSDP_ELEMENTS = 1024

# An optimizer-state leaf of up to this many bytes may be replicated on a mesh that shards parameters.
MAX_REPLICATED_BYTES = 2**20


def spec_of(
    name: str,
    shape: Sequence[int],
    dims: Dims | None,
    mesh: Mesh | AbstractMesh,
    *,
    fsdp: bool,
    rules: Mapping[str, tuple[str, ...]] = RULES,
) -> P:
    """The PartitionSpec of an array.

    Args:
        name: for messages.
        shape, dims: of the array, a logical dim or None for each of its dims; dims None: it has none.
        mesh: its axes of size 1 shard nothing.
        fsdp: whether the largest free dim is sharded over `fsdp` too.
        rules: mesh axes by logical dim.

    Raises:
        ValueError: two dims take one axis, or a size does not divide.
    """
    if dims is None:
        dims = (None,) * len(shape)
    check(
        len(dims) == len(shape), f"{name}: {len(dims)} logical dims {dims} for shape {tuple(shape)}"
    )
    owners: dict[str, str] = {}
    spec: list[Any] = []
    for dim, size in zip(dims, shape, strict=True):
        if (
            dim is not None and dim not in rules
        ):  # first, since a search calls this thousands of times
            raise unknown_dim(name, dim)
        axes = tuple(a for a in (rules[dim] if dim else ()) if mesh.shape[a] > 1)
        for axis in axes:
            check(
                axis not in owners,
                f"{name}: dims {owners.get(axis)!r} and {dim!r} both want mesh axis {axis!r}",
            )
            owners[axis] = str(dim)
        num_shards = int(np.prod([mesh.shape[a] for a in axes]))
        check(
            size % num_shards == 0,
            f"{name}: dim {dim!r} of size {size} does not divide by"
            f" {' * '.join(f'mesh.{a}={mesh.shape[a]}' for a in axes)}; it divides by"
            f" {', '.join(str(n) for n in range(1, min(size, mesh.size) + 1) if size % n == 0)}",
        )
        spec.append(axes if len(axes) > 1 else axes[0] if axes else None)
    if fsdp:
        _shard_largest(spec, shape, dims, ("fsdp",), mesh)
    return P(*spec)


def _shard_largest(
    spec: list[Any],
    shape: Sequence[int],
    dims: Dims,
    axes: tuple[str, ...],
    mesh: Mesh | AbstractMesh,
) -> None:
    """Puts `axes` on the largest free dim that they divide, the scanned `layers` dim last."""
    num_shards = int(np.prod([mesh.shape[a] for a in axes]))
    if num_shards == 1 or np.prod(shape) < MIN_FSDP_ELEMENTS:
        return
    order = sorted(range(len(shape)), key=lambda i: (dims[i] == "layers", -shape[i]))
    for i in order:
        if spec[i] is None and shape[i] % num_shards == 0:
            spec[i] = axes[0] if len(axes) == 1 else axes
            return


def param_shardings(params: PyTree, dims: PyTree, mesh: Mesh, *, fsdp: bool) -> PyTree:
    """NamedShardings of a parameter tree.

    Args:
        params: arrays, or their shapes.
        dims: a tuple or None in the place of each array.
        mesh, fsdp: as in `spec_of`.
    """
    dims_of = tree.named_leaves(dims, is_leaf=lambda x: x is None or isinstance(x, tuple))
    return tree.map_named(
        lambda name, x: NamedSharding(
            mesh, spec_of(name, x.shape, dims_of.get(name), mesh, fsdp=fsdp)
        ),
        params,
    )


def owner_shardings(params: PyTree, dims: PyTree, mesh: Mesh, axes: tuple[str, ...]) -> PyTree:
    """NamedShardings that shard each parameter over `axes` too, as fsdp does: for a strategy whose devices
    each own a shard of it. params, dims, mesh: as in `param_shardings`.
    """
    dims_of = tree.named_leaves(dims, is_leaf=lambda x: x is None or isinstance(x, tuple))

    def place(name: str, x: Any) -> NamedSharding:
        leaf_dims = dims_of.get(name)
        spec = list(spec_of(name, x.shape, leaf_dims, mesh, fsdp=True))
        _shard_largest(spec, x.shape, leaf_dims or (None,) * len(x.shape), axes, mesh)
        return NamedSharding(mesh, P(*spec))

    return tree.map_named(place, params)


def opt_shardings(
    tx: optax.GradientTransformation,
    opt_state: PyTree,
    params: PyTree,
    shardings: PyTree,
    mesh: Mesh,
) -> PyTree:
    """Shardings of an optimizer state: a leaf shaped as its parameter takes the parameter's spec, a
    factored one drops the reduced dim, everything else is replicated.

    jit's default would silently replicate the moments.

    Args:
        tx, opt_state, params: the optimizer, shapes of its state and of the parameters.
        shardings: of the parameters.
        mesh: where the state is placed.

    Raises:
        ValueError: a leaf of more than MAX_REPLICATED_BYTES would be replicated while parameters are sharded.
    """
    unsharded = NamedSharding(mesh, P())
    sharded = any(not s.is_fully_replicated for s in jax.tree.leaves(shardings))

    class Parameter(NamedTuple):
        """The parameter that a leaf belongs to."""

        shape: tuple[int, ...]
        sharding: NamedSharding

    def place(name: str, leaf: Any, param: Parameter | None) -> NamedSharding:
        if param is not None and leaf.shape == param.shape:
            return param.sharding
        drop = missing_dim(name, leaf.shape, param.shape) if param else None
        if param is None or drop is None:
            if sharded:
                _check_replicated(name, leaf, param and param.shape)
            return unsharded
        spec = [*param.sharding.spec, *[None] * (len(param.shape) - len(param.sharding.spec))]
        return NamedSharding(mesh, P(*spec[:drop], *spec[drop + 1 :]))

    masked = lambda x: isinstance(x, optax.MaskedNode)  # another optimizer's parameter
    try:
        owners = optax.tree.map_params(
            tx,
            lambda leaf, p, s: leaf if masked(leaf) else [Parameter(p.shape, s)],
            opt_state,
            params,
            shardings,
            transform_non_params=lambda _: [None],
            is_leaf=masked,
        )
    except Exception:  # a transformation that cannot be initialised with optax's placeholders
        named = {
            name: Parameter(p.shape, s)
            for (name, p), s in zip(
                tree.named_leaves(params).items(), jax.tree.leaves(shardings), strict=True
            )
        }
        owners = tree.map_named(lambda name, _: [_suffix_match(name, named)], opt_state)
    return tree.map_named(lambda name, leaf, param: place(name, leaf, param[0]), opt_state, owners)


def _suffix_match(name: str, named: Mapping[str, Any]) -> Any:
    """The value of the longest of the names that end `name`; None without one."""
    parts = name.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((named[end] for end in ends if end in named), None)


def _check_replicated(name: str, leaf: Any, param_shape: tuple[int, ...] | None) -> None:
    """ValueError for an optimizer-state leaf that is too large to be replicated."""
    owner = f"of a parameter of shape {param_shape}" if param_shape else "of no parameter"
    size = tree.num_bytes(leaf)
    check(
        size <= MAX_REPLICATED_BYTES,
        f"optimizer state {name}: {leaf.dtype}{list(leaf.shape)} ({tree.human_bytes(size)}), {owner}, has no"
        " sharding that follows from a parameter's, and each device would hold all of it; use a"
        " transformation whose state is structured and shaped as the parameters, or a mesh that shards no"
        " parameters (fsdp, tensor, expert and stage of 1)",
    )


def missing_dim(name: str, shape: Sequence[int], param_shape: Sequence[int]) -> int | None:
    """The dim of its parameter that a factored leaf lacks; None for a placeholder.

    Adafactor's rows lack the largest dim and its columns the second largest. In a square matrix only the
    names differ; two equal dims are ordered as optax's argsort orders them.

    name, shape: of the leaf. param_shape: of its parameter.
    """
    drops = [
        i for i in range(len(param_shape)) if (*param_shape[:i], *param_shape[i + 1 :]) == shape
    ]
    if len(drops) > 1:
        order = [int(i) for i in np.argsort(param_shape)]
        fields = {"v_row": order[-1], "v_col": order[-2]}
        drops = [drop for part, drop in fields.items() if part in name.split("/")]
    return drops[0] if drops else None


def batch_spec(leading: int = 0) -> P:
    """The batch dim sharded over all of BATCH_AXES, after `leading` unsharded dims."""
    return P(*(None,) * leading, BATCH_AXES)


def manual_axes() -> Collection[str]:
    """The manual axes of the shard_maps that are being traced."""
    return jax.sharding.get_abstract_mesh().manual_axes


def shard_map_options(mesh: Mesh, axes: Collection[str] | None = None) -> dict[str, Any]:
    """Arguments for a jax.shard_map manual over `axes` (None: all that remain), nested ones included."""
    names = set(mesh.axis_names) - set(manual_axes()) if axes is None else set(axes)
    return {"axis_names": names} | ({} if manual_axes() else {"mesh": mesh})


def constrain(x: jax.Array, place: NamedSharding) -> jax.Array:
    """with_sharding_constraint that also works inside a shard_map over other axes.

    Args: x: [...]. place: its sharding on the whole mesh.
    Returns: x.
    """
    target: Any = place.spec if manual_axes() else place
    return jax.lax.with_sharding_constraint(x, target)


def placement(mesh: Mesh, rules: Mapping[str, tuple[str, ...]] = RULES) -> dict[str, Any]:
    """Scope fields for a jitted program on `mesh`: the sharding of activations by logical dim.

    Inside a shard_map over some axes (a pipeline's stages), arrays are local blocks and only the remaining
    axes shard them.
    """

    def remaining_rules() -> dict[str, tuple[str, ...]]:
        entered = manual_axes()
        return {dim: tuple(a for a in axes if a not in entered) for dim, axes in rules.items()}

    def spec(shape: Sequence[int], dims: Dims) -> P:
        return spec_of("activation", shape, dims, mesh, fsdp=False, rules=remaining_rules())

    def constrain_dims(x: jax.Array, dims: Dims) -> jax.Array:
        return constrain(x, NamedSharding(mesh, spec(x.shape, dims)))

    def sharding_axes(dim: str) -> dict[str, int]:
        return {axis: mesh.shape[axis] for axis in rules[dim] if mesh.shape[axis] > 1}

    def result_spec(dims: Dims) -> P:  # its size is not known here, so nothing is checked
        axes = remaining_rules()
        used = lambda dim: tuple(a for a in axes[dim] if mesh.shape[a] > 1)
        return P(*(used(dim) if dim else None for dim in dims))

    def blockwise(fn: Callable[..., Any], in_dims: Sequence[Dims], out_dims: Any) -> Any:
        several = any(isinstance(dims, tuple) for dims in out_dims)

        def run(*args: jax.Array) -> Any:
            outs = tuple(map(result_spec, out_dims)) if several else result_spec(out_dims)
            ins = tuple(spec(x.shape, dims) for x, dims in zip(args, in_dims, strict=True))
            # Kernels (pallas_call) do not declare over which axes their results vary: no check_vma.
            options = {"check_vma": False, **shard_map_options(mesh)}
            return jax.shard_map(fn, in_specs=ins, out_specs=outs, **options)(*args)

        return run

    platform = mesh.devices.flat[0].platform
    return {
        "constrain": constrain_dims,
        "blockwise": blockwise,
        "sharding_axes": sharding_axes,
        "platform": platform,
    }
