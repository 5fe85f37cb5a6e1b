"""Preferences: a model learns which of two answers is better."""

# B pairs, T time, V vocab, M chunks

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from spmd.core import batches
from spmd.core.batches import feature
from spmd.core.fields import check
from spmd.metrics import Mean
from spmd.tasks import losses
from spmd.tasks.base import FrozenModel
from spmd.tasks.language import LanguageModel
from spmd.tasks.objective import Batch, MetricSums

Kind = Literal["margin", "accuracy", "chosen", "rejected"]
CHOSEN, REJECTED = 1, 2  # segments of a row


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO(LanguageModel):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    A row holds a prompt with the chosen answer as segment 1 and with the rejected one as segment 2; targets
    are those of the answers. The reference is the model as it starts: frozen, sharded as the trained one;
    with init.lora it is the base without adapters, of which there is no second copy.
    """

    beta: float = 0.1
    """How much a log-ratio to the reference counts; less lets the model go further from it."""
    label_smoothing: float = 0.0
    """Probability that a preference is the wrong way round (Mitchell 2023): below 0.5."""
    frozen = MappingProxyType({"reference": FrozenModel()})
    train_metrics = ("accuracy", "margin")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.beta > 0, f"task.beta={self.beta} must be above 0")
        check(
            0 <= self.label_smoothing < 0.5,
            f"task.label_smoothing={self.label_smoothing} must be in [0, 0.5)",
        )
        check(not self.z_loss, f"task.z_loss={self.z_loss}: preferences have none; use 0")

    @property
    def metrics(self) -> tuple[Mean, ...]:  # type: ignore[override]
        """Rewards of the answers, their difference, and how often it is above 0."""
        kinds: tuple[Kind, ...] = ("margin", "accuracy", "chosen", "rejected")
        return tuple(RewardMetric(name=kind, kind=kind, beta=self.beta) for kind in kinds)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """1 for each pair."""
        for name in ("targets", "segments"):
            self._check(batch, name)
        weight_B = feature(batch, "weight")
        return {"loss": jnp.ones(weight_B.shape, weight_B.dtype)}

    def values(self, outputs: Any, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
        """The loss of each pair.

        Args:
            outputs: [B, T] log-probabilities of the targets.
            batch: with those of the reference as frozen/reference.
            train: whether labels are smoothed.

        Returns:
            {loss: [B]}.
        """
        margin_B = rewards(outputs, batch, self.beta, "margin")
        smoothing = self.label_smoothing if train else 0.0
        loss_B = jax.nn.softplus(-margin_B)
        return {"loss": loss_B if not smoothing else loss_B + smoothing * margin_B}

    def read_frozen(self, name: str, model: Any, batch: Batch) -> jax.Array:
        """[B, T] the reference's log-probabilities of the targets."""
        return self.scores(model, batch)

    def sums(
        self, model: Any, batch: Batch, *, hidden: jax.Array | None = None, train: bool
    ) -> tuple[dict[str, jax.Array], MetricSums]:
        """With chunks, the logits of one are computed, reduced and, in the backward pass, rematerialised."""
        scores_BT = self.scores(model, batch, hidden)
        return self.sums_of(scores_BT, batch, self.counted(batch), train=train)

    def scores(self, model: Any, batch: Batch, hidden: jax.Array | None = None) -> jax.Array:
        """[B, T] log-probabilities of the targets, 0 where there is none.

        Args:
            model: with methods hidden and logits.
            batch: the features.
            hidden: the input of model.logits, where a pipeline has computed it.

        Returns:
            [B, T].
        """
        check(
            hasattr(model, "hidden") and hasattr(model, "logits"),
            f"task {type(self).__name__} needs a model with methods hidden and logits, as"
            " spmd.models.transformer has them",
        )
        x_BTD = model.hidden(*self.inputs(batch)) if hidden is None else hidden
        target_BT = batches.wide_indices(batch["targets"])

        def score(x_BTD: jax.Array, target_BT: jax.Array) -> jax.Array:
            loss_BT = losses.token_losses(model.logits(x_BTD), target_BT).loss_BT
            return jnp.where(target_BT >= 0, -loss_BT, 0)

        if self.chunks == 1:
            return score(x_BTD, target_BT)
        each = jax.checkpoint(score)
        chunks = losses.split_time((x_BTD, target_BT), self.chunks, target_BT.shape[1])
        _, scores_MBt = jax.lax.scan(lambda _, chunk: (None, each(*chunk)), None, chunks)
        return jnp.moveaxis(scores_MBt, 0, 2).reshape(target_BT.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardMetric(Mean):
    """A mean over pairs of rewards: beta times the log-ratio of model and reference."""

    kind: Kind
    """chosen, rejected; margin: their difference; accuracy: how often it is above 0."""
    beta: float

    def values(self, outputs: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """[B] of each pair, from log-probabilities [B, T]."""
        if self.kind == "accuracy":
            margin_B = rewards(outputs, batch, self.beta, "margin")
            return (margin_B > 0).astype(margin_B.dtype)
        return rewards(outputs, batch, self.beta, self.kind)


def rewards(
    scores_BT: jax.Array, batch: Batch, beta: float, kind: Literal["margin", "chosen", "rejected"]
) -> jax.Array:
    """[B] beta times the log-ratio of model and reference, summed over an answer; or the difference of both.

    Args:
        scores_BT: the model's log-probabilities of the targets, 0 where there is none.
        batch: with those of the reference as frozen/reference, and segments.
        beta: the factor.
        kind: which answer, or the chosen one minus the rejected one.

    Returns:
        [B].
    """
    ratio_BT = scores_BT - batch["frozen/reference"].astype(scores_BT.dtype)
    segments_BT = batch["segments"]
    sign = {"chosen": (1, 0), "rejected": (0, 1), "margin": (1, -1)}[kind]
    factor = lambda segment, x: jnp.where(segments_BT == segment, x, 0).astype(ratio_BT.dtype)
    sign_BT = factor(CHOSEN, sign[0]) + factor(REJECTED, sign[1])
    return beta * jnp.sum(ratio_BT * sign_BT, axis=-1)
