"""The module: router, experts and the record of their loads."""

# B batch, T time, D embed, E experts, F mlp, k experts of a token, L layers

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.core import tree
from spmd.models.feed_forward import Activation, FeedForward
from spmd.models.layers import Linear, contract
from spmd.models.moe.dispatch import apply_experts
from spmd.models.moe.experts import Experts
from spmd.models.moe.router import choose_experts, sequence_balance
from spmd.parallel import scope


class ExpertLoad(NamedTuple):
    """Router statistics of each sequence.

    balance_B: load-balance loss, 1 where loads are even. counts_BE: how often each expert was chosen, by
    tokens that are not padding.
    """

    balance_B: jax.Array
    counts_BE: jax.Array


class Offset(nnx.Variable):
    """State, not trained: what is added to the scores of the experts for the choice."""


class ExpertMixture(nnx.Module):
    """A router and experts in place of a feed-forward layer.

    Args:
        rngs: source of the initial values.
        experts: number of experts, choices of a token, balancing.
        embed: width D of the residual stream.
        width: F of each expert.
        layers: how many are stacked.
        activation: as of FeedForward.
        std: standard deviation of the initial kernels; 0 is 1 / sqrt(fan-in).
        residual_gain: factor on that of the projection back to the residual stream.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        experts: Experts,
        embed: int,
        width: int,
        *,
        layers: int,
        activation: Activation,
        std: float,
        residual_gain: float,
    ):
        num = experts.num
        options = {"layers": layers, "std": std}
        into = ("btd,edf->btef", (num, embed, width), ("experts", "embed", "mlp"))
        back = ("btef,efd->bted", (num, width, embed), ("experts", "mlp", "embed"))
        self.router = Linear(rngs, "btd,de->bte", (embed, num), ("embed", "choice"), **options)
        self.up = Linear(rngs, *into, **options)
        self.gate = Linear(rngs, *into, **options) if activation == "swiglu" else None
        self.down = Linear(rngs, *back, **options, gain=residual_gain)
        options |= {"activation": activation, "residual_gain": residual_gain}
        shared = experts.shared * width
        self.shared = FeedForward(rngs, embed, shared, **options) if shared else None
        zeros_LE = jnp.zeros((layers, num))
        self.offset = Offset(zeros_LE, dims=("layers", "choice")) if experts.bias_rate else None
        self.experts, self.layers = experts, layers
        self.use_running_average = False  # nnx's name: model.eval() sets it

    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array | None
    ) -> tuple[jax.Array, ExpertLoad]:
        """(sum of each token's experts, weighted by their shares [B, T, D]; the load of this layer)."""
        dtype, time = tree.at_least_float32(x_BTD.dtype), "time" if x_BTD.shape[1] > 1 else None
        kernel_DE = scope.constrain(self.router.kernel[...], None, None)
        logits_BTE = contract("btd,de->bte", dtype, x_BTD.astype(dtype), kernel_DE)
        logits_BTE = scope.constrain(logits_BTE, "batch", time, None)
        scores_BTE = jax.nn.softmax(logits_BTE)
        offset_E = None if self.offset is None else self.offset[...]
        choice_BTk, share_BTk = choose_experts(scores_BTE, self.experts.top_k, offset_E)
        gate = None if self.gate is None else self.gate.kernel[...]
        up, down = self.up.kernel[...], self.down.kernel[...]
        y_BTD = apply_experts(x_BTD, choice_BTk, share_BTk, up, down, gate)
        if self.shared is not None:
            y_BTD += self.shared(x_BTD)
        return y_BTD, ExpertLoad(*sequence_balance(scores_BTE, choice_BTk, segments_BT))

    def record_load(self, load_L: ExpertLoad) -> None:
        """Notes the loss and how full each expert is (1: the mean), and updates the offsets.

        Args:
            load_L: the loads of layers, stacked. A pipeline's stage has some of the layers, and notes their
                part of the mean over all.
        """
        num, top_k = self.experts.num, self.experts.top_k
        counts_BE = load_L.counts_BE.sum(0) / self.layers
        tokens_B = counts_BE.sum(-1) / top_k
        share_B = jnp.full_like(tokens_B, load_L.balance_B.shape[0] / self.layers)
        scope.note("balance", load_L.balance_B.sum(0) / self.layers, share_B)
        for i in range(num):
            scope.note(f"load/{i}", counts_BE[:, i] * (num / top_k), tokens_B)
        self._update_offsets(load_L.counts_BE)

    def _update_offsets(self, counts_LBE: jax.Array) -> None:
        """Moves the offsets against the loads of the global batch (Wang et al. 2024, arXiv 2408.15664)."""
        if self.offset is None or self.use_running_average:
            return
        old = self.offset[...]
        weight_B = scope.current().weight
        if weight_B is not None:  # padded examples have no load
            counts_LBE *= (weight_B > 0).astype(counts_LBE.dtype).reshape(1, -1, 1)
        counts_LE = scope.batch_sum(counts_LBE.sum(1)).astype(old.dtype)
        under_LE = jnp.sign(counts_LE.mean(1, keepdims=True) - counts_LE)
        self.offset[...] = old + self.experts.bias_rate * under_LE
