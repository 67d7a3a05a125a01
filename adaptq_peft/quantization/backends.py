"""The table of backends: libraries that store linears in few bits, and what is done with any of them alike."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import bitsandbytes_backend, gptq_backend, hqq_backend
from .origin import NUM_SAMPLED_VALUES, Origin, linear_from_tensors, linear_weight, sampled_values
from .settings import QuantizationSettings


@dataclass(frozen=True)
class Backend:
    """What is needed of a library.

    Args:
        package: the name that it is imported by.
        install: the command that installs it.
        owns: whether a module is a quantized linear of this backend; must not need the package for modules that are
            not.
        quantize_weight: (weight [out, in], whether there is a bias, settings) -> a quantized linear on the weight's
            device, also on the meta device. Its bias is set by the caller.
        empty_linear: what `quantize_weight` would make, without its codes. Not of int8, whose codes are never loaded.
        dequantize_weight: a quantized linear -> its weight [out, in].
        settings_of: a quantized linear -> the settings that it was quantized by.
        load_tensors: (quantized linear, what the `state_dict` of another one of its shape has): takes them over.
        misfit: (shape [out, in], settings) -> why a weight of that shape can't be quantized; `None`: it can.
        misfit_of: the same of a linear, quantized or not, for a backend that does not quantize.
    """

    package: str
    install: str
    owns: Callable[[nn.Module], bool]
    quantize_weight: Callable[[torch.Tensor, bool, QuantizationSettings], nn.Module]
    empty_linear: Callable[[torch.Tensor, bool, QuantizationSettings], nn.Module]
    dequantize_weight: Callable[[nn.Module], torch.Tensor]
    settings_of: Callable[[nn.Module], QuantizationSettings]
    load_tensors: Callable[[nn.Module, Mapping[str, torch.Tensor]], None]
    misfit: Callable[[tuple[int, int], QuantizationSettings], str | None] = lambda shape, settings: None
    misfit_of: Callable[[nn.Module], str | None] = lambda linear: None


#: Name in `QuantizationSettings.backend` -> the backend.
BACKENDS = {
    "bitsandbytes": Backend(
        package="bitsandbytes",
        install="pip install bitsandbytes",
        owns=bitsandbytes_backend.owns,
        quantize_weight=bitsandbytes_backend.quantize_weight,
        empty_linear=bitsandbytes_backend.empty_linear,
        dequantize_weight=bitsandbytes_backend.dequantize_weight,
        settings_of=bitsandbytes_backend.settings_of,
        load_tensors=bitsandbytes_backend.load_tensors,
    ),
    "hqq": Backend(
        package="hqq",
        install='pip install "adaptq_peft[hqq]"',
        owns=hqq_backend.owns,
        quantize_weight=hqq_backend.quantize_weight,
        empty_linear=hqq_backend.empty_linear,
        dequantize_weight=hqq_backend.dequantize_weight,
        settings_of=hqq_backend.settings_of,
        load_tensors=hqq_backend.load_tensors,
        misfit=hqq_backend.misfit,
    ),
    "gptq": Backend(
        package="gptqmodel",
        install='pip install "adaptq_peft[gptq]"',
        owns=gptq_backend.owns,
        quantize_weight=gptq_backend.quantize_weight,
        empty_linear=gptq_backend.quantize_weight,
        dequantize_weight=gptq_backend.dequantize_weight,
        settings_of=gptq_backend.settings_of,
        load_tensors=gptq_backend.load_tensors,
        misfit_of=gptq_backend.misfit,
    ),
}


def check_backend(settings: QuantizationSettings) -> None:
    """Raise ImportError, with the command that installs it, if the backend's package is missing."""
    backend = BACKENDS[settings.backend]
    if importlib.util.find_spec(backend.package) is None:
        raise ImportError(
            f"Quantizing the frozen blocks to {settings.describe()} needs {backend.package}, which is not installed. "
            f'Run `{backend.install}`, or use AdaptQConfig(quantization="none").'
        )


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantized linear of one of the backends."""
    return _backend_of(module) is not None


def has_quantized(model: nn.Module) -> bool:
    """Whether any module of a model is a quantized linear."""
    return any(is_quantized(module) for module in model.modules())


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear` or `Conv1D`, or stands for one as a quantized linear."""
    return isinstance(module, (nn.Linear, Conv1D)) or is_quantized(module)


def _backend_of(module: nn.Module) -> Backend | None:
    return next((backend for backend in BACKENDS.values() if backend.owns(module)), None)


