"""Takes adapters off: what becomes of the quantized linears."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from ..config import AdaptQConfig
from ..layer import AdaptQLayer, wrap_layer
from ..module_names import base_name, is_inside_a_wrapper
from ..quantization import (
    OriginalWeights,
    dequantize_linear,
    follow_cast,
    forget_arrival,
    is_quantized,
    origin_of,
    quantization_on_arrival,
    quantize_linear,
    settings_of,
    undo_upcast,
)

UNLOADED_FORMS = ("dequantized", "original", "quantized")


def resolve_unloaded_form(model: nn.Module, frozen: str | None, merge: bool) -> str:
    """The value of `frozen` that `None` stands for: see `AdaptQTuner.merge_and_unload` and `unload`.

    Raises:
        ValueError: if it is not one of `UNLOADED_FORMS`, or "quantized" for a model that arrived in GPTQ.
    """
    arrived = quantization_on_arrival(model)
    arrived_in_gptq = arrived is not None and arrived["quant_method"] == "gptq"
    if frozen is None:
        if arrived is not None and not arrived_in_gptq:
            return "quantized"
        return "dequantized" if merge else "original"
    if frozen not in UNLOADED_FORMS:
        raise ValueError(f"frozen is {frozen!r}; allowed: None or one of {list(UNLOADED_FORMS)}")
    if frozen == "quantized" and arrived_in_gptq:
        raise ValueError(
            'frozen is "quantized", and this model arrived in GPTQ: transformers would save it with zeros in another '
            'format than its config names, and load it wrongly. Use frozen="dequantized" or "original"'
        )
    return frozen


@dataclass(frozen=True)
class SeenQuantized:
    """A layer that adapters see quantized.

    Args:
        quantized: the quantized linear, which runs for them.
        layer: the layer that holds it; `None`: it stands alone.
        corrections: the adapters whose corrections are to be merged.
    """

    quantized: nn.Module
    layer: AdaptQLayer | None = None
    corrections: list[str] = field(default_factory=list)


def seen_quantized(model: nn.Module, adapter_names: list[str] | None, merge: bool) -> dict[str, SeenQuantized]:
    """The linears of a model that the adapters (`None`: the active ones) see quantized, by dotted name.

    Args:
        model: the model with adapters, which is not changed.
        adapter_names: those that are unloaded.
        merge: whether their corrections are to be merged.
    """
    return dict(_seen_quantized(model, adapter_names, merge))


def _seen_quantized(
    model: nn.Module, adapter_names: list[str] | None, merge: bool
) -> Iterator[tuple[str, SeenQuantized]]:
    for name, module in model.named_modules():
        if isinstance(module, AdaptQLayer):
            names = list(dict.fromkeys([*module.merged_adapters, *(adapter_names or module.active_adapters)]))
            if module.is_quantized_for(names):
                corrections = [adapter for adapter in names if merge and module.is_corrected_by(adapter)]
                yield name, SeenQuantized(module.form_for(names), module, corrections)
        elif is_quantized(module) and not is_inside_a_wrapper(name):
            yield name, SeenQuantized(module)


def build_unloaded_linears(
    model: nn.Module,
    seen: Mapping[str, SeenQuantized],
    form: str,
    source: str,
    revision: str | None,
    or_dequantized: bool,
    safe_merge: bool,
) -> dict[str, nn.Module]:
    """What takes the place of quantized linears, by the dotted name that they have without adapters.

    Args:
        model: the model, which is not changed.
        seen: its quantized linears.
        form: one of `UNLOADED_FORMS`. Those that stay as they are, are left out.
        source: where original weights come from: "checkpoint", or the folder or Hub repository of another one.
        revision: of the model's checkpoint on the Hub.
        or_dequantized: take the dequantized weights, with a warning, where original ones can't be had.
        safe_merge: check that merged weights are finite.

    Raises:
        ValueError: if original weights can't be had and `or_dequantized` is false, or with `safe_merge`.
    """
    originals = OriginalWeights(model, source if form == "original" else "dequantized", revision)
    built: dict[str, nn.Module] = {}
    failures: list[str] = []
    for name, linear in seen.items():
        if form == "quantized" and not linear.corrections:
            continue
        try:
            plain = _plain(name, linear, form, originals)
        except ValueError as error:
            if not or_dequantized:
                raise
            failures.append(str(error))
            plain = dequantize_linear(linear.quantized)
        if linear.layer is not None and linear.corrections:
            plain = linear.layer.corrected(plain, linear.corrections, safe_merge)
        built[base_name(name)] = (
            quantize_linear(plain, settings_of(linear.quantized)) if form == "quantized" else plain
        )
    _warn(failures, len(built) if form == "quantized" else 0)
    return built


def _plain(name: str, linear: SeenQuantized, form: str, originals: OriginalWeights) -> nn.Module:
    if form == "original" and linear.layer is not None and linear.layer.adaptq_frozen is not None:
        return linear.layer.base_layer
    return originals.restore(name, linear.quantized)


def _warn(failures: list[str], num_rounded: int) -> None:
    if failures:
        warnings.warn(
            f"The original weights of {len(failures)} quantized linears can't be had, so the unloaded model has their "
            f'dequantized ones. AdaptQConfig(original_weights="keep") keeps them. {failures[0]}',
            stacklevel=6,
        )
    if num_rounded:
        warnings.warn(
            f"The low-rank corrections of {num_rounded} linears were merged into their weights and quantized with "
            'them, which rounds them off. merge_and_unload(frozen="dequantized") keeps them.',
            stacklevel=6,
        )


def unwrap_quantized(model: nn.Module, seen: Mapping[str, SeenQuantized]) -> None:
    """Let each quantized linear stand alone in the model, without the layer that held it."""
    for name, linear in seen.items():
        if linear.layer is not None:
            model.set_submodule(name, linear.quantized)


def put_unloaded_linears(model: nn.Module, built: dict[str, nn.Module], form: str) -> None:
    """Put the layers of `build_unloaded_linears` into the model, which has no adapters any more."""
    undo_upcast(model)
    for name, layer in (follow_cast(model, built) if form != "quantized" else built).items():
        model.set_submodule(name, layer)
    if form != "quantized":
        forget_arrival(model)


def drop_unneeded_forms(model: nn.Module, remaining: Mapping[str, AdaptQConfig]) -> None:
    """After an adapter was deleted, drop the original weights, quantized copies and wrappers that only it needed.

    Args:
        model: the model.
        remaining: name -> config of the remaining adapters. If there is none, kept weights stay for `unload()`.
    """
    adapters = list(remaining)
    if remaining and not any(config.original_weights == "keep" for config in remaining.values()):
        for module in model.modules():
            if is_quantized(module) and origin_of(module).kept is not None:
                module.adaptq_origin = replace(origin_of(module), kept=None)  # type: ignore[assignment]
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, AdaptQLayer):
            continue
        if layer.adaptq_frozen is not None and not layer.quantized_for:
            layer.adaptq_frozen = None
        if layer.adaptq_delta or not layer.is_quantized_for(adapters):
            continue
        if layer.is_empty:
            model.set_submodule(name, layer.form_for(adapters))
        elif layer.adaptq_frozen is not None:
            only = wrap_layer(layer.adaptq_frozen)
            only.take_adapters_of(layer)
            model.set_submodule(name, only)
