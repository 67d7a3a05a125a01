"""Linears of models that arrive in GPTQ: the `TorchLinear` of GPTQModel, which stays in the frozen blocks as it is.

GPTQModel has several kernels, and takes the fastest for a machine by itself. That of CPUs, `TorchAtenLinear`, packs
its codes anew in the first evaluation pass, and from then on runs through an operator without autograd: gradients are
lost in silence (7.5.0). Those of GPUs are for inference, or were not tried. So `TorchLinear` is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .settings import QuantizationSettings

_KERNELS = "gptqmodel.nn_modules.qlinear"


def owns(module: nn.Module) -> bool:
    """Whether a module is a `TorchLinear` of GPTQModel."""
    kernel = sys.modules.get(f"{_KERNELS}.torch")
    return kernel is not None and type(module) is kernel.TorchLinear


def is_of_another_kernel(module: nn.Module) -> bool:
    """Whether a module is a quantized linear of GPTQModel that is not supported here."""
    return type(module).__module__.startswith(f"{_KERNELS}.") and not owns(module)


def misfit(linear: nn.Module) -> str | None:
    """Why a linear is not in GPTQ: its checkpoint has it in 16 bits, and nothing is rounded here; `None`: it is."""
    return None if owns(linear) else "the GPTQ checkpoint of the model has it in 16 bits"


def quantize_weight(weight: torch.Tensor, bias: bool, settings: QuantizationSettings) -> nn.Module:
    """Not possible, with codes or without: GPTQModel quantizes a whole model, with calibration data.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{settings.describe()} comes with the checkpoint of a model, and weights can't be rounded to it here. Load "
        'the GPTQ checkpoint anew for another adapter, or unload with frozen="dequantized" or "original"'
    )


def dequantize_weight(quantized: nn.Module) -> torch.Tensor:
    """The weight [out, in] of a `TorchLinear`, in the dtype of its scales, float16."""
    kernel: Any = type(quantized)  # the method of the instance is compiled by torch.compile at its first call
    return kernel.dequantize_weight(quantized).t().contiguous()


def settings_of(quantized: nn.Module) -> QuantizationSettings:
    """The settings of a `TorchLinear`."""
    source: Any = quantized
    return QuantizationSettings(bits=source.bits, backend="gptq", group_size=source.group_size)


def load_tensors(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a `TorchLinear` the codes, scales, zeros and bias of another one of its shape."""
    layer.load_state_dict(tensors)
