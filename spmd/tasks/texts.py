"""Classes of texts."""

# B batch, T time

from __future__ import annotations

import dataclasses
from typing import Any

from spmd.core import batches
from spmd.core.batches import Ids
from spmd.metrics import Accuracy, MacroF1, Metric
from spmd.tasks.classification import Classification
from spmd.tasks.objective import Batch


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
        """Tokens [B, T], and segments [B, T]."""
        batches.check_indices(batch, self.input, "BT", "one for each token")
        wide = lambda x: None if x is None else batches.wide_indices(x)
        return wide(batch[self.input]), wide(batch.get("segments"))

    def ranges(self, batch: Any, outputs: Any, model: Any = None) -> dict[str, Ids]:
        """Labels are classes of the output, tokens of the vocabulary."""
        ranges = super().ranges(batch, outputs, model)
        if hasattr(model, "vocab"):
            ranges[self.input] = Ids(model.vocab, "tokens of the model")
        return ranges
