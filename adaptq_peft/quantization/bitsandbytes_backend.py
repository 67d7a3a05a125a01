"""Quantized linears by bitsandbytes: `Linear4bit` and `Linear8bitLt`."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from .origin import Origin
from .settings import QuantizationSettings

#: Values of absmax that share a scale, where it is nested.
NESTED_BLOCK_SIZE = 256


def quantize_weight(weight: torch.Tensor, bias: bool, settings: QuantizationSettings) -> nn.Module:
    """A `Linear4bit` or `Linear8bitLt` with the codes of a weight, on its device.

    Args:
        weight: [out, in], floating point, contiguous. On the meta device the layer's tensors have no values.
        bias: whether the layer will have a bias; it is on the meta device.
        settings: how to quantize.
    """
    build = _linear_4bit if settings.bits == 4 else _linear_8bit
    if not weight.is_meta:
        return build(weight, bias, settings)
    import bitsandbytes as bnb

    # bitsandbytes makes its 8-bit table once, where it first quantizes: that must not be the meta device.
    bnb.functional.quantize_blockwise(torch.zeros(1))
    quantized: Any = build(weight, bias, settings)
    quantized.weight._quantize(weight.device)
    return quantized


def empty_linear(weight: torch.Tensor, bias: bool, settings: QuantizationSettings) -> nn.Module:
    """The `Linear4bit` that `quantize_weight` would make, with zeros for codes and scales: they are to be loaded."""
    import bitsandbytes.functional as bnb

    codes, like = bnb.quantize_4bit(
        weight.to("meta"), quant_type=settings.quant_type, quant_storage=settings.storage_dtype
    )
    absmax, offset, nested = torch.zeros(like.absmax.shape, device=weight.device), None, None
    if settings.nested_absmax:
        offset = absmax.new_zeros(())
        absmax, nested = bnb.quantize_blockwise(absmax, blocksize=NESTED_BLOCK_SIZE)
    state = bnb.QuantState(
        absmax=absmax,
        shape=like.shape,
        code=bnb.get_4bit_type(settings.quant_type, device=weight.device),
        blocksize=like.blocksize,
        quant_type=settings.quant_type,
        dtype=weight.dtype,
        offset=offset,
        state2=nested,
    )
    layer: Any = _linear_4bit(torch.zeros_like(codes, device=weight.device), bias, settings, weight.shape, state)
    layer.quant_state = state
    return layer


def _linear_4bit(
    weight: torch.Tensor,
    bias: bool,
    settings: QuantizationSettings,
    shape: torch.Size | None = None,
    state: Any = None,
) -> nn.Module:
    """A `Linear4bit` of a weight or, with its `shape` and a `QuantState`, of codes that it has."""
    import bitsandbytes as bnb

    out_features, in_features = shape or weight.shape
    storage: dict[str, Any] = {
        "compress_statistics": settings.nested_absmax,
        "quant_type": settings.quant_type,
        "quant_storage": settings.storage_dtype,
    }
    layer = bnb.nn.Linear4bit(
        in_features, out_features, bias=bias, compute_dtype=settings.compute_dtype, device="meta", **storage
    )
    params: Any = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_state=state, bnb_quantized=state is not None, module=layer, **storage
    )
    layer._parameters["weight"] = params.to(weight.device)  # quantizes a weight
    keep_gradients_on_cpu(layer)
    layer.register_load_state_dict_pre_hook(_load_quant_state)
    return layer


def load_tensors(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
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


def owns(module: nn.Module) -> bool:
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


@contextmanager
def gradients_kept_on_cpu(model: nn.Module) -> Iterator[None]:
    """`keep_gradients_on_cpu` for all modules of a model, taken back if the code within the context fails."""
    packed = [module for module in model.modules() if vars(module).get("support_avx512bf16_for_cpu")]
    for module in packed:
        keep_gradients_on_cpu(module)
    try:
        yield
    except BaseException:
        for module in packed:
            module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
        raise


def forgets_dtype(module: nn.Module) -> bool:
    """Whether a module is a linear in int8, which does not say what dtype its weight had."""
    if not owns(module):
        return False
    import bitsandbytes as bnb

    return isinstance(module, bnb.nn.Linear8bitLt)


def origin_as_loaded(quantized: nn.Module) -> Origin:
    """What a linear was that transformers has quantized while loading the model; int8 stands for a float16 weight."""
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


def dequantize_weight(quantized: nn.Module) -> torch.Tensor:
    """The weight [out, in] of a `Linear4bit` or `Linear8bitLt`: in the dtype that it had, or in float32."""
    source: Any = quantized
    return dequantize_bnb_weight(source.weight, state=getattr(quantized, "state", None))
