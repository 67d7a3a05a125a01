"""ADAPTQ for PEFT: full-rank adaptation of the blocks that a domain uses most, the rest of the model in 4 bits.

Importing this package registers `PeftType.ADAPTQ` with PEFT.
"""

__version__ = "0.1.0"

from .artifacts.base_calibration import quantize_base
from .artifacts.hotswap import hotswap_adapter
from .artifacts.lora_conversion import convert_to_lora
from .artifacts.model_card import keep_section_when_cards_are_rewritten, update_model_card
from .artifacts.quantized_base import QuantizedBaseReference
from .config import AdaptQConfig
from .preservation import (
    Anchor,
    BaseAnswers,
    BaseReference,
    ForgettingCallback,
    ForgettingReport,
    PreservationCallback,
    fit_to_budget,
    measure_forgetting,
)
from .presplit import adaptq_bnb_config
from .registration import register_tuner
from .selection import ActivationProfile, SelectionRequest, profile_activations, register_selection_strategy
from .tuner import AdaptQTuner

register_tuner(AdaptQConfig, AdaptQTuner)
keep_section_when_cards_are_rewritten()

__all__ = [
    "ActivationProfile",
    "AdaptQConfig",
    "AdaptQTuner",
    "Anchor",
    "BaseAnswers",
    "BaseReference",
    "ForgettingCallback",
    "ForgettingReport",
    "PreservationCallback",
    "QuantizedBaseReference",
    "SelectionRequest",
    "adaptq_bnb_config",
    "convert_to_lora",
    "fit_to_budget",
    "hotswap_adapter",
    "measure_forgetting",
    "profile_activations",
    "quantize_base",
    "register_selection_strategy",
    "update_model_card",
]
