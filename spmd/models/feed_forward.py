"""The feed-forward layer of a transformer block."""

# B batch, T time, D embed, F mlp

from __future__ import annotations

from typing import Literal

import jax
from flax import nnx

from spmd.models.layers import Linear
from spmd.models.layers.activations import activation as named

Activation = Literal["swiglu", "geglu", "gelu", "gelu_exact", "relu"]
GATED: tuple[Activation, ...] = ("swiglu", "geglu")


def activated(name: Activation, x: jax.Array) -> jax.Array:
    """x after the activation of a layer without a gate.

    Args:
        name: relu, gelu in its tanh form, or gelu_exact.
        x: [..., F].

    Returns:
        [..., F].
    """
    if name == "relu":
        return jax.nn.relu(x)
    return jax.nn.gelu(x, approximate=name == "gelu")


class FeedForward(nnx.Module):
    """down(gelu(up(x))), or gated down(f(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202).

    Args:
        rngs: source of the initial values.
        embed: width D of the residual stream.
        width: F of the hidden layer.
        layers: how many are stacked.
        activation: swiglu, gated by SiLU; geglu, by GELU in its tanh form; gelu in this form; gelu_exact, by
            the error function; relu.
        bias: whether the linear layers have biases.
        std: standard deviation of the initial kernels; 0 is 1 / sqrt(fan-in).
        residual_gain: factor on that of the projection back to the residual stream.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        embed: int,
        width: int,
        *,
        layers: int,
        activation: Activation,
        bias: bool = False,
        std: float = 0.0,
        residual_gain: float = 1.0,
    ):
        options = {"layers": layers, "bias": bias, "std": std}
        into = ("btd,df->btf", (embed, width), ("embed", "mlp"))
        back = ("btf,fd->btd", (width, embed), ("mlp", "embed"))
        self.up = Linear(rngs, *into, **options)
        self.gate = Linear(rngs, *into, **options) if activation in GATED else None
        self.activation: Activation = activation
        self.down = Linear(rngs, *back, **options, gain=residual_gain)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        y_BTF = named("up", self.up(x_BTD), "mlp")
        if self.gate is None:
            return self.down(activated(self.activation, y_BTF))
        gate_BTF = named("gate", self.gate(x_BTD), "mlp")
        if self.activation == "geglu":
            return self.down(jax.nn.gelu(gate_BTF, approximate=True) * y_BTF)
        return self.down(jax.nn.silu(gate_BTF) * y_BTF)
