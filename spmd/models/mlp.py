"""A multi-layer perceptron for images or vectors."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
from flax import nnx

from spmd.core.fields import check
from spmd.models.layers import Dense, Dropout, Linear, he_normal
from spmd.models.stack import ALL_LAYERS, Chunk, LayerStack, Stack
from spmd.parallel import scope


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP:
    """Flattened input, hidden layers with ReLU and dropout, logits."""

    inputs: int
    """Features of one flattened example."""
    hidden: tuple[int, ...] = (256,)
    """Width of each hidden layer."""
    classes: int = 10
    """Number of logits."""
    dropout: float = 0.0
    """Dropout rate after each hidden layer."""
    dtype: Literal["", "bfloat16", "float32"] = ""
    """Compute type; empty is that of the parameters."""
    stacked: bool = False
    """Hidden layers after the first, all of one width, as one array [layers, ...]: scanned, and sharded by
    mesh.stage."""

    def __post_init__(self) -> None:
        for width in (self.inputs, self.classes, *self.hidden):
            check(width >= 1, f"model widths must be at least 1, given {width}")
        check(0 <= self.dropout < 1, f"model.dropout={self.dropout} must be in [0, 1)")
        check(
            not self.stacked or (len(self.hidden) > 1 and len(set(self.hidden)) == 1),
            "model.stacked needs two hidden layers at least, all of one width, given"
            f" model.hidden={self.hidden}",
        )

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return (_Stack if self.stacked else _Net)(self, rngs)


def _flat(x: jax.Array, inputs: int) -> jax.Array:
    """[B, ...] -> [B, inputs]; ValueError when an example has another number of values."""
    num = math.prod(x.shape[1:])
    check(
        num == inputs,
        f"an example of shape {list(x.shape[1:])} has {num} values and model.inputs={inputs}; use"
        f" --model.inputs {num}",
    )
    return x.reshape(x.shape[0], -1)


class _Net(nnx.Module):
    def __init__(self, config: MLP, rngs: nnx.Rngs):
        self.inputs = config.inputs
        widths = (config.inputs, *config.hidden)
        # The sharded dim alternates, so that under tensor parallelism a pair needs one all-reduce (Megatron).
        names = ["input"] + ["mlp" if i % 2 else "embed" for i in range(1, len(widths))]
        self.layers = nnx.List(
            [
                Dense(
                    rngs,
                    (widths[i], widths[i + 1]),
                    (names[i], names[i + 1]),
                    init=he_normal,
                    dtype=config.dtype,
                )
                for i in range(len(widths) - 1)
            ]
        )
        self.dropout = Dropout(config.dropout)
        self.head = Dense(
            rngs, (widths[-1], config.classes), (names[-1], "classes"), dtype=config.dtype
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, ...] -> logits [B, classes]."""
        x = _flat(x, self.inputs)
        for layer in self.layers:
            x = self.dropout(jax.nn.relu(layer(x)))
            x = scope.constrain(x, "batch", layer.kernel.get_metadata("dims")[1])
        return self.head(x)


class _Stack(nnx.Module):
    """Hidden layers of one width, stacked; a pipeline runs enter, through, leave and logits."""

    stream = ("batch", "embed")  # logical dims of the activations between stages

    def __init__(self, config: MLP, rngs: nnx.Rngs):
        width, self.num_layers = config.hidden[0], len(config.hidden) - 1
        self.inputs = config.inputs
        dtype = config.dtype
        self.first = Dense(
            rngs, (config.inputs, width), ("input", "embed"), init=he_normal, dtype=dtype
        )
        self.layers = Linear(
            rngs,
            "bd,df->bf",
            (width, width),
            ("embed", "mlp"),
            layers=self.num_layers,
            bias=True,
            gain=2**0.5,
        )
        self.dropout = Dropout(config.dropout)
        self.head = Dense(rngs, (width, config.classes), ("embed", "classes"), dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, ...] -> logits [B, classes]."""
        return self.logits(self.leave(self.through(self.enter(x), x)))

    def enter(self, x: jax.Array) -> jax.Array:
        """Input of the stacked layers [B, D]."""
        with scope.layer(self.num_layers):  # a number that no stacked layer has
            return self._activate(self.first(_flat(x, self.inputs)))

    @property
    def stacks(self) -> tuple[LayerStack, ...]:
        """The hidden layers after the first."""
        return (LayerStack(name="layers", layers=self.num_layers),)

    def through(self, x: jax.Array, inputs: jax.Array, *, chunk: Chunk = ALL_LAYERS) -> jax.Array:
        """Output [B, D] of the layers that a stage holds."""
        apply = lambda layer, x, _: (self._activate(layer(x)), {})
        return Stack()(self.layers, x, apply, first=chunk.first)[0]

    def leave(self, x: jax.Array, inputs: jax.Array | None = None) -> jax.Array:
        """Input of the head [B, D]."""
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits [B, classes]."""
        return self.head(x)

    def _activate(self, x: jax.Array) -> jax.Array:
        return scope.constrain(self.dropout(jax.nn.relu(x)), *self.stream)
