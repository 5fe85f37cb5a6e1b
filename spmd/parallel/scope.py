"""The step's context as layers see it: mesh axes, example keys, weights, sharding constraints.

The strategy opens a scope around the forward pass while it is traced; layers only read it. So one module
runs under jit, shard_map, vmap or on its own, and no model ever names a mesh axis.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spmd.core import tree

Dims = tuple[str | None, ...]


@dataclasses.dataclass
class Scope:
    """Context of one trace of the forward pass.

    axes: manual mesh axes that shard the batch. keys, weight: [B] of this trace's examples. platform: of the
    devices that will run it ("" is the default backend's). mapped: vmap axis of several replicas on one
    device. partial: inside a shard_map that leaves some axes to the compiler. by_example: the gradient of
    each example is taken by itself. notes: values that layers record for each example, by name: (values [B],
    their weights [B]). watched: verify is tracing: modules
    name their outputs, and the update returns the gradients.
    """

    axes: tuple[str, ...] = ()
    keys: jax.Array | None = None
    weight: jax.Array | None = None
    constrain: Callable[[jax.Array, Dims], jax.Array] | None = None
    blockwise: Callable[[Callable[..., Any], tuple[Dims, ...], Any], Callable[..., Any]] | None = (
        None
    )
    sharding_axes: Callable[[str], dict[str, int]] | None = None
    mapped: str = ""
    partial: bool = False
    by_example: bool = False
    platform: str = ""
    watched: bool = False
    notes: dict[str, tuple[jax.Array, jax.Array]] | None = None
    calls: int = 0  # how many keys this layer has drawn: trace order, the same on every mesh


# Base dims of a model's own dims: beside the scope, whose count of calls a nested scope would begin anew.
_FOLLOWS: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("spmd_follows")
_SCOPE: contextvars.ContextVar[Scope] = contextvars.ContextVar("spmd_scope")


def current() -> Scope:
    """The innermost scope, or an empty one."""
    return _SCOPE.get(None) or Scope()


@contextlib.contextmanager
def bind(**changes: Any) -> Iterator[Scope]:
    """Opens a scope: the current one with `changes` (fields of Scope)."""
    scope = dataclasses.replace(current(), **changes)
    token = _SCOPE.set(scope)
    try:
        yield scope
    finally:
        _SCOPE.reset(token)


@contextlib.contextmanager
def follow(follows: Mapping[str, str]) -> Iterator[None]:
    """Reads the dims of a model's own as the base dims that they follow, while the model is traced."""
    token = _FOLLOWS.set(follows)
    try:
        yield
    finally:
        _FOLLOWS.reset(token)


def _base_dims(dims: Dims) -> Dims:
    follows = _FOLLOWS.get({})
    return tuple(follows.get(dim, dim) if dim else None for dim in dims) if follows else dims


def example_keys(step_key: jax.Array, example_id_B: jax.Array) -> jax.Array:
    """Keys from the step's key and the global example ids: never from the device.

    Args:
        step_key: of this step.
        example_id_B: int32 [B].

    Returns:
        [B] keys.
    """
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(example_id_B)


@contextlib.contextmanager
def layer(index: jax.Array | int) -> Iterator[Scope]:
    """Fold a layer's index into the example keys, so that scanned equals unrolled.

    Args:
        index: int32 [], the number of the layer.

    Returns:
        A context manager of the scope.
    """
    keys = current().keys
    if keys is not None:
        keys = jax.vmap(lambda k: jax.random.fold_in(k, index))(keys)
    with bind(keys=keys, calls=0) as scope:
        yield scope


def next_keys() -> jax.Array:
    """[B] fresh keys for one random layer; ValueError outside a training scope."""
    scope = current()
    if scope.keys is None:
        raise ValueError(
            "a random layer (dropout) ran outside a training step: no example keys bound"
        )
    scope.calls += 1
    call = scope.calls
    return jax.vmap(lambda k: jax.random.fold_in(k, call))(scope.keys)


def batch_sum(x: jax.Array) -> jax.Array:
    """Sum over the devices that share the batch. {U_batch} -> A.

    Args:
        x: [...] this trace's partial sum.

    Returns:
        [...] the sum, on all devices.
    """
    axes = current().axes
    return jax.lax.psum(x, axes) if axes else x


def batch_mean(x_BD: jax.Array, reduce_dims: tuple[int, ...]) -> jax.Array:
    """Mean over the global batch, by example weight; summed in float32 at least.

    Args:
        x_BD: [B, ...] of this trace's examples.
        reduce_dims: dims to take the mean over, dim 0 (the batch) among them.

    Returns:
        The remaining dims, of x's type.
    """
    dtype = x_BD.dtype
    x_BD = x_BD.astype(tree.at_least_float32(dtype))
    weight_B = current().weight
    if weight_B is None:
        weight_B = jnp.ones(x_BD.shape[:1], x_BD.dtype)
    weight_B = weight_B.astype(x_BD.dtype)
    inner_dims = tuple(dim for dim in reduce_dims if dim)
    inner = math.prod(x_BD.shape[dim] for dim in inner_dims)
    # Weighted after the sum over an example's own elements: XLA's CPU backend would write the weights
    # once for each element, and read them.
    example_BD = jnp.sum(x_BD, axis=inner_dims)
    weight = weight_B.reshape((-1,) + (1,) * (example_BD.ndim - 1))
    total = batch_sum(jnp.sum(example_BD * weight, axis=0))
    count = batch_sum(jnp.sum(weight_B)) * inner
    return (total / jnp.maximum(count, jnp.ones((), x_BD.dtype))).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GatheredBatch:
    """Rows of a feature of all devices. rows: [N, ...]. weight: [N], 0 for rows that are no examples. index:
    [B], where this trace's rows are among them.
    """

    rows: jax.Array
    weight: jax.Array
    index: jax.Array


def gather_batch(x: jax.Array) -> GatheredBatch:
    """Gather the rows of all devices that share the batch (in-batch negatives). A[I_batch, ...] -> A[I, ...].

    The batch is the microbatch where gradients are accumulated, and a replica's own under the strategies
    `local` and `federated`.

    Args:
        x: [B, ...] of this trace's examples.

    Returns:
        Rows [N, ...] and weights [N] of all; mask rows of weight 0.

    Raises:
        ValueError: outside a training step, where a result must not depend on the batch size, and where the
            gradient of each example is taken by itself (DP-SGD).
    """
    scope = current()
    if scope.by_example:
        raise ValueError(
            "gather_batch: privacy clips the gradient of each example by itself, which then has no other"
            " examples as negatives; use a loss of single examples, or train without privacy"
        )
    if scope.weight is None:
        raise ValueError(
            "gather_batch: only a training step has a batch to gather; an evaluation does not depend on its"
            " batch size: let values(..., train=False) compare with fixed candidates"
        )
    num = x.shape[0]
    index = jnp.arange(num, dtype=jnp.int32)
    if not scope.axes:
        return GatheredBatch(rows=x, weight=scope.weight, index=index)
    gather = lambda part: jax.lax.all_gather(part, scope.axes, tiled=True)
    offset = jax.lax.axis_index(scope.axes).astype(jnp.int32) * num
    return GatheredBatch(rows=gather(x), weight=gather(scope.weight), index=index + offset)


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """Constrain a sharding by logical dims; the identity without a scope and on one device.

    Args:
        x: [...].
        dims: the name of each dim, None for one that is not sharded.

    Returns:
        x.
    """
    rule = current().constrain
    return x if rule is None else rule(x, _base_dims(dims))


def blockwise(
    fn: Callable[..., Any], in_dims: tuple[Dims, ...], out_dims: Any
) -> Callable[..., Any]:
    """Run `fn` on each device's block of its arrays, sharded by logical dims; without a scope, `fn` itself.

    For kernels that the compiler cannot partition, and for explicit collectives over `sharding_axes`.

    Args:
        fn: function of arrays.
        in_dims: dims of each argument.
        out_dims: dims of the result, or a tuple of them for several results.

    Returns:
        A function of the unsharded arrays.
    """
    rule = current().blockwise
    if rule is None:
        return fn

    def block(*args: Any) -> Any:
        with bind(constrain=None, blockwise=None):  # within a block nothing is left to be placed
            return fn(*args)

    several = any(isinstance(dims, tuple) for dims in out_dims)
    outs = tuple(map(_base_dims, out_dims)) if several else _base_dims(out_dims)
    return rule(block, tuple(map(_base_dims, in_dims)), outs)


def sharding_axes(dim: str) -> dict[str, int]:
    """`{mesh axis: size}` of the axes larger than 1 that shard a logical dim."""
    rule = current().sharding_axes
    base = _base_dims((dim,))[0]
    return {} if rule is None or base is None else rule(base)


def num_shards(dim: str) -> int:
    """Number of shards of a logical dim."""
    return math.prod(sharding_axes(dim).values())


def max_over_replicas(x: jax.Array) -> jax.Array:
    """Maximum over the replicas that vmap runs on one device, so that a lax.cond on it stays one branch.

    Args:
        x: [...] of a replica.

    Returns:
        [...] the same for all replicas.
    """
    axis = current().mapped
    return jax.lax.pmax(x, axis) if axis else x


def batch_over_replicas(x: jax.Array) -> jax.Array:
    """Batch a value over the replicas that vmap runs on one device, as the results of other branches are.

    Args:
        x: [...].

    Returns:
        x.
    """
    axis = current().mapped
    return x + (jax.lax.axis_index(axis) * 0).astype(x.dtype) if axis else x


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: of the devices that will run what is traced."""
    return current().platform or jax.default_backend()


def note(name: str, value_B: jax.Array, weight_B: jax.Array) -> None:
    """Record a value for each example: a loss term that the task asked for, else a metric. Not in a scan.

    Args:
        name: of the term or metric.
        value_B: [B].
        weight_B: [B] of each value in the mean.
    """
    notes = current().notes
    if notes is not None:
        notes[name] = (value_B, weight_B)


def mark_varying(tree: Any) -> Any:
    """Types a replicated value as different per device, so that a gradient stays local until reduced.

    Under shard_map's check_vma the gradient with respect to an unvarying parameter would already hold the
    psum, and an explicit one would count it N times.
    """
    axes = current().axes
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree) if axes else tree


def tap(name: str, x: jax.Array) -> jax.Array:
    """Name a tensor, for remat policies and for verify to locate a difference; free at run time.

    Args:
        name: path of the module.
        x: [...].

    Returns:
        x.
    """
    return checkpoint_name(x, name)
