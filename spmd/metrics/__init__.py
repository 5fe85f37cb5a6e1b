"""Metrics: sums on the devices, values on the host."""

from spmd.metrics.base import Mean, Metric, add_sums, check_metrics, compute_values, measure
from spmd.metrics.classes import (
    AUC,
    Accuracy,
    Calibration,
    CalibrationRatio,
    Confusion,
    MacroF1,
    blended,
)
from spmd.metrics.errors import MAE, RMSE, difference
from spmd.metrics.ranking import Ranking

__all__ = [
    "AUC",
    "MAE",
    "RMSE",
    "Accuracy",
    "Calibration",
    "CalibrationRatio",
    "Confusion",
    "MacroF1",
    "Mean",
    "Metric",
    "Ranking",
    "add_sums",
    "blended",
    "check_metrics",
    "compute_values",
    "difference",
    "measure",
]
