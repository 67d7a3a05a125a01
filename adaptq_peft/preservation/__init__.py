"""Keeps what the model knew: forgetting measured, and held to a budget."""

from .forgetting import BaseReference, measure_forgetting
from .report import ForgettingReport, TextComparison

__all__ = ["BaseReference", "ForgettingReport", "TextComparison", "measure_forgetting"]
