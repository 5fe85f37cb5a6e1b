"""Classes of texts, classes of tokens (tagging), and hidden tokens (masked language models)."""

# B batch, T time, C classes

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from spmd.core import batches
from spmd.core.batches import Ids
from spmd.core.fields import check
from spmd.metrics import Accuracy, MacroF1, Metric
from spmd.tasks.classification import Classification
from spmd.tasks.language import LanguageModel
from spmd.tasks.losses import cross_entropy
from spmd.tasks.objective import Batch

OPTIONAL = ("segments", "types", "positions")  # of an encoder's inputs, behind the tokens


def encoder_inputs(batch: Batch, name: str) -> tuple[Any, ...]:
    """Inputs of an encoder of texts.

    Args:
        batch: the features; `segments` [B, T], 0 at padding, `types` and `positions` may be among them.
        name: feature of the tokens [B, T].

    Returns:
        Tokens, segments or None, and what the batch has of types and positions.
    """
    given = [each for each in OPTIONAL if each in batch]
    for each in (name, *given):
        batches.check_indices(batch, each, "BT", "one for each token")
    wide = lambda x: None if x is None else batches.wide_indices(x)
    last = max((OPTIONAL.index(each) + 1 for each in given), default=1)
    return (wide(batch[name]), *(wide(batch.get(each)) for each in OPTIONAL[: max(last, 1)]))


def encoder_ranges(batch: Any, name: str, model: Any) -> dict[str, Ids]:
    """The ranges of the inputs: tokens of the vocabulary, types and positions of the model.

    Args:
        batch: the features.
        name: feature of the tokens.
        model: config of the model.
    """
    fields = {name: ("vocab", "tokens"), "types": ("types", "token types")}
    fields["positions"] = ("length", "positions")
    return {
        feature: Ids(getattr(model, field), f"{what} of the model")
        for feature, (field, what) in fields.items()
        if feature in batch and hasattr(model, field)
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassification(Classification):
    """A class for each text: softmax cross-entropy, accuracy and macro-F1."""

    input: str = "tokens"
    """Name of the feature of the tokens; `segments`, where the batch has them, are 0 at padding."""

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """Accuracy, and the mean over classes of F1."""
        return (Accuracy(label=self.label), MacroF1(label=self.label))

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Tokens [B, T], and segments, types and positions [B, T]."""
        return encoder_inputs(batch, self.input)

    def ranges(self, batch: Any, outputs: Any, model: Any = None) -> dict[str, Ids]:
        """Labels are classes of the output, tokens of the vocabulary."""
        ranges = super().ranges(batch, outputs, model)
        return ranges | encoder_ranges(batch, self.input, model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTagging(TextClassification):
    """A class for each token (named entities, parts of speech); a label below 0 counts nowhere.

    Accuracy and macro-F1 are over the tokens that count.
    """

    label: str = "tags"
    """Name of the feature of the tokens' classes [B, T]."""

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """1 where a token has a class."""
        batches.check_indices(batch, self.label, "BT", "one for each token")
        counts_BT = batch[self.label] >= 0
        return {"loss": counts_BT.astype(batches.feature(batch, "weight").dtype)}

    def values(self, outputs: Any, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
        """The cross-entropy of each token."""
        self._check(outputs, batch)
        label_BT = jnp.maximum(batches.wide_indices(batch[self.label]), 0)
        smoothing = self.label_smoothing if train else 0.0
        return {"loss": cross_entropy(outputs, label_BT, smoothing, self.class_weights)}

    def ranges(self, batch: Any, outputs: Any, model: Any = None) -> dict[str, Ids]:
        """Labels are classes of the output or below 0, tokens of the vocabulary."""
        self._check(outputs, batch)
        labels = Ids(outputs.shape[-1], "classes of the model", low=-100, target=True)
        return {self.label: labels} | encoder_ranges(batch, self.input, model)

    def _check(self, outputs: Any, batch: Any) -> None:
        """ValueError unless each token has logits and a class."""
        label, shape = batches.feature(batch, self.label), batch[self.input].shape
        check(
            label.shape == shape and outputs.shape[:-1] == shape,
            f"task TokenTagging takes a class and logits for each token: {self.input!r} is of shape"
            f" {list(shape)}, {self.label!r} of {list(label.shape)}, and the model's output of"
            f" {list(outputs.shape)}; spmd.models.encoder gives such logits with model.output=tokens",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLanguageModel(LanguageModel):
    """Tokens that the data hide (transform mask_tokens), from all others (Devlin et al. 2019, section 3.1).

    The loss counts tokens with a target of at least 0, those that were hidden.
    """

    features: tuple[str, ...] = ("tokens", "segments", "types", "positions")
    """Features that the model is called with, in order; those behind the first only where the batch has
    them."""

    def ranges(self, batch: Any, outputs: Any, model: Any) -> dict[str, Ids]:
        """Tokens and targets are of the vocabulary, types and positions of the model."""
        ranges = super().ranges(batch, outputs, model)
        return encoder_ranges(batch, self.features[0], model) | ranges
