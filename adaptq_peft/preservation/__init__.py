"""Keeps what the model knew: forgetting measured, and held to a budget."""

from .budget import fit_to_budget
from .denoising import threshold_deltas
from .forgetting import BaseReference, measure_forgetting
from .forgetting_callback import ForgettingCallback
from .report import ForgettingReport, TextComparison

__all__ = [
    "BaseReference",
    "ForgettingCallback",
    "ForgettingReport",
    "TextComparison",
    "fit_to_budget",
    "measure_forgetting",
    "threshold_deltas",
]
