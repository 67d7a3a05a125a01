"""Swaps the linears of frozen blocks for quantized ones, all or none."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..selection import Block
from .bitsandbytes_backend import check_bitsandbytes, dequantize_linear, is_quantized, quantize_linear
from .settings import QuantizationSettings

#: `self.NAME.weight` in source code, used as a tensor. A packed 4-bit weight there breaks the forward pass.
_READ_WEIGHT = re.compile(r"(?<!_\()\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|ndim)|\[)")


@dataclass(frozen=True)
class SwappedLinear:
    """A linear that was quantized: what it takes to turn it back into a plain layer."""

    linear_class: type[nn.Module]
    dtype: torch.dtype


@dataclass
class QuantizationReport:
    """What happened to the linears and the fused expert weights of the frozen blocks.

    Args:
        swapped: dotted name of each quantized linear -> its former class and dtype.
        left: dotted name of each linear or fused expert weight that was not quantized -> why.
    """

    swapped: dict[str, SwappedLinear] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


class QuantizedSwap:
    """The quantized layers for the frozen blocks, built next to the originals and put in place at once.

    Building is what can fail, so the model is not touched before `commit`, which only moves references.
    """

    def __init__(
        self,
        model: nn.Module,
        frozen: Iterable[Block],
        settings: QuantizationSettings | None,
        is_excluded: Callable[[str], bool],
    ) -> None:
        self.report = QuantizationReport()
        self._model = model
        self._built: dict[str, nn.Module] = {}
        if settings is None:
            return
        check_bitsandbytes()
        counts, kept = _parameter_use_counts(model), _kept_in_float32(model)
        for block in tqdm(list(frozen), desc="Quantizing frozen blocks", unit="block", delay=2):
            read_directly = _weights_read_directly(block)
            for name, linear in _linears(block):
                if reason := _reason_to_leave(name, linear, settings, counts, kept, read_directly, is_excluded):
                    self.report.left[name] = reason
                    continue
                try:
                    self._built[name] = quantize_linear(linear, settings)
                except Exception as error:
                    raise ValueError(f"quantizing {name} of frozen block {block.index} failed: {error}") from error
                former = Conv1D if isinstance(linear, Conv1D) else nn.Linear
                self.report.swapped[name] = SwappedLinear(former, linear.weight.dtype)
            self.report.left.update(_fused_experts(block))

    def commit(self) -> None:
        """Put the quantized layers into the model. The originals are released."""
        for name, quantized in self._built.items():
            self._model.set_submodule(name, quantized)
        self._built = {}


def dequantize_frozen(model: nn.Module, swapped: dict[str, SwappedLinear]) -> None:
    """Replace, in place, each quantized linear of a report by a plain one with the dequantized weights."""
    for name, former in swapped.items():
        quantized = model.get_submodule(name)
        if is_quantized(quantized):
            model.set_submodule(name, dequantize_linear(quantized, former.linear_class, former.dtype))


def _linears(block: Block) -> list[tuple[str, nn.Linear | Conv1D]]:
    return [
        (f"{block.name}.{name}", module)
        for name, module in block.module.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not is_quantized(module)
    ]


def _weights_read_directly(block: Block) -> dict[str, str]:
    """Layers whose weight the module around them reads, as Mamba's mixer that of `dt_proj` -> its class."""
    found: dict[str, str] = {}
    for path, module in block.module.named_modules():
        module_class: Any = type(module)
        for child in _children_read_by(module_class):
            found[".".join(part for part in (block.name, path, child) if part)] = module_class.__name__
    return found


@cache
def _children_read_by(module_class: type[nn.Module]) -> frozenset[str]:
    """Names in `self.name.weight` in the source of a class and those it inherits from, torch's own apart.

    Not counted: `.weight.dtype` and the like, initialization, and slices, which Bloom takes to imitate tensor
    parallelism.
    """
    found: set[str] = set()
    for ancestor in module_class.__mro__:
        if not ancestor.__module__.startswith(("torch.", "builtins")):
            with suppress(OSError, TypeError):  # a class without a source file
                found.update(_READ_WEIGHT.findall(inspect.getsource(ancestor)))
    return frozenset(found)


def _fused_experts(block: Block) -> dict[str, str]:
    """Parameters that stack matrices, as those of a mixture of experts, with their bytes: no layer to swap."""
    found: dict[str, str] = {}
    for path, module in block.module.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.modules.conv._ConvNd):
                dotted = ".".join(part for part in (block.name, path, name) if part)
                found[dotted] = f"fused expert weights, not a linear; {parameter.nbytes} bytes stay as they are"
    return found


def _parameter_use_counts(model: nn.Module) -> dict[int, int]:
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _kept_in_float32(model: nn.Module) -> set[str]:
    """Names of layers that transformers leaves in float32 in a 16-bit model, such as `wo` of T5."""
    names: set[str] = set()
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            names.update(vars(type(module)).get(attribute) or getattr(module, attribute, None) or ())
    return names


def _reason_to_leave(
    name: str,
    linear: nn.Linear | Conv1D,
    settings: QuantizationSettings,
    counts: dict[int, int],
    kept_in_float32: set[str],
    read_directly: dict[str, str],
    is_excluded: Callable[[str], bool],
) -> str | None:
    if is_excluded(name):
        return "named in exclude_modules or modules_to_save"
    if any(name == skip or name.endswith(f".{skip}") for skip in settings.skip_modules):
        return "named in llm_int8_skip_modules"
    if kept_in_float32.intersection(name.split(".")):
        return "transformers keeps it in float32, and reads its weight"
    if counts[id(linear.weight)] > 1:
        return "its weight is shared with another module"
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight directly"
    if name in read_directly:
        return f"{read_directly[name]} reads its weight directly"
    return None
