"""An NNX model as static graphs and pure functions over plain dicts; submodules can name their outputs."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.core import narrow, tree
from spmd.core.fields import check
from spmd.parallel import scope
from spmd.parallel.follows import base_dims, resolve_dims

PyTree = Any


class FunctionalModel(NamedTuple):
    """An NNX model split once into static graphs and plain dicts (NNX itself is slow in the loop).

    init: key -> (params, model_state). apply: (params, model_state, *inputs, train) -> (output, model_state).
    call: (params, model_state, fn, train) -> (fn(module), model_state). dims, state_dims: base dims of
    parameters and of model state, by path. whole_batch: paths of modules whose statistics are those of the
    rows that they see, and thus depend on the mesh. kind: class of the module. follows: base dims of dims of
    the model's own. stacks: its stacks of layers (models.stack.LayerStack), where it names them.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[jax.Array, PyTree]]
    call: Callable[..., tuple[Any, PyTree]]
    dims: dict[str, tuple[str | None, ...] | None]
    state_dims: dict[str, tuple[str | None, ...] | None]
    whole_batch: tuple[str, ...]
    kind: type
    follows: Mapping[str, str]
    stacks: tuple[Any, ...] = ()

    def evaluate(self, params: PyTree, model_state: PyTree, fn: Callable[[Any], Any]) -> Any:
        """fn(module) in evaluation mode: without dropout, with the running statistics.

        Args:
            params: trained parameters.
            model_state: running statistics and others.
            fn: function of the module.
        """
        return self.call(params, model_state, fn, train=False)[0]


def functionalize(model: Any, param_dtype: str = "float32") -> FunctionalModel:
    """Split a model into static graphs and pure functions.

    Narrow parameters: a model with a field `dtype` computes in their type unless the field names another; a
    model without such a field computes in float32. Model state (batch statistics) is float32 at least.

    Args:
        model: a config with `build(rngs)`, or an NNX module class that takes `rngs`. Its attribute `follows`,
            if it has one, says as which base dim (sharding.RULES) each dim of its own is sharded.
        param_dtype: type of the parameters.

    Raises:
        ValueError: a module holds random state: its masks would depend on the mesh; a dim follows none known.
    """
    widens = narrow.is_narrow(param_dtype) and not hasattr(model, "dtype")
    model = narrow.with_compute_type(model, param_dtype)
    build = model.build if hasattr(model, "build") else lambda rngs: model(rngs=rngs)
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    _check_no_random_state(abstract)
    follows = base_dims(getattr(model, "follows", {}))
    graphs = {}
    for train in (True, False):
        abstract.train() if train else abstract.eval()
        graphs[train] = nnx.split(abstract, nnx.Param, ...)[0]

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        _, params, rest = nnx.split(build(nnx.Rngs(key)), nnx.Param, ...)
        state_dtype = tree.at_least_float32(jnp.dtype(param_dtype))
        return _cast(_dicts(params), param_dtype), _cast(_dicts(rest), state_dtype)

    def call(
        params: PyTree, model_state: PyTree, fn: Callable[[Any], Any], *, train: bool
    ) -> tuple[Any, PyTree]:
        params = narrow.at_least_float32(params) if widens else params
        module = nnx.merge(graphs[train], params, model_state)
        with name_outputs(module), scope.follow(follows):
            out = fn(module)
        return out, _dicts(nnx.state(module, nnx.Not(nnx.Param)))

    def apply(params: PyTree, model_state: PyTree, *args: Any, train: bool) -> tuple[Any, PyTree]:
        return call(params, model_state, lambda module: module(*args), train=train)

    return FunctionalModel(
        init=init,
        apply=apply,
        call=call,
        dims=_dims(abstract, nnx.Param, follows),
        state_dims=_dims(abstract, nnx.Not(nnx.Param), follows),
        whole_batch=_whole_batch_modules(abstract),
        kind=type(abstract),
        follows=follows,
        stacks=tuple(getattr(abstract, "stacks", ())),
    )


def _check_no_random_state(model: nnx.Module) -> None:
    stateful = nnx.to_flat_state(nnx.state(model, nnx.RngState))
    check(
        not len(stateful),
        "the model holds random state (nnx.Dropout with rngs?), whose masks would"
        " depend on the mesh; use spmd.models.layers.Dropout, which draws per example",
    )


def _whole_batch_modules(model: nnx.Module) -> tuple[str, ...]:
    """Paths of the modules that take batch statistics without spmd.parallel.scope."""
    kinds = nnx.BatchNorm | nnx.SpectralNorm
    modules = nnx.iter_modules(model)
    return tuple("/".join(map(str, path)) for path, module in modules if isinstance(module, kinds))


def _dims(
    model: nnx.Module, kind: Any, follows: Mapping[str, str]
) -> dict[str, tuple[str | None, ...] | None]:
    """Path -> base dims of the variables of a kind."""
    variables = {
        "/".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, kind))
    }
    return {
        name: resolve_dims(name, variable.get_metadata().get("dims"), follows)
        for name, variable in variables.items()
    }


def _cast(arrays: PyTree, dtype: Any) -> PyTree:
    """Floating-point leaves as `dtype`, the others as they are."""
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(cast, arrays)


def _dicts(state: nnx.State) -> PyTree:
    """An nnx.State as nested dicts of arrays: jit takes those apart faster."""
    nested = lambda x: {k: nested(v) for k, v in x.items()} if isinstance(x, Mapping) else x
    return nested(nnx.as_pure(state))


@contextlib.contextmanager
def name_outputs(model: nnx.Module) -> Iterator[None]:
    """Name the output of each submodule by its path, under scope.bind(watched=True).

    `layers/0`, and `dropout#2` for the second call of a module: a model needs no taps of its own.
    """
    if not scope.current().watched:
        yield
        return
    modules = dict(nnx.iter_modules(model))
    paths = {id(module): "/".join(map(str, path)) for path, module in modules.items()}
    copies: list[nnx.Module] = []  # kept alive, so that no id is used twice
    calls: Counter[str] = Counter()

    def path_of(module: nnx.Module) -> str:
        """The path of a module, or of a copy made by a scan if the model has one module of its class."""
        if id(module) not in paths:
            copies.append(module)
            same = [id(m) for m in modules.values() if type(m) is type(module)]
            root = paths[same[0]] if len(same) == 1 else type(module).__name__
            for path, inner in nnx.iter_modules(module):
                paths[id(inner)] = "/".join(map(str, (root, *path)))
        return paths[id(module)]

    def named(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def __call__(self, *args, **kwargs):
            path = path_of(self)
            out = call(self, *args, **kwargs)
            if not path:  # the model itself, whose output the loss shows
                return out
            calls[path] += 1
            name = path if calls[path] == 1 else f"{path}#{calls[path]}"
            return jax.tree.map(
                lambda x: scope.tap(name, x) if isinstance(x, jax.Array) else x, out
            )

        return __call__

    with contextlib.ExitStack() as undo:
        bases = [cls for module in modules.values() for cls in type(module).__mro__]
        # Only the class that defines __call__: an inherited one would be named twice.
        for cls in {cls for cls in bases if "__call__" in vars(cls)}:
            call = vars(cls)["__call__"]
            undo.callback(setattr, cls, "__call__", call)
            cls.__call__ = named(call)
        yield
