"""Is it true: perplexity, degradation, and bytes measured from the tensors."""

from .memory import WeightBytes, measure_weight_bytes, paper_weight_ratio
from .perplexity import Perplexity, degradation, evaluate_perplexity

__all__ = [
    "Perplexity",
    "WeightBytes",
    "degradation",
    "evaluate_perplexity",
    "measure_weight_bytes",
    "paper_weight_ratio",
]
