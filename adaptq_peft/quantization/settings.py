"""What `AdaptQConfig.quantization` means, resolved to one set of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig

QUANTIZATION_NAMES = ("nf4", "fp4", "int8", "none")


@dataclass(frozen=True)
class QuantizationSettings:
    """How a linear layer is stored by bitsandbytes.

    Args:
        bits: 4 or 8.
        quant_type: "nf4" or "fp4"; only for 4 bits.
        nested_absmax: whether the scales are quantized too ("double quantization"): 4.127 bits a weight, not 4.5.
        compute_dtype: dtype of the matrix product; `None`: that of the first input.
        storage_dtype: dtype of the tensor that holds the packed codes.
        outlier_threshold: LLM.int8() threshold; only for 8 bits.
        skip_modules: names of modules that are left as they are, matched as transformers does: the end of a name, or
            a regular expression for its start.
    """

    bits: int
    quant_type: str = "nf4"
    nested_absmax: bool = True
    compute_dtype: torch.dtype | None = None
    storage_dtype: torch.dtype = torch.uint8
    outlier_threshold: float = 6.0
    skip_modules: tuple[str, ...] = ()

    def same_codes(self, other: QuantizationSettings) -> bool:
        """Whether both give the same codes and scales for a weight."""
        keys = ("bits", "quant_type", "nested_absmax") if self.bits == 4 else ("bits",)
        return all(getattr(self, key) == getattr(other, key) for key in keys)

    def describe(self) -> str:
        """For messages: "nf4 with nested absmax", "fp4" or "int8"."""
        if self.bits == 8:
            return "int8"
        return f"{self.quant_type} {'with' if self.nested_absmax else 'without'} nested absmax"


_NAMED: dict[str, QuantizationSettings | None] = {
    "nf4": QuantizationSettings(bits=4, quant_type="nf4"),
    "fp4": QuantizationSettings(bits=4, quant_type="fp4"),
    "int8": QuantizationSettings(bits=8),
    "none": None,
    "auto": QuantizationSettings(bits=4, quant_type="nf4"),
}


def resolve_quantization(quantization: str | dict[str, Any] | BitsAndBytesConfig) -> QuantizationSettings | None:
    """Settings for one of `QUANTIZATION_NAMES`, a `BitsAndBytesConfig` or its dict; `None` for "none".

    For "auto", those of the linears that its plan stores in 4 bits.

    Raises:
        ValueError: if a `BitsAndBytesConfig` asks for neither 4 nor 8 bits.
    """
    if isinstance(quantization, str):
        return _NAMED[quantization]
    config = BitsAndBytesConfig.from_dict(quantization) if isinstance(quantization, dict) else quantization
    if not config.load_in_4bit and not config.load_in_8bit:
        raise ValueError(
            "quantization is a BitsAndBytesConfig with load_in_4bit=False and load_in_8bit=False, which quantizes "
            'nothing; set one of them, or use quantization="none"'
        )
    return QuantizationSettings(
        bits=4 if config.load_in_4bit else 8,
        quant_type=config.bnb_4bit_quant_type,
        nested_absmax=config.bnb_4bit_use_double_quant,
        compute_dtype=config.bnb_4bit_compute_dtype,
        storage_dtype=config.bnb_4bit_quant_storage,
        outlier_threshold=config.llm_int8_threshold,
        skip_modules=tuple(config.llm_int8_skip_modules or ()),
    )
