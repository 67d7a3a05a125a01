"""A LoRA approximation of an adapter, for servers that take only LoRA."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora.conversion import convert_to_lora as peft_convert_to_lora
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..config import AdaptQConfig
from ..layer import AdaptQLayer, AdaptQLinear


def convert_to_lora(
    model: nn.Module, rank: int | float, adapter_name: str = "default", progressbar: bool = False
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Approximate the deltas of linear layers by LoRA matrices, with `peft.convert_to_lora`.

    Low-rank corrections come along: exact up to rounding where `rank` is at least theirs. They belong to the quantized
    linears of the frozen blocks, so the LoRA adapter belongs on a base that is quantized in the same way.

    LoRA has nothing for norms and biases: their deltas are left out, and a warning says how many have changed.
    Full-rank deltas are not low rank, so measure the result before it is used.

    Args:
        model: a PeftModel with an ADAPTQ adapter.
        rank: rank of each layer, or, as a float in (0, 1], the share of squared singular values to keep.
        adapter_name: which adapter. Default "default".
        progressbar: show one; a large model takes minutes.

    Returns:
        The `LoraConfig` and the state dict, as `peft.convert_to_lora` does.

    Raises:
        TypeError: if the adapter has no linear layers.
        ValueError: if the rank is out of range.
    """
    own: AdaptQConfig = cast(Any, model).peft_config[adapter_name]
    view = nn.Module()  # what PEFT's function is to see: no layer that it would refuse
    linears: set[str] = set()
    left_out = 0
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            _add_at(view, name, module)
        if not isinstance(module, AdaptQLayer) or not module.has_adapter(adapter_name):
            continue
        fits = isinstance(module, AdaptQLinear)
        for parameter_name, parameter in module.parameters_of(adapter_name):
            left_out += bool(parameter.any()) and not (fits and parameter_name.endswith(".weight"))
        if fits:
            _add_at(view, name, module)
            linears.add(name.removeprefix("base_model.model."))
    if left_out:
        warnings.warn(
            f"LoRA can't hold the deltas of {left_out} norms and biases; they are left out of the converted adapter.",
            stacklevel=2,
        )
    described = SimpleNamespace(
        peft_type=own.peft_type,
        target_modules=linears,
        base_model_name_or_path=own.base_model_name_or_path,
        modules_to_save=own.modules_to_save,
    )
    view.peft_config = {adapter_name: described}  # type: ignore[assignment]
    config, state_dict = peft_convert_to_lora(view, rank, adapter_name=adapter_name, progressbar=progressbar)
    config.task_type = own.task_type
    return config, state_dict


def _add_at(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted path below `root`, with empty modules on the way."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
