"""Metrics: sums on the devices, values on the host."""

from spmd.metrics.base import Mean, Metric, added, check_metrics, computed, measure
from spmd.metrics.classes import AUC, Accuracy, Calibration, Confusion, blended
from spmd.metrics.errors import MAE, RMSE
from spmd.metrics.ranking import Ranking

__all__ = [
    "AUC",
    "MAE",
    "RMSE",
    "Accuracy",
    "Calibration",
    "Confusion",
    "Mean",
    "Metric",
    "Ranking",
    "added",
    "blended",
    "check_metrics",
    "computed",
    "measure",
]
