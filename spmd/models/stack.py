"""Layers with stacked parameters, applied in turn: scan, unroll, remat and the slice of a stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.parallel import scope

PyTree = Any
Remat = Literal["none", "full", "dots", "named"]
Outputs = dict[str, PyTree]
Apply = Callable[[Any, jax.Array, PyTree], tuple[jax.Array, Outputs]]
Step = Callable[[jax.Array, PyTree], tuple[jax.Array, Outputs]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerStack:
    """A stack of layers of a model, as a pipeline shards it."""

    name: str
    """Attribute of the module that holds the layers' parameters."""
    layers: int
    """Number of layers."""
    period: int = 1
    """Layers after which their pattern repeats; a stage holds whole periods."""
    repeats: str = ""
    """The fields that make the pattern."""


class Chunk(NamedTuple):
    """Consecutive layers of a stack: those whose parameters `through` has at hand.

    stack: name of the stack. first: number of the first of the layers.
    """

    stack: str = ""
    first: jax.Array | int = 0


ALL_LAYERS = Chunk()


@dataclasses.dataclass(frozen=True)
class Stack:
    """How a stack of layers is compiled.

    scan: one compiled layer, scanned; else unrolled, slower to compile and faster to run.
    remat: which activations the backward pass rematerialises (Chen et al. 2016, arXiv 1604.06174): none, all
    ("full"), all but the results of matmuls with weights ("dots"), all but `saved` ("named").
    saved: names of activations (layers.activations) that remat="named" keeps.
    """

    scan: bool = True
    remat: Remat = "none"
    saved: tuple[str, ...] = ()

    def __call__(
        self,
        layers: nnx.Module | Sequence[nnx.Module],
        x: jax.Array,
        apply: Apply | Sequence[Apply],
        inputs: PyTree = None,
        *,
        kinds: Sequence[int] = (),
        first: jax.Array | int = 0,
    ) -> tuple[jax.Array, Outputs]:
        """(output of the last layer, what `apply` returned beside it).

        Each layer runs in the scope of its number, so that its dropout does not depend on scan or stages.

        Args:
            layers: module whose variables are stacked [L, ...]; or, of layers whose variables differ in their
                structure, a module of each kind, with the layers of this kind. A pipeline's stage holds a
                slice of them.
            x: input of the first layer.
            apply: (module with the variables of one layer, x, its inputs) -> (x, outputs); or a pattern of P
                of them, for the layers p, p + P, ...: a scan runs over periods of P layers, and the rest of
                the layers is unrolled. A stage holds whole periods. Outputs are by name; those of a name are
                stacked over the layers that have it, in order.
            inputs: what each layer reads beside x, stacked [L, ...].
            kinds: for each layer of the pattern the index of its kind in `layers`; by default all 0.
            first: number of the first layer, which a stage counts from.
        """
        modules = layers if isinstance(layers, Sequence) else [layers]
        applied = apply if isinstance(apply, Sequence) else [apply]
        kinds = tuple(kinds) or (0,) * len(applied)
        graphs, states = zip(*(nnx.split(module) for module in modules), strict=True)
        variables = tuple(nnx.as_pure(state) for state in states)
        num = sum(jax.tree.leaves(each)[0].shape[0] for each in variables)

        def build(apply: Apply, kind: int, *, scan: bool) -> Step:
            def step(x: jax.Array, layer: PyTree) -> tuple[jax.Array, Outputs]:
                index, variables, inputs = layer
                with scope.layer(index):
                    return apply(nnx.merge(graphs[kind], variables), x, inputs)

            return self._rematerialise(step, scan=scan)

        def pattern(*, scan: bool) -> _Pattern:
            pairs = zip(applied, kinds, strict=True)
            return _Pattern([build(f, kind, scan=scan) for f, kind in pairs], kinds)

        every = (first + jnp.arange(num, dtype=jnp.int32), inputs)
        stacked = _Stacked(every, variables)
        if not self.scan or num < len(applied):
            return pattern(scan=False).unroll(x, stacked, num)
        if len(applied) == 1:
            layer = (every[0], variables[0], inputs)
            return jax.lax.scan(pattern(scan=True).steps[0], x, layer)
        return _scan_periods(pattern(scan=True), pattern(scan=False), x, stacked, num)

    def _rematerialise(self, step: Step, *, scan: bool) -> Step:
        if self.remat == "none":
            return step
        policies = jax.checkpoint_policies
        policy = {
            "full": policies.nothing_saveable,
            "dots": policies.dots_with_no_batch_dims_saveable,
            "named": policies.save_only_these_names(*self.saved),
        }[self.remat]
        # Within a scan the forward and the backward pass are separate loops, which XLA cannot merge anyway.
        return jax.checkpoint(step, policy=policy, prevent_cse=not scan)


