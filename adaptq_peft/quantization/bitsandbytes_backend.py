"""Quantized linears by bitsandbytes: `Linear4bit` and `Linear8bitLt`."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from .settings import QuantizationSettings


def check_bitsandbytes() -> None:
    """Raise ImportError, with the command that installs it, if bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "Quantizing the frozen blocks needs bitsandbytes, which is not installed. Run `pip install bitsandbytes`, "
            'or use AdaptQConfig(quantization="none").'
        )


@dataclass(frozen=True)
class Origin:
    """What a quantized linear was before.

    Args:
        linear_class: `nn.Linear` or `Conv1D`.
        dtype: dtype of its weight.
        kept: the layer itself, if it was kept. Not a submodule of the quantized one: it does not move with the model.
        calibrated: whether its codes were chosen by calibration, so that rounding it again gives others.
    """

    linear_class: type[nn.Module]
    dtype: torch.dtype
    kept: nn.Module | None = None
    calibrated: bool = False


def quantize_linear(linear: nn.Module, settings: QuantizationSettings) -> nn.Module:
    """A bitsandbytes layer with the weights of a linear layer, on the same device. The input is left as it is.

    Args:
        linear: `nn.Linear` with weight [out, in], or `Conv1D` with weight [in, out], which is transposed first.
        settings: how to quantize.

    Returns:
        `Linear4bit` or `Linear8bitLt`, frozen, in the training mode of `linear`; its bias is that of `linear`.

    Raises:
        ValueError: if the weight is on the meta device or not a floating point tensor.
    """
    weight: torch.Tensor = linear.weight.data  # type: ignore[assignment]
    if weight.device.type == "meta":
        raise ValueError(
            "its weight is on the meta device and has no values to quantize. Load the weights first, or use "
            'quantization="none"'
        )
    if not weight.is_floating_point():
        raise ValueError(f"weight has dtype {weight.dtype}; only floating point weights can be quantized")
    if isinstance(linear, Conv1D):
        weight = weight.t()
    build = _linear_4bit if settings.bits == 4 else _linear_8bit
    quantized = build(weight.contiguous(), linear.bias is not None, settings)
    # Straight into the dict: with `low_cpu_mem_usage=True`, registering a parameter would send it to the meta device.
    quantized._parameters["bias"] = linear.bias  # type: ignore[assignment]
    linear_class = Conv1D if isinstance(linear, Conv1D) else nn.Linear
    quantized.adaptq_origin = Origin(linear_class, weight.dtype)  # type: ignore[assignment]
    return quantized.requires_grad_(False).train(linear.training)


def quantize_on_meta(linear: nn.Module, settings: QuantizationSettings) -> nn.Module:
    """What `quantize_linear` makes of a layer on the meta device: tensors of the right shapes, without values.

    Args:
        linear: `nn.Linear` or `Conv1D` on the meta device; left as it is.
        settings: how to quantize.
    """
    import bitsandbytes as bnb

    # bitsandbytes makes its 8-bit table once, where it first quantizes: that must not be the meta device.
    bnb.functional.quantize_blockwise(torch.zeros(1))
    weight: torch.Tensor = linear.weight.data  # type: ignore[assignment]
    weight = weight.t().contiguous() if isinstance(linear, Conv1D) else weight
    build = _linear_4bit if settings.bits == 4 else _linear_8bit
    quantized: Any = build(weight, linear.bias is not None, settings)
    quantized.weight._quantize(weight.device)
    quantized._parameters["bias"] = linear.bias
    linear_class = Conv1D if isinstance(linear, Conv1D) else nn.Linear
    quantized.adaptq_origin = Origin(linear_class, weight.dtype)
    return quantized.requires_grad_(False)


def _linear_4bit(weight: torch.Tensor, bias: bool, settings: QuantizationSettings) -> nn.Module:
    import bitsandbytes as bnb

    out_features, in_features = weight.shape
    storage: dict[str, Any] = {
        "compress_statistics": settings.nested_absmax,
        "quant_type": settings.quant_type,
        "quant_storage": settings.storage_dtype,
    }
    layer = bnb.nn.Linear4bit(
        in_features, out_features, bias=bias, compute_dtype=settings.compute_dtype, device="meta", **storage
    )
    params: Any = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **storage)
    layer._parameters["weight"] = params.to(weight.device)
    keep_gradients_on_cpu(layer)
    layer.register_load_state_dict_pre_hook(_load_quant_state)
    return layer


