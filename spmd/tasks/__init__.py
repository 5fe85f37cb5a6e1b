"""Tasks: a model, its loss as sums with global weights, its metrics."""

from spmd.tasks.base import FROZEN, Batch, Notes, Staged, Sums, Task
from spmd.tasks.classification import Classification
from spmd.tasks.language import LanguageModel

__all__ = ["FROZEN", "Batch", "Classification", "LanguageModel", "Notes", "Staged", "Sums", "Task"]
