"""Is it true: perplexity, degradation, and bytes measured from the tensors, or planned before there are any."""

from .checkpoint_headers import CheckpointSummary
from .environment import describe_environment
from .memory import WeightBytes, measure_weight_bytes, paper_weight_ratio
from .memory_plan import MemoryPlan, MethodMemory, largest_num_adapted_blocks, measure_method, plan_memory
from .optimizer_states import OPTIMIZERS, check_optimizer, optimizer_state_bytes, trained_parameters
from .perplexity import Perplexity, degradation, evaluate_perplexity, token_nll

__all__ = [
    "OPTIMIZERS",
    "CheckpointSummary",
    "MemoryPlan",
    "MethodMemory",
    "Perplexity",
    "WeightBytes",
    "check_optimizer",
    "degradation",
    "describe_environment",
    "evaluate_perplexity",
    "largest_num_adapted_blocks",
    "measure_method",
    "measure_weight_bytes",
    "optimizer_state_bytes",
    "paper_weight_ratio",
    "plan_memory",
    "token_nll",
    "trained_parameters",
]
