"""Which layers of a model get deltas."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from torch import nn

from .config import AdaptQConfig
from .layer import AdaptQLayer
from .module_names import base_name, is_inside_a_wrapper
from .quantization import is_linear, is_quantized
from .selection import Block


def find_targets(model: nn.Module, adapted: list[Block] | None, config: AdaptQConfig) -> list[str]:
    """Dotted names of the layers that get deltas: those with parameters of their own, in the adapted blocks.

    Args:
        model: the model, with or without other adapters.
        adapted: the adapted blocks; `None`: the whole model, for a model without blocks.
        config: its `target_modules`, `exclude_modules` and `modules_to_save` narrow the choice.

    Raises:
        ValueError: if a layer can't get deltas: it is an `nn.MultiheadAttention`, or quantized and not in a block.
    """
    prefixes = None if adapted is None else tuple(f"{block.name}." for block in adapted)
    targets: list[str] = []
    for name, module in model.named_modules():
        if not name or is_inside_a_wrapper(name) or (prefixes is not None and not name.startswith(prefixes)):
            continue
        layer = module.base_layer if isinstance(module, AdaptQLayer) else module
        has_parameters = any(True for _ in layer.parameters(recurse=False)) or is_quantized(layer)  # GPTQ has buffers
        if has_parameters and is_targeted(base_name(name), layer, config):
            _check_supported(name, layer, has_blocks=adapted is not None)
            targets.append(name)
    return targets


def is_targeted(name: str, layer: nn.Module, config: AdaptQConfig) -> bool:
    """Whether PEFT's rules for `target_modules`, `exclude_modules` and `modules_to_save` choose a layer."""
    target_modules = config.target_modules
    if target_modules == "all-linear":
        target_modules = [name] if is_linear(layer) else []
    return bool(match_by_peft(name, [name] if target_modules is None else target_modules, config))


def is_excluded(name: str, config: AdaptQConfig) -> bool:
    """Whether `exclude_modules` or `modules_to_save` names a layer."""
    return not match_by_peft(name, [name], config)


def match_by_peft(name: str, target_modules: set[str] | list[str] | str, config: AdaptQConfig) -> Any:
    """What PEFT's own rule says of a layer: a true value, a false one, or its false marker of an excluded layer.

    Excluded are also the layers within modules that PEFT will save whole: those whose name ends in an entry of
    `modules_to_save`, within a word, too.
    """
    saved = tuple(config.modules_to_save or ())
    if saved and any(path.endswith(saved) for path in accumulate(name.split("."), "{}.{}".format)):
        return _ExcludedModule()
    rules = SimpleNamespace(
        target_modules=target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        target_parameters=None,
    )
    return check_target_module_exists(rules, name)


def _check_supported(name: str, layer: nn.Module, has_blocks: bool) -> None:
    if is_quantized(layer) and not has_blocks:
        raise ValueError(
            f"{name} is quantized, and only layers in transformer blocks get their original weights back. Load the "
            "model without a quantization_config, or with one whose llm_int8_skip_modules names this layer."
        )
    if isinstance(layer, nn.MultiheadAttention):
        raise ValueError(
            f"{name} is an nn.MultiheadAttention, which reads the weights of its output projection itself: a delta "
            "there would have no effect. Leave it out with exclude_modules, or choose layers with target_modules."
        )
