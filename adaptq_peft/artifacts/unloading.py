"""Takes adapters off: what becomes of the quantized linears."""

from __future__ import annotations

import warnings

from torch import nn

from ..layer import AdaptQLayer
from ..module_names import base_name
from ..quantization import (
    OriginalWeights,
    dequantize_linear,
    forget_arrival,
    is_quantized,
    quantization_on_arrival,
)

UNLOADED_FORMS = ("dequantized", "original", "quantized")


def resolve_unloaded_form(model: nn.Module, frozen: str | None, merge: bool) -> str:
    """The value of `frozen` that `None` stands for: see `AdaptQTuner.merge_and_unload` and `unload`.

    Raises:
        ValueError: if it is not one of `UNLOADED_FORMS`.
    """
    if frozen is None:
        if quantization_on_arrival(model) is not None:
            return "quantized"
        return "dequantized" if merge else "original"
    if frozen not in UNLOADED_FORMS:
        raise ValueError(f"frozen is {frozen!r}; allowed: None or one of {list(UNLOADED_FORMS)}")
    return frozen


def show_quantized_forms(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Replace each layer that the adapters (`None`: the active ones) see quantized by its quantized copy."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, AdaptQLayer) and layer.adaptq_frozen is not None:
            names = layer.merged_adapters or adapter_names or layer.active_adapters
            if layer.is_quantized_for(names):
                model.set_submodule(name, layer.adaptq_frozen)


def build_plain_layers(
    model: nn.Module, form: str, revision: str | None, or_dequantized: bool
) -> dict[str, nn.Module]:
    """A plain layer for each quantized linear of a model, by the dotted name that it has without adapters.

    Args:
        model: the model, which is not changed.
        form: one of `UNLOADED_FORMS`.
        revision: of the model's checkpoint on the Hub.
        or_dequantized: take the dequantized weights, with a warning, where original ones can't be had.

    Raises:
        ValueError: if original weights can't be had and `or_dequantized` is false.
    """
    plain: dict[str, nn.Module] = {}
    if form == "quantized":
        return plain
    originals = OriginalWeights(model, "dequantized" if form == "dequantized" else "checkpoint", revision)
    failures: list[str] = []
    for name, module in model.named_modules():
        if not is_quantized(module) or name.endswith(".adaptq_frozen"):
            continue
        try:
            plain[base_name(name)] = originals.restore(name, module)
        except ValueError as error:
            if not or_dequantized:
                raise
            failures.append(str(error))
            plain[base_name(name)] = dequantize_linear(module)
    if failures:
        warnings.warn(
            f"The original weights of {len(failures)} quantized linears can't be had, so the unloaded model has their "
            f'dequantized ones. AdaptQConfig(original_weights="keep") keeps them. {failures[0]}',
            stacklevel=5,
        )
    return plain


def put_plain_layers(model: nn.Module, plain: dict[str, nn.Module]) -> None:
    """Put the layers of `build_plain_layers` into the model, which has no adapters any more."""
    for name, layer in plain.items():
        model.set_submodule(name, layer)
    if plain:
        forget_arrival(model)


def drop_unneeded_forms(model: nn.Module, adapters: list[str]) -> None:
    """After an adapter was deleted, drop the original weights or quantized copies that only it needed.

    Args:
        model: the model.
        adapters: names of the remaining adapters.
    """
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, AdaptQLayer) or layer.adaptq_frozen is None:
            continue
        if not layer.quantized_for:
            layer.adaptq_frozen = None
        elif not layer.adaptq_delta and layer.is_quantized_for(adapters):
            model.set_submodule(name, layer.adaptq_frozen)
