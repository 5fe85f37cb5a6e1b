"""SPMD training of Flax models: one experiment file, any mesh."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spmd.experiment import Experiment, Run
    from spmd.handle import load
    from spmd.plan.budget import CommsBudget

__version__ = "0.1.0"

_HOME = {
    "CommsBudget": "plan.budget",
    "Experiment": "experiment",
    "Run": "experiment",
    "load": "handle",
}
__all__ = ["CommsBudget", "Experiment", "Run", "load"]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `import spmd` stays instant."""
    if name in _HOME:
        return getattr(importlib.import_module(f"spmd.{_HOME[name]}"), name)
    raise AttributeError(f"module 'spmd' has no attribute {name!r}")
