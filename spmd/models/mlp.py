"""A multi-layer perceptron for images or vectors."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from flax import nnx

from spmd import scope
from spmd.fields import check
from spmd.models.layers import Dense, Dropout, he_normal


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
    """Compute type; empty is the parameters' own."""

    def __post_init__(self) -> None:
        for width in (self.inputs, self.classes, *self.hidden):
            check(width >= 1, f"model widths must be at least 1, given {width}")
        check(0 <= self.dropout < 1, f"model.dropout={self.dropout} must be in [0, 1)")

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Net(self, rngs)


class _Net(nnx.Module):
    def __init__(self, config: MLP, rngs: nnx.Rngs):
        widths = (config.inputs, *config.hidden)
        # Alternate the cut dim, so that under tensor parallelism a pair needs one all-reduce (Megatron).
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
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = self.dropout(jax.nn.relu(layer(x)))
            x = scope.constrain(x, "batch", layer.kernel.get_metadata("dims")[1])
        return self.head(x)
