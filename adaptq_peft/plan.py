"""Algorithm 1 and everything else that is resolved before the model is touched."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .block_forms import linears_of
from .config import AdaptQConfig
from .layer import AdaptQLayer
from .module_names import base_name
from .offloading import check_weights_reachable
from .precision import choose_precision, measure_block_sensitivity
from .quantization import (
    QuantizationSettings,
    is_quantized,
    note_origins,
    quantization_on_arrival,
    resolve_quantization,
    settings_of,
)
from .quantization.precision_plan import PRECISIONS, PrecisionPlan
from .selection import (
    ActivationProfile,
    Block,
    SelectionRequest,
    find_blocks,
    profile_activations,
    select_blocks,
    strategy_needs_general_profile,
    strategy_needs_profile,
    strategy_needs_sensitivity,
)
from .targets import find_targets, is_excluded


@dataclass(frozen=True)
class AdapterPlan:
    """What an adapter will be.

    Args:
        blocks: all blocks of the model; empty for a model without blocks.
        adapted: indices of the adapted blocks, ascending.
        profile: what they were chosen by, if anything was profiled.
        targets: dotted names of the layers that get deltas.
        quantization: how the linears of the other blocks are stored: the config's, or that of a model that arrived
            quantized.
        precision: with quantization "auto", how each linear of them is stored.
    """

    blocks: list[Block]
    adapted: list[int]
    profile: ActivationProfile | None
    targets: list[str]
    quantization: str | dict[str, Any]
    precision: PrecisionPlan | None = None


def make_plan(model: nn.Module, config: AdaptQConfig, others: Mapping[str, AdaptQConfig]) -> AdapterPlan:
    """Find the blocks, profile and select, find the layers that get deltas, and check all of it.

    Args:
        model: the base model, with other adapters switched off.
        config: the adapter's config; not changed.
        others: the configs of the adapters that the model has already.

    Raises:
        ValueError: if no blocks are found, K or an index is out of range, activations are not finite, a layer can't
            get deltas, or the other adapters want the base in another form.
    """
    check_weights_reachable(model)
    blocks = _blocks_or_none(model, config)
    adapted, profile = choose_blocks(model, blocks, config) if blocks else ([], None)
    targets = find_targets(model, [blocks[index] for index in adapted] if blocks else None, config)
    if blocks and not targets:
        _check_targets_elsewhere(model, blocks, adapted, config)
    quantization = _quantization(model, config)
    _check_gptq(quantization, adapted, config, others)
    _check_others(model, config, quantization, others)
    _check_modules_to_save(model, config)
    precision = choose_precision(model, blocks, adapted, config) if quantization == "auto" else None
    _check_codes([block for block in blocks if block.index not in adapted], quantization, precision)
    return AdapterPlan(blocks, adapted, profile, targets, quantization, precision)


def _blocks_or_none(model: nn.Module, config: AdaptQConfig) -> list[Block]:
    """The blocks; none for a model without blocks on which `target_modules` alone says what gets deltas."""
    targets_only = config.target_modules is not None and (
        config.layers_to_transform is None and config.calibration.data is None and config.layers_pattern is None
    )
    try:
        return find_blocks(model, config.layers_pattern)
    except ValueError:
        if targets_only:
            return []
        raise


def choose_blocks(
    model: nn.Module, blocks: list[Block], config: AdaptQConfig
) -> tuple[list[int], ActivationProfile | None]:
    """Indices of the adapted blocks, ascending, and what they were chosen by; profiles the model where that is needed.

    Args:
        model: the base model; without weights if the config names the blocks, has a profile, or needs none.
        blocks: its blocks.
        config: the adapter's config; not changed.

    Raises:
        ValueError: if K or an index is out of range, activations are not finite, or the profile is of another model.
    """
    if config.layers_to_transform is not None:
        chosen = _indices(config)
        _check_indices(chosen, len(blocks))
        return chosen, config.profile
    named = _blocks_of_targets(model, blocks, config)
    if named:
        return named, None
    # The small number is for ratios such as 0.29, whose product with 100 is a little below 29.
    count = config.num_adapted_blocks or max(1, math.floor(config.selection_ratio * len(blocks) + 1e-9))
    profile = config.profile
    if profile is None and strategy_needs_profile(config.selection_strategy) and count <= len(blocks):
        profile = _profile(model, config)
    if profile is not None and len(profile.magnitude) != len(blocks):
        raise ValueError(
            f"the profile is of a model with {len(profile.magnitude)} blocks, and {type(model).__name__} has "
            f"{len(blocks)}; profile this model"
        )
    if profile is not None and profile.sensitivity is None and strategy_needs_sensitivity(config.selection_strategy):
        profile = replace(profile, sensitivity=measure_block_sensitivity(model, blocks, config))
    request = SelectionRequest(num_blocks=len(blocks), profile=profile, seed=config.selection_seed)
    return select_blocks(config.selection_strategy, request, count), profile


def _check_targets_elsewhere(model: nn.Module, blocks: list[Block], adapted: list[int], config: AdaptQConfig) -> None:
    """Names that fit nothing in the adapted blocks. Those that fit nothing at all get PEFT's own error."""
    elsewhere = find_targets(model, blocks, config)
    if elsewhere:
        raise ValueError(
            f"target_modules {config.target_modules!r} names no layer of the adapted blocks {adapted}, so nothing "
            f"would get a delta; it names {len(elsewhere)} layers of other blocks, the first "
            f"{base_name(elsewhere[0])}. Name layers by what they are called in each block, such as 'up_proj', "
            "or give layers_to_transform."
        )


