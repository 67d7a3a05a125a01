"""The quantized weights of frozen blocks in an adapter's file, where a load would not make the same ones again.

Plain rounding by bitsandbytes gives the same codes at each load. Calibrated codes depend on text, and HQQ's on the
machine, so they are saved with the deltas: `<layer>.adaptq_frozen.<tensor>`, the tensors as the layer's own state dict
has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..config import AdaptQConfig
from ..layer import AdaptQLayer
from ..module_names import base_name, is_inside_a_wrapper
from ..quantization import is_quantized, load_quantized, origin_of, resolve_quantization, settings_of
from .checkpoint import FROZEN_KEY

PREFIX = "base_model.model."


def saves_quantized(config: AdaptQConfig) -> bool:
    """Whether the file of an adapter holds the quantized weights of its frozen blocks."""
    settings = resolve_quantization(config.quantization)
    return config.quantization_calibration is not None or not (settings is None or settings.rounds_alike_everywhere)


def quantized_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """What the file of an adapter holds of the quantized linears that it sees, if it `saves_quantized`.

    Args:
        model: the model with the adapter.
        adapter_name: its name.
    """
    prefix = PREFIX if isinstance(model, PeftModel) else ""  # transformers' `add_adapter`: it adds the prefix itself
    return {
        f"{prefix}{name}{FROZEN_KEY}{key}": tensor
        for name, layer in _quantized_layers(model, adapter_name)
        for key, tensor in layer.state_dict().items()
    }


def split_quantized(state_dict: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Divide the tensors of an adapter file: all others, and for each quantized layer its tensors."""
    others: dict[str, torch.Tensor] = {}
    quantized: dict[str, Any] = {}
    for key, tensor in state_dict.items():
        name, separator, rest = key.rpartition(FROZEN_KEY)
        if separator:
            # Twice in files of transformers' `save_pretrained` from before it was left to add the prefix.
            quantized.setdefault(name.removeprefix(PREFIX).removeprefix(PREFIX), {})[rest] = tensor
        else:
            others[key] = tensor
    return others, quantized


def load_quantized_tensors(
    model: nn.Module, config: AdaptQConfig, adapter_name: str, found: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    """Put the quantized weights of an adapter file into the layers of the model.

    Args:
        model: the model with the adapter.
        config: the adapter's config.
        adapter_name: its name.
        found: the quantized layers in its file, as `split_quantized` gives them.

    Raises:
        ValueError: if layers are missing or extra, or another adapter on the model sees one of them with other
            weights. Nothing is changed then.
    """
    if not found and not saves_quantized(config):
        return
    layers = dict(_quantized_layers(model, adapter_name))
    missing, extra = sorted(layers.keys() - found.keys()), sorted(found.keys() - layers.keys())
    if missing or extra:
        raise ValueError(
            f"The adapter file has {len(found)} quantized layers, and the model {len(layers)} of them: "
            f"missing {missing[:3]}, extra {extra[:3]}. Use the file and the config that were saved together."
        )
    shared = [name for name in found if _others_see(model, name, adapter_name)]
    different = [name for name in shared if not _same(layers[name], found[name])]
    if different:
        raise ValueError(
            f"Another adapter on this model sees {len(different)} of the quantized layers with other weights, the "
            f"first is {different[0]}. Load the adapter into a base model of its own."
        )
    for name, tensors in found.items():
        if waits := vars(layers[name]).pop("adaptq_waits", None):
            waits.remove()
        load_quantized(layers[name], tensors)
        layers[name].adaptq_origin = replace(origin_of(layers[name]), calibrated=True)  # type: ignore[assignment]


def expect_quantized_tensors(model: nn.Module, adapter_name: str) -> None:
    """Refuse to run the quantized layers of a saved adapter until the weights in its file are loaded into them.

    A loader that does not ask the tuner, as transformers' own, would leave them without their codes.
    """
    for name, layer in _quantized_layers(model, adapter_name):
        if _others_see(model, name, adapter_name):
            continue
        layer.adaptq_waits = layer.register_forward_pre_hook(_refuse)  # type: ignore[assignment]


def _refuse(layer: nn.Module, args: Any) -> None:
    raise RuntimeError(
        "The saved quantized weights of this adapter's frozen blocks were not loaded. Load it by "
        "PeftModel.from_pretrained or model.load_adapter of a PeftModel. To train a new adapter, give get_peft_model "
        "a new AdaptQConfig, not that of a saved adapter."
    )


def _quantized_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        own = name.removeprefix(PREFIX)
        if isinstance(module, AdaptQLayer):
            seen = module.form_for([adapter_name])
            if _is_saved(seen):
                yield base_name(own), seen
        elif _is_saved(module) and not is_inside_a_wrapper(name):
            yield base_name(own), module


def _is_saved(module: nn.Module) -> bool:
    return is_quantized(module) and settings_of(module).is_saved


def _others_see(model: nn.Module, name: str, adapter_name: str) -> bool:
    for prefix in ("", PREFIX):
        try:
            module = model.get_submodule(prefix + name)
        except AttributeError:
            continue
        if isinstance(module, AdaptQLayer) and module.adaptq_frozen is not None:
            return any(other != adapter_name for other in module.quantized_for)
    adapters = {key for m in model.modules() if isinstance(m, AdaptQLayer) for key in m.scaling}
    return len(adapters - {adapter_name}) > 0


def _same(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    own = layer.state_dict()
    return all(torch.equal(own[key].cpu(), tensor.cpu()) for key, tensor in tensors.items())