def _known_backend_of(quantized: nn.Module) -> Backend:
    backend = _backend_of(quantized)
    if backend is None:
        raise ValueError(f"{type(quantized).__name__} is no quantized linear; known backends are {list(BACKENDS)}")
    return backend


def quantize_linear(linear: nn.Module, settings: QuantizationSettings) -> nn.Module:
    """A quantized layer with the weights of a linear layer, on the same device. The input is left as it is.

    Args:
        linear: `nn.Linear` with weight [out, in], or `Conv1D` with weight [in, out], which is transposed first.
        settings: how to quantize.

    Returns:
        A layer of the backend, frozen, in the training mode of `linear`; its bias is that of `linear`.

    Raises:
        ValueError: if the weight is on the meta device or not a floating point tensor.
    """
    _check_weight(linear)
    return _quantize(linear, settings).train(linear.training)


def empty_quantized(linear: nn.Module, settings: QuantizationSettings) -> nn.Module:
    """What `quantize_linear` makes, in its shapes and on its device, but without codes: for `load_quantized`.

    Args:
        linear: as for `quantize_linear`.
        settings: how the codes will have been made; not int8.

    Raises:
        ValueError: as `quantize_linear` does.
    """
    _check_weight(linear)
    return _quantize(linear, settings, empty=True).train(linear.training)


def _check_weight(linear: Any) -> None:
    weight: torch.Tensor = linear.weight.data
    if weight.device.type == "meta":
        raise ValueError(
            "its weight is on the meta device and has no values to quantize. Load the weights first, or use "
            'quantization="none"'
        )
    if not weight.is_floating_point():
        raise ValueError(f"weight has dtype {weight.dtype}; only floating point weights can be quantized")


def quantize_on_meta(linear: nn.Module, settings: QuantizationSettings) -> nn.Module:
    """What `quantize_linear` makes of a layer on the meta device: tensors of the right shapes, without values.

    Args:
        linear: `nn.Linear` or `Conv1D` on the meta device; left as it is.
        settings: how to quantize.
    """
    return _quantize(linear, settings)


def _quantize(linear: Any, settings: QuantizationSettings, empty: bool = False) -> nn.Module:
    weight, backend = linear_weight(linear), BACKENDS[settings.backend]
    linear_class = Conv1D if isinstance(linear, Conv1D) else nn.Linear
    build = backend.empty_linear if empty else backend.quantize_weight
    quantized = build(weight if empty else weight.contiguous(), linear.bias is not None, settings)
    # Straight into the dict: with `low_cpu_mem_usage=True`, registering a parameter would send it to the meta device.
    quantized._parameters["bias"] = linear.bias
    sample = None if weight.is_meta else sampled_values(linear.weight, NUM_SAMPLED_VALUES)
    quantized.adaptq_origin = Origin(linear_class, weight.dtype, sample=sample)  # type: ignore[assignment]
    return quantized.requires_grad_(False)


def load_quantized(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a quantized layer the codes, scales and bias of another one of its shape.

    Args:
        layer: the layer, changed in place.
        tensors: what the other one's `state_dict` has.
    """
    _known_backend_of(layer).load_tensors(layer, tensors)


def origin_of(quantized: nn.Module) -> Origin:
    """What a quantized linear was, whether `quantize_linear` made it or transformers did while loading."""
    origin = getattr(quantized, "adaptq_origin", None)
    return origin if origin is not None else bitsandbytes_backend.origin_as_loaded(quantized)


def settings_of(quantized: nn.Module) -> QuantizationSettings:
    """The settings by which a linear was quantized."""
    return _known_backend_of(quantized).settings_of(quantized)


def dequantize_linear(quantized: nn.Module) -> nn.Module:
    """The inverse of `quantize_linear` up to the rounding: a plain layer with the dequantized weights.

    Args:
        quantized: a quantized linear of one of the backends.
    """
    origin = origin_of(quantized)
    weight = _known_backend_of(quantized).dequantize_weight(quantized).to(origin.dtype)
    if origin.linear_class is Conv1D:
        weight = weight.t().contiguous()
    return linear_from_tensors(origin.linear_class, weight, quantized.bias).train(quantized.training)  # type: ignore[arg-type]


def misfit(linear: nn.Module, settings: QuantizationSettings) -> str | None:
    """Why a linear's weight has a shape that the backend can't quantize; `None`: it can."""
    module: Any = linear  # maybe a quantized one, whose weight has another shape
    shape = (module.nf, module.nx) if isinstance(linear, Conv1D) else (module.out_features, module.in_features)
    backend = BACKENDS[settings.backend]
    return backend.misfit(shape, settings) or backend.misfit_of(linear)