class _Stacked(NamedTuple):
    """Arrays of layers in order [L, ...], and the variables of the layers of each kind."""

    every: PyTree
    variables: tuple[PyTree, ...]

    def split(self, layers: int, of_kind: Sequence[int]) -> tuple[_Stacked, _Stacked]:
        """The first layers, of which so many are of each kind, and the rest."""

        def parts(nested: PyTree, num: int) -> list[PyTree]:
            split = lambda a: jax.lax.split(a, (num, a.shape[0] - num), axis=0)
            return [jax.tree.map(lambda a, i=i: split(a)[i], nested) for i in (0, 1)]

        every = parts(self.every, layers)
        variables = [parts(v, num) for v, num in zip(self.variables, of_kind, strict=True)]
        first, last = (_Stacked(every[i], tuple(v[i] for v in variables)) for i in (0, 1))
        return first, last


class _Pattern(NamedTuple):
    """The step of each layer of a period, and the kind of the layer."""

    steps: list[Step]
    kinds: tuple[int, ...]

    def of_kind(self, num: int, kinds: int) -> list[int]:
        """How many of `num` layers are of each kind."""
        layers = [self.kinds[i % len(self.kinds)] for i in range(num)]
        return [layers.count(kind) for kind in range(kinds)]

    def unroll(self, x: jax.Array, stacked: _Stacked, num: int) -> tuple[jax.Array, Outputs]:
        """(output of `num` layers, their outputs), layer by layer."""
        counts = self.of_kind(num, len(stacked.variables))
        variables = [
            iter(unstack(each, count) if count else ())
            for each, count in zip(stacked.variables, counts, strict=True)
        ]
        outputs: list[Outputs] = []
        for i, (index, inputs) in enumerate(unstack(stacked.every, num)):
            at = i % len(self.steps)
            x, output = self.steps[at](x, (index, next(variables[self.kinds[at]]), inputs))
            outputs.append(output)
        return x, _join(outputs, lambda *a: jnp.stack(a))


def _scan_periods(
    scanned: _Pattern, unrolled: _Pattern, x: jax.Array, stacked: _Stacked, num: int
) -> tuple[jax.Array, Outputs]:
    """The same by a scan over the periods, and without one for what is left of the layers."""
    size = len(scanned.steps)
    rest, counts = num % size, scanned.of_kind(size, len(stacked.variables))
    first, last = stacked, None
    if rest:
        whole = [num // size * count for count in counts]
        first, last = stacked.split(num - rest, whole)

    def by_period(nested: PyTree, count: int) -> PyTree:
        return jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]), nested)

    kinds = zip(first.variables, counts, strict=True)
    periods = _Stacked(by_period(first.every, size), tuple(by_period(v, n) for v, n in kinds))
    x, outputs = jax.lax.scan(lambda x, period: scanned.unroll(x, period, size), x, periods)
    outputs = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)
    if last is not None:
        x, others = unrolled.unroll(x, last, rest)
        outputs = _join([outputs, others], lambda *a: jnp.concatenate(a))
    return x, outputs


def _join(outputs: Sequence[Outputs], join: Callable[..., jax.Array]) -> Outputs:
    """Outputs of several layers by name, joined over those that have them."""
    names = dict.fromkeys(name for each in outputs for name in each)
    having = {name: [each[name] for each in outputs if name in each] for name in names}
    return {name: jax.tree.map(join, *trees) for name, trees in having.items()}


def unstack(stacked: PyTree, num: int) -> list[PyTree]:
    """Split a stacked tree into one for each of `num` layers.

    By split, whose gradient is one concatenation: the gradient of indexing is, for each layer, an array of
    all layers padded with zeros.
    """
    leaves, structure = jax.tree.flatten(stacked)
    parts = [jax.lax.split(x, (1,) * num, axis=0) for x in leaves]
    return [
        structure.unflatten([part.squeeze(0) for part in layer])
        for layer in zip(*parts, strict=True)
    ]
