"""Optimizer and schedule configs that build optax transformations."""

from spmd.optim.base import Dims, Group, Optimizer
from spmd.optim.groups import frozen_names, row_rates
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
from spmd.optim.rowwise import RowWise
from spmd.optim.transformed import Optax

__all__ = [
    "LAMB",
    "LARS",
    "OPTIMIZERS",
    "SGD",
    "Adafactor",
    "AdamW",
    "Dims",
    "Group",
    "Lion",
    "Muon",
    "Optax",
    "Optimizer",
    "RowWise",
    "decay_mask",
    "frozen_names",
    "is_hidden_matrix",
    "matrix_axes",
    "named",
    "row_rates",
    "trust_ratio",
]
