"""Which linears and other weights of frozen blocks are left as they are, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from ..direct_reads import weights_read_by
from ..module_names import base_name, is_of_an_adapter
from ..selection import Block
from .backends import misfit
from .settings import QuantizationSettings

#: What the skip list of a quantization config is called.
_SKIP_LIST = {"bitsandbytes": "llm_int8_skip_modules", "hqq": "skip_modules"}


class LeaveReasons:
    """Tells why a linear of a model must not be quantized.

    Args:
        model: the model.
        settings: how linears are quantized; `None`: they are not, and what must not be replaced is looked for.
        is_excluded: whether the user excluded the linear with a dotted name.
    """

    def __init__(
        self, model: nn.Module, settings: QuantizationSettings | None, is_excluded: Callable[[str], bool]
    ) -> None:
        self._settings = settings
        self._is_excluded = is_excluded
        self._use_counts = _parameter_use_counts(model)
        self._kept_in_float32 = _kept_in_float32(model)
        self._read_directly: dict[str, str] = {}

    def look_into(self, block: Block) -> None:
        """Read the source of a block's modules, before `of` is asked about its linears."""
        self._read_directly.update(_weights_read_directly(block))

    def of(self, name: str, linear: nn.Module) -> str | None:
        """Why the linear with this dotted name is left; `None`: nothing speaks against quantizing it."""
        if self._is_excluded(name):
            return "named in exclude_modules or modules_to_save"
        if self._settings is not None and not should_convert_module(name, list(self._settings.skip_modules)):
            return f"named in {_SKIP_LIST[self._settings.backend]}"
        if self._kept_in_float32.intersection(name.split(".")):
            return "transformers keeps it in float32, and reads its weight"
        if isinstance(linear, (nn.Linear, Conv1D)) and "weight" not in dict(linear.named_parameters(recurse=False)):
            return "its weight is computed from other parameters, as by weight normalization"
        if self._use_counts.get(id(linear.weight), 0) > 1:
            return "its weight is shared with another module"
        if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads its weight directly"
        if name in self._read_directly:
            return f"{self._read_directly[name]} reads its weight directly"
        return None if self._settings is None else misfit(linear, self._settings)


def fused_experts(block: Block) -> dict[str, str]:
    """Parameters that stack matrices, as those of a mixture of experts, with their bytes: no layer to swap."""
    found: dict[str, str] = {}
    for path, module in block.module.named_modules():
        if is_of_an_adapter(path) or isinstance(module, nn.modules.conv._ConvNd):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            is_one_below_the_other = parameter.ndim == 2 and "Expert" in type(module).__name__  # as DBRX stores them
            if is_one_below_the_other or (parameter.ndim == 3 and min(parameter.shape) > 1):
                dotted = base_name(".".join(part for part in (block.name, path, name) if part))
                found[dotted] = f"fused expert weights, not a linear; {parameter.nbytes} bytes stay as they are"
    return found


def _weights_read_directly(block: Block) -> dict[str, str]:
    """Layers whose weight the module around them reads, as Mamba's mixer that of `dt_proj` -> its class."""
    found: dict[str, str] = {}
    for path, module in block.module.named_modules():
        if is_of_an_adapter(path) or hasattr(module, "base_layer"):
            continue
        module_class: Any = type(module)
        for child in weights_read_by(module_class):
            found[base_name(".".join(part for part in (block.name, path, child) if part))] = module_class.__name__
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
            # transformers empties the instance's attribute, not the class's, in some dtypes
            names.update(vars(type(module)).get(attribute) or getattr(module, attribute, None) or ())
    return names
