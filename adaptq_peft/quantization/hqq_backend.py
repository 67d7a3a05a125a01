"""Quantized linears in 2, 3, 4 or 8 bits by HQQ, half-quadratic quantization: https://mobiusml.github.io/hqq_blog.

The codes, their packing and their reading back are those of the package `hqq`. The layer around them is our own:
hqq's `HQQLinear` keeps its scales outside of torch's sight (they don't follow the model to another device), fails on
inputs of another dtype than its own, autocast among them, and saves its input for the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .settings import QuantizationSettings

#: Codes that hqq packs into one element of its storage, a row of groups each; of 3 bits it packs 10, filled up.
_PACKED_TOGETHER = {2: 4, 3: 1, 4: 2, 8: 1}
#: Dtype of scales and zeros, hqq's own default.
_SCALE_DTYPE = torch.float16


class HqqLinear(nn.Linear):
    """A frozen linear map whose weight is stored as HQQ codes and read back for each product.

    A weight is (code - zero) * scale, with a scale and a zero for each group of consecutive weights of the flattened
    [out, in] matrix. It is read back in float32 and rounded to the dtype of the input, or of autocast.

    Attributes:
        weight: packed codes, uint8 or (3 bits) int32, [codes packed together, group size].
        scale: float16 [groups, 1], held as bytes [groups, 2]: casting a model to another dtype must not change it.
        zero: likewise.
        bits: of a code.
        group_size: weights that share a scale and a zero.
    """

    scale: torch.Tensor
    zero: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, group_size: int) -> None:
        super().__init__(in_features, out_features, bias, device="meta")
        self.bits = bits
        self.group_size = group_size

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _CodedLinear.apply(input.to(dtype), self.weight, self.scale, self.zero, bias, self._form)

    def dequantize(self) -> torch.Tensor:
        """The weight [out, in] in float32."""
        return _dequantize(self.weight, self.scale, self.zero, self._form)

    @property
    def _form(self) -> tuple[int, int, int, int]:
        return self.bits, self.group_size, self.out_features, self.in_features

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


def _dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, form: tuple[int, int, int, int]
) -> torch.Tensor:
    from hqq.core.quantize import Quantizer

    bits, group_size, *shape = form
    meta = {
        "nbits": bits,
        "group_size": group_size,
        "shape": shape,
        "axis": 1,
        "packing": Quantizer.bit_to_packing[bits],
        "view_as_float": False,
        "scale": scale.view(_SCALE_DTYPE),
        "zero": zero.view(_SCALE_DTYPE),
        "compute_dtype": torch.float32,
    }
    return Quantizer.dequantize(codes, meta)


class _CodedLinear(torch.autograd.Function):
    """x W^T + bias; W is read from its codes again in backward. Only `x` gets a gradient, so `x` is not saved."""

    @staticmethod
    def forward(  # type: ignore[override]
        x: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        bias: torch.Tensor | None,
        form: tuple[int, int, int, int],
    ) -> torch.Tensor:
        return F.linear(x, _dequantize(codes, scale, zero, form).to(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, codes, scale, zero, _, ctx.form = inputs
        ctx.save_for_backward(codes, scale, zero)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        codes, scale, zero = ctx.saved_tensors
        weight = _dequantize(codes, scale, zero, ctx.form)
        return grad_output @ weight.to(grad_output.dtype), None, None, None, None, None


def owns(module: nn.Module) -> bool:
    """Whether a module is an `HqqLinear`."""
    return isinstance(module, HqqLinear)


def misfit(shape: tuple[int, int], settings: QuantizationSettings) -> str | None:
    """Why hqq can't store a weight [out, in]: it packs whole groups only, several together; `None`: it can."""
    packed = settings.group_size * _PACKED_TOGETHER[settings.bits]
    if shape[0] * shape[1] % packed == 0:
        return None
    return f"its {shape[0]} x {shape[1]} weights are no multiple of {packed}, as {settings.describe()} needs"


def quantize_weight(weight: torch.Tensor, bias: bool, settings: QuantizationSettings) -> nn.Module:
    """An `HqqLinear` with the codes of a weight, on its device.

    Args:
        weight: [out, in], floating point, contiguous. On the meta device the layer's tensors have no values.
        bias: whether the layer will have a bias; it is on the meta device.
        settings: bits and group size.

    Raises:
        ValueError: if a scale or zero is too large for float16: a group of almost equal, large weights.
    """
    from hqq.core.quantize import Quantizer, hqq_base_quant_config

    params = hqq_base_quant_config(nbits=settings.bits, group_size=settings.group_size, axis=1)["weight_quant_params"]
    optimize = not weight.is_meta  # it compares values
    codes, meta = Quantizer.quantize(weight, **{**params, "optimize": optimize}, device=weight.device)
    scale, zero = meta["scale"].to(_SCALE_DTYPE), meta["zero"].to(_SCALE_DTYPE)
    if not weight.is_meta and not torch.isfinite(torch.stack([scale, zero])).all():
        raise ValueError("a group of its weights has a scale or zero that float16 can't hold")
    layer = HqqLinear(weight.shape[1], weight.shape[0], bias, settings.bits, settings.group_size)
    layer._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
    layer.register_buffer("scale", scale.view(torch.uint8))
    layer.register_buffer("zero", zero.view(torch.uint8))
    return layer


def empty_linear(weight: torch.Tensor, bias: bool, settings: QuantizationSettings) -> nn.Module:
    """The `HqqLinear` that `quantize_weight` would make, with values that mean nothing: they are to be loaded."""
    return quantize_weight(weight.to("meta"), bias, settings).to_empty(device=weight.device)


def dequantize_weight(quantized: nn.Module) -> torch.Tensor:
    """The weight [out, in] of an `HqqLinear`, in float32."""
    assert isinstance(quantized, HqqLinear)
    return quantized.dequantize()


def settings_of(quantized: nn.Module) -> QuantizationSettings:
    """The settings of an `HqqLinear`."""
    assert isinstance(quantized, HqqLinear)
    return QuantizationSettings(bits=quantized.bits, backend="hqq", group_size=quantized.group_size)


def load_tensors(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give an `HqqLinear` the codes, scales, zeros and bias of another one of its shape."""
    layer.load_state_dict(tensors)
