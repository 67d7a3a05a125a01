"""What `AdaptQConfig.quantization` means, resolved to one set of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig, HqqConfig
from transformers.utils.quantization_config import QuantizationMethod

#: Bits that hqq packs without waste. One bit is worse than no weight at all: see the experiment log.
HQQ_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class QuantizationSettings:
    """How a linear layer is stored.

    Args:
        bits: 4 or 8; with hqq one of `HQQ_BITS`, with gptq those of the checkpoint.
        quant_type: "nf4" or "fp4"; only for bitsandbytes' 4 bits.
        nested_absmax: whether the scales are quantized too ("double quantization"): 4.127 bits a weight, not 4.5. Of
            bitsandbytes' 4 bits, as are the next two.
        compute_dtype: dtype of the matrix product; `None`: that of the first input.
        storage_dtype: dtype of the tensor that holds the packed codes.
        outlier_threshold: LLM.int8() threshold; only for bitsandbytes' 8 bits.
        skip_modules: names of modules that are left as they are, matched as transformers does: the end of a name, or
            a regular expression for its start.
        backend: "bitsandbytes", "hqq", or "gptq" of a model that arrived so.
        group_size: weights that share a scale and a zero; only for hqq, a multiple of 8, and gptq, where -1 means each
            row of the weight.
    """

    bits: int
    quant_type: str = "nf4"
    nested_absmax: bool = True
    compute_dtype: torch.dtype | None = None
    storage_dtype: torch.dtype = torch.uint8
    outlier_threshold: float = 6.0
    skip_modules: tuple[str, ...] = ()
    backend: str = "bitsandbytes"
    group_size: int = 64

    def same_codes(self, other: QuantizationSettings) -> bool:
        """Whether both give the same codes and scales for a weight."""
        of_bitsandbytes = ("quant_type", "nested_absmax") if self.bits == 4 else ()
        keys = ("backend", "bits", *(of_bitsandbytes if self.backend == "bitsandbytes" else ("group_size",)))
        return all(getattr(self, key) == getattr(other, key) for key in keys)

    @property
    def rounds_alike_everywhere(self) -> bool:
        """Whether preparing the base again gives the same codes on any machine.

        HQQ's codes come out of an iteration: they depend on the device, the number of threads and hqq's version.
        GPTQ's are read from the checkpoint of the model.
        """
        return self.backend != "hqq"

    @property
    def comes_with_base(self) -> bool:
        """Whether the codes are those of the base's checkpoint: they are not made here, and each load has the same."""
        return self.backend == "gptq"

    @property
    def is_saved(self) -> bool:
        """Whether the file of an adapter, if it holds quantized weights, holds these.

        int8 of a precision plan is made again from the base's weights, always the same.
        """
        return self.backend != "bitsandbytes" or self.bits == 4

    def describe(self) -> str:
        """For messages: "nf4 with nested absmax", "int8", "hqq in 2 bits, groups of 64"."""
        if self.backend != "bitsandbytes":
            groups = "whole rows" if self.group_size == -1 else f"groups of {self.group_size}"
            return f"{self.backend} in {self.bits} bits, {groups}"
        if self.bits == 8:
            return "int8"
        return f"{self.quant_type} {'with' if self.nested_absmax else 'without'} nested absmax"


_NAMED: dict[str, QuantizationSettings | None] = {
    "nf4": QuantizationSettings(bits=4, quant_type="nf4"),
    "fp4": QuantizationSettings(bits=4, quant_type="fp4"),
    "int8": QuantizationSettings(bits=8),
    "hqq4": QuantizationSettings(bits=4, backend="hqq"),
    "hqq3": QuantizationSettings(bits=3, backend="hqq"),
    "hqq2": QuantizationSettings(bits=2, backend="hqq"),
    "none": None,
}
QUANTIZATION_NAMES = tuple(_NAMED)


def resolve_quantization(
    quantization: str | dict[str, Any] | BitsAndBytesConfig | HqqConfig,
) -> QuantizationSettings | None:
    """Settings for one of `QUANTIZATION_NAMES`, a `BitsAndBytesConfig`, an `HqqConfig` or the dict of one.

    Or for the dict that `quantization_on_arrival` gives for a model in GPTQ.

    `None` for "none". For "auto", those of the linears that its plan stores in 4 bits: "nf4".

    Raises:
        ValueError: if a `BitsAndBytesConfig` asks for neither 4 nor 8 bits, or an `HqqConfig` for what is not
            supported, or a dict is of none of them.
    """
    if isinstance(quantization, str):
        return _NAMED["nf4" if quantization == "auto" else quantization]
    given = quantization if isinstance(quantization, dict) else quantization.to_dict()
    try:
        return _from_dict(given)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"quantization is {given!r}, which lacks or misspells something ({error!r}); allowed: what to_dict() of a "
            "BitsAndBytesConfig or HqqConfig gives"
        ) from error


def _from_dict(given: dict[str, Any]) -> QuantizationSettings:
    if given.get("quant_method") in ("hqq", QuantizationMethod.HQQ):
        return _from_hqq(given)
    if given.get("quant_method") in ("gptq", QuantizationMethod.GPTQ):
        return QuantizationSettings(bits=given["bits"], backend="gptq", group_size=given["group_size"])
    return _from_bitsandbytes(BitsAndBytesConfig.from_dict(given))


def _from_bitsandbytes(config: BitsAndBytesConfig) -> QuantizationSettings:
    if not config.load_in_4bit and not config.load_in_8bit:
        raise ValueError(
            "quantization is a BitsAndBytesConfig with load_in_4bit=False and load_in_8bit=False, which quantizes "
            'nothing; set one of them, or use quantization="none"'
        )
    if config.load_in_4bit and config.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise ValueError(
            f"quantization is a BitsAndBytesConfig with bnb_4bit_quant_type={config.bnb_4bit_quant_type!r}; allowed: "
            '"nf4" or "fp4"'
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


def _from_hqq(config: dict[str, Any]) -> QuantizationSettings:
    """Read from the dict, because building an `HqqConfig` needs hqq."""
    params = config["quant_config"].get("weight_quant_params")
    if params is None:
        raise ValueError("quantization is an HqqConfig with a dynamic_config; allowed: one nbits for all layers")
    if params["nbits"] not in HQQ_BITS:
        raise ValueError(f"quantization is an HqqConfig with nbits={params['nbits']}; allowed: {list(HQQ_BITS)}")
    if params["axis"] != 1 or params["group_size"] is None:
        raise ValueError(
            f"quantization is an HqqConfig with axis={params['axis']} and group_size={params['group_size']}; allowed: "
            "axis=1 and a group size"
        )
    return QuantizationSettings(
        bits=params["nbits"],
        backend="hqq",
        group_size=params["group_size"],
        skip_modules=tuple(config["skip_modules"] or ()),
    )
