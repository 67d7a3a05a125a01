"""Models that transformers has quantized while loading them: what it did, and what a later load must do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationMethod

from . import bitsandbytes_backend, gptq_backend
from .origin import Origin

#: Packages whose quantized layers are no `nn.Linear`: nothing here would see them.
_OTHER_QUANTIZERS = ("auto_gptq", "awq", "gptqmodel", "hqq", "optimum")


def quantization_on_arrival(model: nn.Module) -> dict[str, Any] | None:
    """How a model was quantized when transformers had loaded it, as a dict; `None`: it was not.

    Of bitsandbytes the whole `BitsAndBytesConfig`; of GPTQ "quant_method", "bits", "group_size", "desc_act" and "sym".

    Raises:
        ValueError: if the model was quantized by another method, or its layers in GPTQ are of a kernel that is not
            supported.
    """
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    if found is None or getattr(model, "hf_quantizer", None) is None:
        _check_layers(model)
        return None
    config: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = config.get("quant_method")
    if method in ("gptq", QuantizationMethod.GPTQ):
        _check_kernels(model, config)
        return {"quant_method": "gptq", **{key: config[key] for key in ("bits", "group_size", "desc_act", "sym")}}
    if method not in ("bitsandbytes", QuantizationMethod.BITS_AND_BYTES):
        raise _unsupported(repr(getattr(method, "value", method)))
    return config


def _check_layers(model: nn.Module) -> None:
    """Refuse layers of other quantizers, which their own loaders put into a model without transformers' knowledge."""
    for name, module in model.named_modules():
        package = type(module).__module__.partition(".")[0]
        if package in _OTHER_QUANTIZERS:
            raise _unsupported(f"{package!r} ({name} is a {type(module).__name__})")


def _unsupported(quantizer: str) -> ValueError:
    return ValueError(
        f"the model arrived quantized by {quantizer}; allowed: bitsandbytes, GPTQ that transformers' from_pretrained "
        "has loaded, or a model that is not quantized. Load the 16-bit checkpoint that it was made from: "
        "get_peft_model stores the frozen blocks as AdaptQConfig(quantization=...) says, in 2 to 8 bits"
    )


def _check_kernels(model: nn.Module, config: dict[str, Any]) -> None:
    """Refuse kernels of GPTQModel that lose gradients or can't be read back."""
    for name, module in model.named_modules():
        if gptq_backend.is_of_another_kernel(module):
            raise ValueError(
                f"{name} of this GPTQ model is a {type(module).__name__}; allowed: TorchLinear, the kernel of "
                "GPTQModel that passes gradients on and can be read back. Load the model by from_pretrained(..., "
                f'quantization_config=GPTQConfig(bits={config["bits"]}, backend="gptq_torch"))'
            )


def note_origins(model: nn.Module) -> None:
    """Note at the linears of a model that arrived in GPTQ or int8 what they were before; they don't know its dtype.

    GPT-2, with its `Conv1D`, can't be loaded in GPTQ (transformers 5.23.0 with GPTQModel 7.5.0).
    """
    dtype: Any = loaded_dtype(model) or getattr(model, "dtype", None)
    for module in model.modules():
        if gptq_backend.owns(module):
            module.adaptq_origin = Origin(nn.Linear, dtype, calibrated=True)  # type: ignore[assignment]
        elif bitsandbytes_backend.forgets_dtype(module) and not hasattr(module, "adaptq_origin"):
            module.adaptq_origin = replace(bitsandbytes_backend.origin_as_loaded(module), dtype=dtype)  # type: ignore[assignment]


def loaded_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype that a model was loaded in, from its config; `None` if that does not say."""
    found = getattr(getattr(model, "config", None), "dtype", None)
    return getattr(torch, found.removeprefix("torch."), None) if isinstance(found, str) else found


def dtype_now(model: nn.Module) -> torch.dtype | None:
    """The dtype of a model's input embeddings: it follows `model.to(...)`, and `prepare_model_for_kbit_training`.

    `None` for a model that has none, or several (CLIP).
    """
    find: Any = getattr(model, "get_input_embeddings", lambda: None)
    try:
        weight = getattr(find(), "weight", None)
    except NotImplementedError:
        return None
    return weight.dtype if isinstance(weight, torch.Tensor) and weight.is_floating_point() else None


def skip_when_quantizing(model: nn.Module, names: Iterable[str]) -> None:
    """Note in the config of a model that arrived quantized that these layers are plain now.

    A saved model is loaded by its config: a layer that the config has quantized would be rounded again, or not fit.
    """
    found: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    new = sorted(names)
    if not new or not isinstance(found, BitsAndBytesConfig):  # a model in GPTQ is not saved as one
        return
    before = found.llm_int8_skip_modules
    found.llm_int8_skip_modules = [*(get_keys_to_not_convert(model) if before is None else before), *new]


def undo_upcast(model: nn.Module) -> None:
    """Give what `prepare_model_for_kbit_training` made float32 of a model that arrived quantized its dtype back.

    In float32 only layers that cast their inputs can follow, as quantized ones do and plain linears don't.
    """
    dtype = loaded_dtype(model)
    if dtype is None or dtype_now(model) != torch.float32 or quantization_on_arrival(model) is None:
        return
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)


def forget_arrival(model: nn.Module) -> None:
    """Make a model, whose quantized layers have all become plain ones, an ordinary 16-bit model for transformers."""
    arrived: Any = model
    if getattr(model, "hf_quantizer", None) is not None:
        arrived.hf_quantizer.remove_quantization_config(model)
        arrived.is_loaded_in_4bit = arrived.is_loaded_in_8bit = False