def load_quantized(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a `Linear4bit` the codes, scales and bias of another one of its shape.

    Args:
        layer: the layer, changed in place.
        tensors: what the other one's `state_dict` has.
    """
    parts = {name: tensor for name, tensor in tensors.items() if name.startswith("weight.")}
    device: Any = cast(Any, layer).weight.device
    _load_quant_state(layer, parts, "")
    layer._parameters["weight"].data = tensors["weight"].to(device)  # type: ignore[union-attr]
    if "bias" in tensors:
        layer._parameters["bias"] = nn.Parameter(tensors["bias"].to(device), requires_grad=False)


def _load_quant_state(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Read the scales that `Linear4bit` writes into a state dict; by itself it refuses them when loading strictly."""
    import bitsandbytes as bnb

    start = f"{prefix}weight."
    parts = {name.removeprefix(start): state_dict.pop(name) for name in list(state_dict) if name.startswith(start)}
    if parts:
        state = bnb.functional.QuantState.from_dict(parts, device=module.weight.device)
        module.weight.quant_state = module.quant_state = state


class _FirstOfEach(logging.Filter):
    """Lets each message pass once: `Linear8bitLt` says at each call that it casts its input to float16."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        is_new = record.msg not in self._seen
        self._seen.add(record.msg)
        return is_new


_FIRST_OF_EACH = _FirstOfEach()


def _linear_8bit(weight: torch.Tensor, bias: bool, settings: QuantizationSettings) -> nn.Module:
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_FIRST_OF_EACH)  # added once, as the same object
    out_features, in_features = weight.shape
    layer = bnb.nn.Linear8bitLt(
        in_features,
        out_features,
        bias=bias,
        has_fp16_weights=False,
        threshold=settings.outlier_threshold,
        device="meta",
    )
    params: Any = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer._parameters["weight"] = params.to(weight.device)
    return layer


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantized bitsandbytes linear."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes as bnb

    return isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def keep_gradients_on_cpu(module: nn.Module) -> None:
    """Switch off the path of `Linear4bit` that drops gradients in silence. No effect on other modules.

    On CPUs with AVX512-BF16 an evaluation pass repacks the weight, and training calls after it go through an operator
    without autograd (bitsandbytes 0.50.2): gradients through the layer are lost. It also makes outputs in training and
    evaluation mode differ by 3e-3 relative.
    """
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if not module.get_parameter("weight").is_meta:
            module.state_dict()  # undoes the repacking, if there was an evaluation pass before


def origin_of(quantized: nn.Module) -> Origin:
    """What a quantized linear was, whether `quantize_linear` made it or transformers did while loading."""
    origin = getattr(quantized, "adaptq_origin", None)
    if origin is not None:
        return origin
    source: Any = quantized
    state = getattr(source.weight, "quant_state", None)
    linear_class = Conv1D if getattr(quantized, "source_cls", None) is Conv1D else nn.Linear
    return Origin(linear_class, torch.float16 if state is None else state.dtype)  # LLM.int8() takes float16


def settings_of(quantized: nn.Module) -> QuantizationSettings:
    """The settings by which a linear was quantized."""
    source: Any = quantized
    state = getattr(source.weight, "quant_state", None)
    if state is None:
        return QuantizationSettings(bits=8, outlier_threshold=source.state.threshold)
    return QuantizationSettings(
        bits=4,
        quant_type=state.quant_type,
        nested_absmax=state.nested,
        compute_dtype=source.compute_dtype,
        storage_dtype=source.weight.dtype,
    )


def dequantize_linear(quantized: nn.Module) -> nn.Module:
    """The inverse of `quantize_linear` up to the rounding: a plain layer with the dequantized weights.

    Args:
        quantized: `Linear4bit` or `Linear8bitLt`.
    """
    source: Any = quantized
    origin = origin_of(quantized)
    weight = dequantize_bnb_weight(source.weight, state=getattr(quantized, "state", None)).to(origin.dtype)
    if origin.linear_class is Conv1D:
        weight = weight.t().contiguous()
    return linear_from_tensors(origin.linear_class, weight, source.bias).train(quantized.training)


def linear_from_tensors(linear_class: type[nn.Module], weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """A frozen `nn.Linear` with this weight [out, in], or `Conv1D` with this weight [in, out]. The bias is copied."""
    with torch.device("meta"):
        linear = linear_class(*weight.shape[::-1])
    # Straight into the dict: with `low_cpu_mem_usage=True`, registering a parameter would send it to the meta device.
    linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    copied = None if bias is None else nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=False)
    linear._parameters["bias"] = copied
    return linear
