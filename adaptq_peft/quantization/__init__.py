"""The rest in 4 bits: settings, one file a backend, and the swap of the frozen blocks' linears."""

from .bitsandbytes_backend import is_quantized, keep_gradients_on_cpu, quantize_linear
from .frozen_blocks import QuantizationReport, QuantizedSwap, dequantize_frozen
from .settings import QUANTIZATION_NAMES, QuantizationSettings, resolve_quantization

__all__ = [
    "QUANTIZATION_NAMES",
    "QuantizationReport",
    "QuantizationSettings",
    "QuantizedSwap",
    "dequantize_frozen",
    "is_quantized",
    "keep_gradients_on_cpu",
    "quantize_linear",
    "resolve_quantization",
]
