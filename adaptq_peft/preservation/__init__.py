"""Keeps what the model knew: forgetting measured, anchored while the model trains, and held to a budget."""

from .anchor import Anchor
from .anchor_callback import PreservationCallback
from .budget import fit_to_budget
from .denoising import threshold_deltas
from .forgetting import BaseReference, measure_forgetting
from .forgetting_callback import ForgettingCallback
from .report import ForgettingReport, TextComparison
from .teacher import BaseAnswers

__all__ = [
    "Anchor",
    "BaseAnswers",
    "BaseReference",
    "ForgettingCallback",
    "ForgettingReport",
    "PreservationCallback",
    "TextComparison",
    "fit_to_budget",
    "measure_forgetting",
    "threshold_deltas",
]