def _blocks_of_targets(model: nn.Module, blocks: list[Block], config: AdaptQConfig) -> list[int]:
    """The blocks that `target_modules` names, if it names some and not all, and nothing else says which to adapt."""
    says_more = config.num_adapted_blocks or config.profile or config.calibration.data is not None
    if config.target_modules is None or says_more:
        return []
    names = find_targets(model, blocks, config)
    named = [block.index for block in blocks if any(name.startswith(f"{block.name}.") for name in names)]
    return named if len(named) < len(blocks) else []


def _profile(model: nn.Module, config: AdaptQConfig) -> ActivationProfile:
    calibration = config.calibration
    return profile_activations(
        model,
        calibration.data,
        general_data=calibration.general_data if strategy_needs_general_profile(config.selection_strategy) else None,
        tokenizer=calibration.tokenizer,
        samples=config.calibration_samples,
        max_length=config.calibration_max_length,
        batch_size=config.calibration_batch_size,
        layers_pattern=config.layers_pattern,
    )


def _check_indices(indices: list[int], num_blocks: int) -> None:
    bad = [index for index in indices if index >= num_blocks]
    if bad:
        raise ValueError(
            f"layers_to_transform names blocks {bad}, and the model has {num_blocks} blocks; allowed are 0 to "
            f"{num_blocks - 1}"
        )


def _check_modules_to_save(model: nn.Module, config: AdaptQConfig) -> None:
    """A module that is to be trained whole must not be one that an adapter before has quantized."""
    for name, module in model.named_modules():
        if is_quantized(module) and is_excluded(name, config) and config.modules_to_save:
            raise ValueError(
                f"{base_name(name)} is in modules_to_save and is quantized already, so it can't be trained. Give "
                'the first adapter quantization="none", or name the module in its exclude_modules.'
            )


def _quantization(model: nn.Module, config: AdaptQConfig) -> str | dict[str, Any]:
    """The settings of a model that arrived quantized, else those of the config."""
    arrived = quantization_on_arrival(model)
    note_origins(model)
    if arrived is None or config.quantization == "auto":  # a plan; _check_codes compares it with what arrived
        _check_not_gptq(model, config)
        return config.quantization  # type: ignore[return-value]  # AdaptQConfig has made it a name or a dict
    asked, found = resolve_quantization(config.quantization), resolve_quantization(arrived)
    if config.is_saved and asked is not None and found is not None and not asked.same_codes(found):
        warnings.warn(
            f"The adapter was trained with frozen blocks in {asked.describe()}, and this model arrived in "
            f"{found.describe()}: outputs differ from those of the model that was saved.",
            stacklevel=2,
        )
    return arrived


