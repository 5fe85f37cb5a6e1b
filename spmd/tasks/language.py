"""Causal language models."""

# B batch, C classes, T time, D embed, V vocab

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from spmd.core import batches, tree
from spmd.core.batches import Ids, feature
from spmd.core.fields import check
from spmd.models.functional import network
from spmd.parallel import scope
from spmd.tasks import losses
from spmd.tasks.base import Task, noted_sums, scaled_loss, stages_of, training

if TYPE_CHECKING:
    from spmd.tasks.base import Batch, Notes, Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """The next token: cross-entropy over the tokens that count, those with a target of at least 0."""

    inputs: tuple[str, ...] = ("tokens", "positions", "segments")
    """Features that the model is called with, in order; the last two only where the batch has them."""
    z_loss: float = 0.0
    """Weight of the squared log-partition as a second loss (PaLM: 1e-4): keeps logits small; 0 is off."""
    chunks: int = 1
    """Parts of the sequence whose logits are held at once; more is less memory, and slower."""

    def __post_init__(self) -> None:
        check(self.z_loss >= 0, f"task.z_loss={self.z_loss} must not be negative")
        check(bool(self.inputs), "task.inputs must name at least the tokens")
        check(self.chunks >= 1, f"task.chunks={self.chunks} must be at least 1")

    def build(self, model: Any, param_dtype: str = "float32") -> Task:
        """The task of a model that maps tokens [B, T] to logits [B, T, V]; with chunks, by its methods
        `hidden` and `logits`. The batch: tokens, targets [B, T], and perhaps positions and segments [B, T].
        """
        net = network(model, param_dtype)
        real = tree.at_least_float32(jnp.dtype(param_dtype))
        noted: dict[str, float] = getattr(model, "losses", {})
        terms = ("loss", "z_loss") if self.z_loss else ("loss",)

        def loss(params, model_state, batch, step_key, scale):
            with training(batch, step_key):
                sums, model_state = net.call(
                    params, model_state, lambda module: self._sums(module, batch), train=True
                )
            return scaled_loss(sums, scale), (sums, model_state)

        def finish(module, x, batch, scale):
            sums = self._sums(module, batch, hidden=x)
            return scaled_loss(sums, scale), sums

        def predict(params, model_state, batch):
            return net.evaluated(params, model_state, lambda m: m(*self._inputs(batch)))

        def ranges(batch, logits):
            self._check(batch, ["targets"])
            batches.check_logits(logits, batch["targets"], "targets", "tokens of the model")
            vocab = min(getattr(model, "vocab", logits.shape[-1]), logits.shape[-1])
            tokens = Ids(vocab, "tokens of the model")
            found = {self.inputs[0]: tokens, "targets": tokens._replace(low=-1, target=True)}
            if "positions" in self.inputs and "positions" in batch and hasattr(model, "length"):
                found["positions"] = Ids(model.length, "positions of the model")
            return found

        return Task(
            init=net.init,
            dims=net.dims,
            coefficients={"loss": 1.0, "z_loss": self.z_loss} | noted,
            weigh=lambda batch: (
                dict.fromkeys(terms, _token_weights(batch).astype(real).sum())
                | dict.fromkeys(noted, batch["weight"].astype(real).sum())
            ),
            loss=loss,
            predict=predict,
            call=net.evaluated,
            whole_batch=net.whole_batch,
            evaluate=lambda p, s, batch: net.evaluated(p, s, lambda m: self._sums(m, batch)),
            ranges=ranges,
            staged=lambda: stages_of(net, self._inputs, finish),
        )

    def _sums(self, module: Any, batch: Batch, hidden: jax.Array | None = None) -> Sums:
        """hidden: what the head reads, where it is known already."""
        self._check(batch, ["targets"])
        weight_BT = _token_weights(batch)
        target_BT = batches.wide_indices(feature(batch, "targets"))
        notes: Notes = {}
        with scope.bind(notes=notes):
            if self.chunks > 1:
                totals = self._chunked(module, batch, hidden, target_BT, weight_BT)
            else:
                given = hidden is not None
                logits_BTV = module.logits(hidden) if given else module(*self._inputs(batch))
                totals = self._totals(logits_BTV, target_BT, weight_BT)
        weight = weight_BT.sum()
        sums = {name: (total, weight.astype(total.dtype)) for name, total in totals.items()}
        return sums | noted_sums(notes, batch)

    def _totals(
        self, logits_BTV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array
    ) -> dict[str, jax.Array]:
        """Sums over these tokens."""
        batches.check_logits(logits_BTV, target_BT, "targets", "tokens of the model")
        each = losses.token_losses(logits_BTV, target_BT)
        by_name = {"loss": each.loss_BT, "accuracy": each.right_BT}
        if self.z_loss:
            by_name["z_loss"] = jnp.square(each.partition_BT)
        return {n: jnp.sum(x * weight_BT.astype(x.dtype)) for n, x in by_name.items()}

    def _chunked(
        self,
        module: Any,
        batch: Batch,
        x_BTD: jax.Array | None,
        target_BT: jax.Array,
        weight_BT: jax.Array,
    ) -> dict[str, jax.Array]:
        """As _totals, but the logits of a chunk are made, reduced and, in the backward pass, made again.

        Chunk m takes tokens m, m + M, ..., so that a cut of time over devices stays as it is.
        """
        check(
            hasattr(module, "hidden") and hasattr(module, "logits"),
            f"task.chunks={self.chunks} needs a model with methods hidden and logits, as"
            " spmd.models.transformer has them; use task.chunks=1",
        )
        time = target_BT.shape[1]
        check(
            time % self.chunks == 0,
            f"task.chunks={self.chunks} does not divide the {time} tokens of a sequence",
        )

        def split(x: jax.Array) -> jax.Array:
            x = x.reshape(x.shape[0], time // self.chunks, self.chunks, *x.shape[2:])
            return jnp.moveaxis(x, 2, 0)

        @jax.checkpoint
        def totals(x_BTD, target_BT, weight_BT):
            return self._totals(module.logits(x_BTD), target_BT, weight_BT)

        def add(sums, chunk):
            return jax.tree.map(jnp.add, sums, totals(*chunk)), None

        if x_BTD is None:
            x_BTD = module.hidden(*self._inputs(batch))
        chunks = jax.tree.map(split, (x_BTD, target_BT, weight_BT))
        shapes = jax.eval_shape(totals, *jax.tree.map(lambda x: x[0], chunks))
        zeros = scope.varying(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
        return jax.lax.scan(add, zeros, chunks)[0]

    def _check(self, batch: Batch, names: Iterable[str]) -> None:
        """ValueError for shapes or types that this task does not take."""
        for name in names:
            batches.check_indices(batch, name, "BT", "one for each token")
            shape, tokens = batch[name].shape, feature(batch, self.inputs[0]).shape
            check(
                shape == tokens,
                f"feature {name!r} is of shape {list(shape)}, and {self.inputs[0]!r} of {list(tokens)}: the"
                " task takes one for each token",
            )

    def _inputs(self, batch: Batch) -> list[jax.Array | None]:
        first, *rest = self.inputs
        self._check(
            batch, [first, *(n for n in ("segments", "positions") if n in rest and n in batch)]
        )
        return [feature(batch, first), *(batch.get(name) for name in rest)]


def _token_weights(batch: Batch) -> jax.Array:
    """[B, T] the example's weight where there is a target, else 0."""
    weight_B = batch["weight"]
    counts_BT = feature(batch, "targets") >= 0
    return jnp.where(counts_BT, weight_B[:, None], jnp.zeros((), weight_B.dtype))
