"""Models that transformers has quantized while loading them: what it did, and what a later load must do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationMethod

#: Packages whose quantized layers are no `nn.Linear`: nothing here would see them.
_OTHER_QUANTIZERS = ("auto_gptq", "awq", "gptqmodel", "hqq", "optimum")


def quantization_on_arrival(model: nn.Module) -> dict[str, Any] | None:
    """The `BitsAndBytesConfig`, as a dict, by which transformers quantized a model while loading; `None`: it did not.

    Raises:
        ValueError: if the model was quantized by another method.
    """
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    if found is None or getattr(model, "hf_quantizer", None) is None:
        _check_layers(model)
        return None
    config: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = config.get("quant_method")
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
        f"the model arrived quantized by {quantizer}; allowed: bitsandbytes, or a model that is not quantized. Load "
        "the 16-bit checkpoint that it was made from: get_peft_model stores the frozen blocks as "
        "AdaptQConfig(quantization=...) says, in 2 to 8 bits"
    )


def skip_when_quantizing(model: nn.Module, names: Iterable[str]) -> None:
    """Note in the config of a model that arrived quantized that these layers are plain now.

    A saved model is loaded by its config: a layer that the config has quantized would be rounded again, or not fit.
    """
    found: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    new = sorted(names)
    if not new or found is None or isinstance(found, dict):
        return
    before = found.llm_int8_skip_modules
    found.llm_int8_skip_modules = [*(get_keys_to_not_convert(model) if before is None else before), *new]


def forget_arrival(model: nn.Module) -> None:
    """Make a model, whose quantized layers have all become plain ones, an ordinary 16-bit model for transformers."""
    arrived: Any = model
    if getattr(model, "hf_quantizer", None) is not None:
        arrived.hf_quantizer.remove_quantization_config(model)
        arrived.is_loaded_in_4bit = arrived.is_loaded_in_8bit = False
