"""Replaces a loaded adapter by another saved one, in place: nothing is injected or quantized, nothing recompiled."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.config import PeftConfig
from peft.utils import get_peft_model_state_dict, load_peft_weights
from torch import nn

from ..config import AdaptQConfig
from ..fingerprint import check_base
from ..layer import AdaptQLayer
from ..registration import NAME
from .certified_deltas import certified_state
from .checkpoint import check_adapter_tensors
from .quantized_blocks import split_quantized

#: What must be equal, because the modules on the model were made by it.
_STRUCTURE = (
    "layers_to_transform",
    "quantization",
    "quantization_calibration",
    "quantized_base",
    "precision",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "trainable_token_indices",
    "frozen_rank",
)
#: What describes the deltas, and goes with them.
_DESCRIPTION = (
    "selection_ratio",
    "num_adapted_blocks",
    "selection_strategy",
    "selection_seed",
    "profile",
    "weight_budget",
    "frozen_rank_init",
    "evaluation",
    "certificate",
)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str,
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Put the deltas of a saved ADAPTQ adapter in the place of those of a loaded one, which keeps its name.

    The ADAPTQ counterpart of `peft.utils.hotswap.hotswap_adapter`, which takes LoRA only. Tensors are copied into the
    parameters that are there, so a compiled model (`torch.compile(model)` or `model.compile()`) is not compiled again.
    s in W0 + s * delta is a constant of the compiled graph and stays what it was: where the new adapter has another
    `delta_scaling`, its deltas are multiplied by the ratio, and so is B of its low-rank corrections where their scale
    differs. That is exact for a ratio that is a power of two, and rounds once otherwise. Optimizer states of the old
    deltas are not touched.

    Args:
        model: a `PeftModel` or a transformers model with the adapter loaded, compiled or not.
        model_name_or_path: folder or Hub id of the adapter that is swapped in.
        adapter_name: the loaded adapter that is replaced. Default "default".
        torch_device: where the file is loaded to before it is copied. Default: as in PEFT.
        kwargs: for loading the config and the weights: `subfolder`, `revision`, `cache_dir`, `token`.

    Raises:
        ValueError: if there is no such ADAPTQ adapter on the model, it is merged, or the new one adapts other blocks,
            is quantized otherwise, is of another base, or has missing, extra, wrongly shaped or non-finite tensors.
            Nothing is changed then.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile(model) is a wrapper
    loaded = _loaded_config(model, adapter_name)
    new = _read_config(model_name_or_path, **kwargs)
    _check_same_structure(loaded, new, adapter_name)
    tensors = load_peft_weights(model_name_or_path, device=torch_device, **kwargs)
    ratios = {".adaptq_delta.": new.delta_scaling / loaded.delta_scaling}
    if new.frozen_rank:
        ratios[".adaptq_low_rank_B."] = new.frozen_scaling / loaded.frozen_scaling
    matches = _match(model, adapter_name, tensors)
    with torch.no_grad():
        for name, parameter, tensor in matches:
            ratio = next((ratio for part, ratio in ratios.items() if part in name), 1)
            parameter.copy_(tensor if ratio == 1 else tensor.float() * ratio)
    for layer in _layers(model, adapter_name):
        scale = loaded.frozen_scaling if layer.is_corrected_by(adapter_name) else loaded.delta_scaling
        if layer.scaling[adapter_name] != scale:  # by set_scale: that was for the old values
            layer.set_scale(adapter_name, scale)
    for field in _DESCRIPTION:
        setattr(loaded, field, getattr(new, field))
    if loaded.certificate and loaded.certificate.get("sample"):  # of values that another scale may have changed
        state = certified_state(vars(loaded), {name: parameter for name, parameter, _ in matches})
        loaded.certificate = {**loaded.certificate, **state}


def _loaded_config(model: nn.Module, adapter_name: str) -> AdaptQConfig:
    configs = cast(dict[str, PeftConfig], getattr(model, "peft_config", {}))
    config = configs.get(adapter_name)
    if not isinstance(config, AdaptQConfig):
        have = {name: getattr(other.peft_type, "value", other.peft_type) for name, other in configs.items()}
        raise ValueError(
            f"adapter {adapter_name!r} can't be swapped: the model has {have or 'no adapters'}; load an ADAPTQ "
            "adapter under that name first"
        )
    merged = [layer for layer in _layers(model, adapter_name) if adapter_name in layer.merged_adapters]
    if merged:
        raise ValueError(f"adapter {adapter_name!r} is merged into the base weights; call unmerge_adapter() first")
    return config


def _read_config(model_name_or_path: str, **kwargs: Any) -> AdaptQConfig:
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    if not isinstance(config, AdaptQConfig):
        raise ValueError(
            f"{model_name_or_path!r} holds an adapter of type {getattr(config.peft_type, 'value', config.peft_type)}, "
            f"and only one of type {NAME} can be swapped in here; for LoRA use peft.utils.hotswap.hotswap_adapter"
        )
    return AdaptQConfig.from_pretrained(model_name_or_path, **kwargs)  # this one checks the weights file


def _check_same_structure(loaded: AdaptQConfig, new: AdaptQConfig, adapter_name: str) -> None:
    different = [name for name in _STRUCTURE if getattr(loaded, name) != getattr(new, name)]
    if different:
        listed = "; ".join(
            f"{name} is {getattr(new, name)!r} instead of {getattr(loaded, name)!r}" for name in different
        )
        raise ValueError(
            f"The new adapter does not fit into the place of {adapter_name!r}: {listed}. Load it into a base model of "
            "its own."
        )
    if new.base_fingerprint is not None and loaded.base_fingerprint is not None:
        check_base(new.base_fingerprint, loaded.base_fingerprint)


def _match(
    model: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor]
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name in the file, the tensor on the model, the one from the file), checked to fit.

    What PEFT would save of the loaded adapter shares its memory with the model's parameters.
    """
    here = _with_prefix(get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False))
    found = _with_prefix(tensors)
    check_adapter_tensors(here, found, others=())
    _check_same_codes(split_quantized(here)[1], split_quantized(found)[1])
    deltas, _ = split_quantized(found)
    return [(name, here[name], tensor) for name, tensor in deltas.items()]


def _check_same_codes(here: dict[str, Any], found: dict[str, Any]) -> None:
    """Compare the quantized weights in the adapters' files, if they have any: those of the model stay."""
    different = [
        name
        for name, tensors in found.items()
        if not all(torch.equal(tensor.cpu(), here[name][key].cpu()) for key, tensor in tensors.items())
    ]
    if different:
        raise ValueError(
            f"Frozen blocks of the new adapter have other codes: {len(different)} layers differ, the "
            f"first is {different[0]}. Load it into a base model of its own."
        )


def _with_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as in a file: on a transformers model they lack the part that a PeftModel puts before them."""
    prefix = "base_model.model."
    return {f"{prefix}{name.removeprefix(prefix)}": tensor for name, tensor in tensors.items()}


def _layers(model: nn.Module, adapter_name: str) -> list[AdaptQLayer]:
    return [m for m in model.modules() if isinstance(m, AdaptQLayer) and m.has_adapter(adapter_name)]
