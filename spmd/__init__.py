"""SPMD training of Flax models: one experiment file, any mesh."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spmd.api import load
    from spmd.experiment.base import Experiment
    from spmd.experiment.budget import CommsBudget
    from spmd.experiment.run import Run

__version__ = "0.2.0"

_HOME = {
    "CommsBudget": "experiment.budget",
    "Experiment": "experiment.base",
    "Run": "experiment.run",
    "load": "api",
}
__all__ = ["CommsBudget", "Experiment", "Run", "load"]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `import spmd` stays instant."""
    if name in _HOME:
        return getattr(importlib.import_module(f"spmd.{_HOME[name]}"), name)
    raise AttributeError(f"module 'spmd' has no attribute {name!r}")
