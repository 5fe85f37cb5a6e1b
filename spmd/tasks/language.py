"""Causal language models."""

# B batch, T time, D embed, V vocab, M chunks

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from spmd.core import batches
from spmd.core.batches import Ids, feature
from spmd.core.fields import check
from spmd.parallel import scope
from spmd.tasks import losses
from spmd.tasks.base import Task
from spmd.tasks.objective import Batch, MetricSums


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel(Task):
    """The next token: cross-entropy over the tokens that count, those with a target of at least 0."""

    features: tuple[str, ...] = ("tokens", "positions", "segments")
    """Features that the model is called with, in order; the last two only where the batch has them."""
    z_loss: float = 0.0
    """Weight of the squared log-partition as a second loss (PaLM: 1e-4): keeps logits small; 0 is off."""
    chunks: int = 1
    """Parts of the sequence whose logits are held at once; more is less memory, and slower."""
    metrics = (losses.TokenAccuracy(),)
    train_metrics = ("accuracy",)

    def __post_init__(self) -> None:
        check(self.z_loss >= 0, f"task.z_loss={self.z_loss} must not be negative")
        check(bool(self.features), "task.features must name at least the tokens")
        check(self.chunks >= 1, f"task.chunks={self.chunks} must be at least 1")

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Tokens [B, T], and positions and segments [B, T] where the batch has them."""
        first, *rest = self.features
        for name in (first, *(n for n in ("segments", "positions") if n in rest and n in batch)):
            self._check(batch, name)
        index = lambda x: None if x is None else batches.wide_indices(x)
        return (index(feature(batch, first)), *(index(batch.get(name)) for name in rest))

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """1 where there is a target."""
        self._check(batch, "targets")
        counts_BT = (batch["targets"] >= 0).astype(feature(batch, "weight").dtype)
        return dict.fromkeys(("loss", "z_loss") if self.z_loss else ("loss",), counts_BT)

    def coefficients(self, model: Any) -> dict[str, float]:
        """The z-loss has its weight."""
        return super().coefficients(model) | ({"z_loss": self.z_loss} if self.z_loss else {})

    def values(self, outputs: Any, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
        """The cross-entropy of each token, and its squared log-partition."""
        target_BT = batches.wide_indices(batch["targets"])
        batches.check_logits(outputs, target_BT, "targets", "tokens of the model")
        each = losses.token_losses(outputs, target_BT)
        z_loss = {"z_loss": jnp.square(each.partition_BT)} if self.z_loss else {}
        return {"loss": each.loss_BT} | z_loss

    def ranges(self, batch: Any, outputs: Any, model: Any) -> dict[str, Ids]:
        """Tokens and targets are of the vocabulary, positions of the model's length."""
        self._check(batch, "targets")
        batches.check_logits(outputs, batch["targets"], "targets", "tokens of the model")
        vocab = min(getattr(model, "vocab", outputs.shape[-1]), outputs.shape[-1])
        tokens = Ids(vocab, "tokens of the model")
        ranges = {self.features[0]: tokens, "targets": tokens._replace(low=-1, target=True)}
        if "positions" in self.features and "positions" in batch and hasattr(model, "length"):
            ranges["positions"] = Ids(model.length, "positions of the model")
        return ranges

    def sums(
        self, model: Any, batch: Batch, *, hidden: jax.Array | None = None, train: bool
    ) -> tuple[dict[str, jax.Array], MetricSums]:
        """With chunks, the logits of one are computed, reduced and, in the backward pass, rematerialised.

        Chunk m takes tokens m, m + M, ..., so that time stays sharded over the devices as it is.
        """
        if self.chunks == 1:
            return super().sums(model, batch, hidden=hidden, train=train)
        check(
            hasattr(model, "hidden") and hasattr(model, "logits"),
            f"task.chunks={self.chunks} needs a model with methods hidden and logits, as"
            " spmd.models.transformer has them; use task.chunks=1",
        )

        @jax.checkpoint
        def sums_of_chunk(x_BTD, part, counted):
            return self.sums_of(model.logits(x_BTD), {**batch, **part}, counted, train=train)

        def add(sums, chunk):
            return jax.tree.map(jnp.add, sums, sums_of_chunk(*chunk)), None

        x_BTD = model.hidden(*self.inputs(batch)) if hidden is None else hidden
        parts = {n: x for n, x in batch.items() if n == "targets" or n.startswith("frozen/")}
        whole = (x_BTD, parts, self.counted(batch))
        chunks = losses.split_time(whole, self.chunks, feature(batch, "targets").shape[1])
        shapes = jax.eval_shape(sums_of_chunk, *jax.tree.map(lambda x: x[0], chunks))
        zeros = scope.mark_varying(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
        return jax.lax.scan(add, zeros, chunks)[0]

    def _check(self, batch: Batch, name: str) -> None:
        """ValueError unless a feature has one index for each token."""
        batches.check_indices(batch, name, "BT", "one for each token")
        shape, tokens = batch[name].shape, feature(batch, self.features[0]).shape
        check(
            shape == tokens,
            f"feature {name!r} is of shape {list(shape)}, and {self.features[0]!r} of {list(tokens)}: the"
            " task takes one for each token",
        )
