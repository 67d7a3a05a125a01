"""The rest in few bits.

Settings, models that arrive quantized, one file a backend and their table, what is left as it is, the way back to
original weights.
"""

from .arrival import forget_arrival, note_origins, quantization_on_arrival, skip_when_quantizing, undo_upcast
from .backends import (
    check_backend,
    dequantize_linear,
    empty_quantized,
    has_quantized,
    is_linear,
    is_quantized,
    load_quantized,
    origin_of,
    quantize_linear,
    quantize_on_meta,
    settings_of,
)
from .bitsandbytes_backend import gradients_kept_on_cpu
from .leave_reasons import LeaveReasons, fused_experts
from .origin import linear_weight
from .original_weights import ORIGINAL_WEIGHTS, OriginalWeights, follow_cast, named_checkpoint, names_checkpoint
from .settings import QUANTIZATION_NAMES, QuantizationSettings, resolve_quantization

__all__ = [
    "ORIGINAL_WEIGHTS",
    "QUANTIZATION_NAMES",
    "LeaveReasons",
    "OriginalWeights",
    "QuantizationSettings",
    "check_backend",
    "dequantize_linear",
    "empty_quantized",
    "follow_cast",
    "forget_arrival",
    "fused_experts",
    "gradients_kept_on_cpu",
    "has_quantized",
    "is_linear",
    "is_quantized",
    "linear_weight",
    "load_quantized",
    "named_checkpoint",
    "names_checkpoint",
    "note_origins",
    "origin_of",
    "quantization_on_arrival",
    "quantize_linear",
    "quantize_on_meta",
    "resolve_quantization",
    "settings_of",
    "skip_when_quantizing",
    "undo_upcast",
]
