"""Equal layers with stacked parameters, applied in turn: scan, unroll, remat and the slice of a stage."""

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
Apply = Callable[[Any, jax.Array, PyTree], tuple[jax.Array, PyTree]]
Step = Callable[[jax.Array, PyTree], tuple[jax.Array, PyTree]]


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
        layers: nnx.Module,
        x: jax.Array,
        apply: Apply | Sequence[Apply],
        inputs: PyTree = None,
        *,
        first: jax.Array | int = 0,
    ) -> tuple[jax.Array, PyTree]:
        """(output of the last layer, what `apply` returned beside it, stacked [L, ...]).

        Each layer runs in the scope of its number, so that its dropout does not depend on scan or stages.

        Args:
            layers: module whose variables are stacked [L, ...]; a pipeline's stage holds a slice of them.
            x: input of the first layer.
            apply: (module with the variables of one layer, x, its inputs) -> (x, outputs); or a pattern of P
                of them, for the layers p, p + P, ...: a scan runs over periods of P layers, and the rest of
                the layers is unrolled. A stage holds whole periods.
            inputs: what each layer reads beside x, stacked [L, ...].
            first: number of the first layer, which a stage counts from.
        """
        graph, state = nnx.split(layers)
        variables = nnx.as_pure(state)
        num = jax.tree.leaves(variables)[0].shape[0]

        def build(apply: Apply, *, scan: bool) -> Step:
            def step(x: jax.Array, layer: PyTree) -> tuple[jax.Array, PyTree]:
                index, variables, inputs = layer
                with scope.layer(index):
                    return apply(nnx.merge(graph, variables), x, inputs)

            return self._rematerialise(step, scan=scan)

        applied = apply if isinstance(apply, Sequence) else [apply]
        scanned, unrolled = ([build(f, scan=scan) for f in applied] for scan in (True, False))
        stacked = (first + jnp.arange(num, dtype=jnp.int32), variables, inputs)
        if not self.scan or num < len(applied):
            return _unroll(unrolled, x, stacked, num)
        if len(applied) == 1:
            return jax.lax.scan(scanned[0], x, stacked)
        return _scan_periods(scanned, unrolled, x, stacked, num)

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


def _unroll(
    pattern: Sequence[Step], x: jax.Array, stacked: PyTree, num: int
) -> tuple[jax.Array, PyTree]:
    """(output of `num` layers, their outputs stacked), layer by layer."""
    outputs = []
    for i, layer in enumerate(unstack(stacked, num)):
        x, output = pattern[i % len(pattern)](x, layer)
        outputs.append(output)
    return x, jax.tree.map(lambda *x: jnp.stack(x), *outputs)


def _scan_periods(
    scanned: Sequence[Step], unrolled: Sequence[Step], x: jax.Array, stacked: PyTree, num: int
) -> tuple[jax.Array, PyTree]:
    """The same by a scan over the periods, and without one for what is left of the layers."""
    size = len(scanned)
    rest = num % size
    split = lambda a: jax.lax.split(a, (num - rest, rest), axis=0) if rest else (a, None)
    first, last = (jax.tree.map(lambda a, i=i: split(a)[i], stacked) for i in (0, 1))
    periods = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), first)
    x, outputs = jax.lax.scan(lambda x, period: _unroll(scanned, x, period, size), x, periods)
    outputs = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)
    if rest:
        x, others = _unroll(unrolled, x, last, rest)
        outputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outputs, others)
    return x, outputs


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
