"""Which blocks are adapted: find the blocks, profile them on calibration data, choose K of them."""

from .blocks import Block, find_blocks, hidden_states_of, is_encoder_decoder
from .profiling import ActivationProfile, profile_activations
from .strategies import (
    SelectionRequest,
    register_selection_strategy,
    select_blocks,
    selection_strategy_names,
    strategy_needs_general_profile,
    strategy_needs_profile,
    strategy_needs_sensitivity,
)

__all__ = [
    "ActivationProfile",
    "Block",
    "SelectionRequest",
    "find_blocks",
    "hidden_states_of",
    "is_encoder_decoder",
    "profile_activations",
    "register_selection_strategy",
    "select_blocks",
    "selection_strategy_names",
    "strategy_needs_general_profile",
    "strategy_needs_profile",
    "strategy_needs_sensitivity",
]
