"""Optimizer and schedule configs that build optax transformations."""

from spmd.optim.base import Dims, Optimizer
from spmd.optim.layerwise import LAMB, LARS, trust_ratio
from spmd.optim.optimizers import (
    SGD,
    Adafactor,
    AdamW,
    Lion,
    Muon,
    decay_mask,
    is_hidden_matrix,
    matrix_axes,
)
from spmd.optim.registry import OPTIMIZERS, named

__all__ = [
    "LAMB",
    "LARS",
    "OPTIMIZERS",
    "SGD",
    "Adafactor",
    "AdamW",
    "Dims",
    "Lion",
    "Muon",
    "Optimizer",
    "decay_mask",
    "is_hidden_matrix",
    "matrix_axes",
    "named",
    "trust_ratio",
]
