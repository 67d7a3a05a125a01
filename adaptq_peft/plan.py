"""Algorithm 1 and everything else that is resolved before the model is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import AdaptQConfig
from .fingerprint import check_base, fingerprint_base
from .quantization import is_quantized
from .selection import (
    ActivationProfile,
    Block,
    SelectionRequest,
    find_blocks,
    profile_activations,
    select_blocks,
    strategy_needs_general_profile,
    strategy_needs_profile,
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
        fingerprint: identifies the base model.
    """

    blocks: list[Block]
    adapted: list[int]
    profile: ActivationProfile | None
    targets: list[str]
    fingerprint: dict[str, Any]

    @property
    def frozen(self) -> list[Block]:
        """The blocks that are not adapted."""
        return [block for block in self.blocks if block.index not in self.adapted]


def make_plan(model: nn.Module, config: AdaptQConfig, others: Mapping[str, AdaptQConfig]) -> AdapterPlan:
    """Find the blocks, profile and select, find the layers that get deltas, and check all of it.

    Args:
        model: the base model, with other adapters switched off.
        config: the adapter's config; not changed.
        others: the configs of the adapters that the model has already.

    Raises:
        ValueError: if no blocks are found, K or an index is out of range, activations are not finite, a layer can't
            get deltas, the base is not the one of the config, or the other adapters adapt other blocks.
    """
    blocks = _blocks_or_none(model, config)
    adapted, profile = _select(model, blocks, config) if blocks else ([], None)
    targets = find_targets(model, [blocks[index] for index in adapted] if blocks else None, config)
    _check_others(config, adapted, others)
    _check_modules_to_save(model, config)
    fingerprint = fingerprint_base(model, blocks, adapted)
    if config.base_fingerprint is not None:
        check_base(config.base_fingerprint, fingerprint)
    return AdapterPlan(blocks, adapted, profile, targets, fingerprint)


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


def _select(model: nn.Module, blocks: list[Block], config: AdaptQConfig) -> tuple[list[int], ActivationProfile | None]:
    if config.layers_to_transform is not None:
        given = config.layers_to_transform
        chosen = [given] if isinstance(given, int) else given
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
    request = SelectionRequest(num_blocks=len(blocks), profile=profile, seed=config.selection_seed)
    return select_blocks(config.selection_strategy, request, count), profile


def _blocks_of_targets(model: nn.Module, blocks: list[Block], config: AdaptQConfig) -> list[int]:
    """The blocks that `target_modules` names, if it names some and not all, and nothing else says which to adapt."""
    says_more = config.num_adapted_blocks or config.profile or config.calibration.data is not None
    if config.target_modules is None or says_more:
        return []
    names = find_targets(model, None, config)
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
                f"{name} is in modules_to_save and is quantized already, so it can't be trained. Give the first "
                'adapter quantization="none", or name the module in its exclude_modules.'
            )


def _check_others(config: AdaptQConfig, adapted: list[int], others: Mapping[str, AdaptQConfig]) -> None:
    """A block that one adapter trains must not be one that another adapter stores in 4 bits."""
    for name, other in others.items():
        both_plain = config.quantization == "none" and other.quantization == "none"
        same = adapted == (other.layers_to_transform or []) and config.quantization == other.quantization
        if not both_plain and not same:
            raise ValueError(
                f"The new adapter adapts blocks {adapted} with quantization {config.quantization!r}, and adapter "
                f"{name!r} on this model adapts blocks {other.layers_to_transform} with {other.quantization!r}. "
                "Adapters on one quantized model must share both: set layers_to_transform="
                f"{other.layers_to_transform}, or put the new one on a base model of its own."
            )