def _check_not_gptq(model: nn.Module, config: AdaptQConfig) -> None:
    settings = resolve_quantization(config.quantization)
    if settings is not None and settings.comes_with_base:
        raise ValueError(
            f"The adapter is for a base in {settings.describe()}, and this {type(model).__name__} did not arrive so. "
            f"Load the GPTQ checkpoint that it was made on (its config names {config.base_model_name_or_path!r}) by "
            'from_pretrained, which needs `pip install "adaptq_peft[gptq]"`'
        )


def _check_gptq(
    quantization: str | dict[str, Any], adapted: list[int], config: AdaptQConfig, others: Mapping[str, AdaptQConfig]
) -> None:
    """Layers in GPTQ come with a model and are not made here, so nothing may ask for new ones."""
    settings = resolve_quantization(quantization)
    if settings is None or not settings.comes_with_base:
        return
    missing = {index for other in others.values() for index in _indices(other)} - set(adapted)
    for name, value in (
        ("quantization_calibration", config.quantization_calibration),
        ("quantized_base", config.quantized_base),
    ):
        if value is not None:
            raise ValueError(
                f"{name} is {value!r}, and this model arrived in {settings.describe()}, whose codes stay as they are; "
                "leave it out, or load the 16-bit checkpoint"
            )
    if missing:
        raise ValueError(
            f"The new adapter freezes blocks {sorted(missing)}, which other adapters on this model adapt: their "
            f"linears in {settings.describe()} are gone, and new ones are not made here. Adapt these blocks, too, or "
            "put the new adapter on a base model of its own."
        )


def _indices(config: AdaptQConfig) -> list[int]:
    found = config.layers_to_transform
    return [found] if isinstance(found, int) else list(found or [])


def _check_others(
    model: nn.Module, config: AdaptQConfig, quantization: str | dict[str, Any], others: Mapping[str, AdaptQConfig]
) -> None:
    """Adapters on one model may differ in their blocks, not in how a linear is quantized: it has one such copy."""
    settings = resolve_quantization(quantization)
    for name, other in others.items():
        other_settings = resolve_quantization(other.quantization)
        planned = "auto" in (quantization, other.quantization)  # then _check_codes compares linear by linear
        if settings and other_settings and not planned and not settings.same_codes(other_settings):
            raise ValueError(
                f"The new adapter wants its frozen blocks in {settings.describe()}, and adapter {name!r} on this "
                f"model has them in {other_settings.describe()}. Give both the same quantization, or put the new one "
                "on a base model of its own."
            )
        if (config.original_weights == "dequantized") != (other.original_weights == "dequantized"):
            raise ValueError(
                f"The new adapter has original_weights={config.original_weights!r}, and adapter {name!r} on this "
                f"model has {other.original_weights!r}: their adapted blocks start from different weights. Put the "
                "new adapter on a base model of its own."
            )
    merged = [name for name, module in model.named_modules() if isinstance(module, AdaptQLayer) and module.merged]
    if merged:
        raise ValueError(
            f"Adapters are merged into {len(merged)} layers of this model, so a new one would start from merged "
            "weights. Call unmerge_adapter() first."
        )


def _check_codes(
    frozen: list[Block],
    quantization: str | dict[str, Any],
    plan: PrecisionPlan | None,
) -> None:
    """Linears that an adapter, here or deleted, has quantized already must be as this one wants them."""
    different: list[str] = []
    for name, found in _quantized_forms(frozen):
        wanted = resolve_quantization(quantization) if plan is None else PRECISIONS[plan.precision.get(name, "none")]
        if wanted is not None and not wanted.same_codes(found):
            different.append(f"{name} is in {found.describe()} instead of {wanted.describe()}")
    if different:
        raise ValueError(
            f"This model has {len(different)} linears quantized otherwise than the new adapter wants them: "
            f"{different[0]}. Load the base in 16 bits, and put adapters with different precisions on bases of their "
            "own."
        )


def _quantized_forms(blocks: list[Block]) -> Iterator[tuple[str, QuantizationSettings]]:
    for block in blocks:
        for name, module in linears_of(block):
            forms = (module.base_layer, module.adaptq_frozen) if isinstance(module, AdaptQLayer) else (module,)
            for form in forms:
                if form is not None and is_quantized(form):
                    yield base_name(name), settings_of(form)
