"""Tasks: what is trained, as values and weights of loss terms, and metrics."""

from spmd.tasks.base import FrozenModel, Task
from spmd.tasks.classification import Classification
from spmd.tasks.clicks import ClickPrediction
from spmd.tasks.combine import Combine, PCGrad
from spmd.tasks.distillation import Distillation
from spmd.tasks.language import LanguageModel
from spmd.tasks.multi_label import MultiLabel
from spmd.tasks.objective import (
    FROZEN,
    VARIABLES,
    Batch,
    MetricSums,
    Notes,
    Objective,
    Staged,
    Sums,
    is_frozen,
)
from spmd.tasks.preference import DPO
from spmd.tasks.recommendation import NextItem, RatingPrediction, Retrieval
from spmd.tasks.regression import Regression
from spmd.tasks.segmentation import Segmentation
from spmd.tasks.texts import MaskedLanguageModel, TextClassification, TokenTagging
from spmd.tasks.translation import Translation

__all__ = [
    "DPO",
    "FROZEN",
    "VARIABLES",
    "Batch",
    "Classification",
    "ClickPrediction",
    "Combine",
    "Distillation",
    "FrozenModel",
    "LanguageModel",
    "MaskedLanguageModel",
    "MetricSums",
    "MultiLabel",
    "NextItem",
    "Notes",
    "Objective",
    "PCGrad",
    "RatingPrediction",
    "Regression",
    "Retrieval",
    "Segmentation",
    "Staged",
    "Sums",
    "Task",
    "TextClassification",
    "TokenTagging",
    "Translation",
    "is_frozen",
]
