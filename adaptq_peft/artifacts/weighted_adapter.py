"""Combines adapters into a new one: arithmetic on deltas."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper, merge_utils
from torch import nn

from ..config import AdaptQConfig
from ..layer import AdaptQLayer

Combination = Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]

#: Combination types that drop a part of each delta and need a density.
_WITH_DENSITY = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
_WITH_SIGN = ("ties", "dare_ties")


def resolve_combination(combination_type: str, density: float | None, majority_sign_method: str) -> Combination:
    """The function of `peft.utils.merge_utils` for a combination type.

    Raises:
        ValueError: if the type is unknown, or its density is missing or not in (0, 1].
    """
    if combination_type == "linear":
        return merge_utils.task_arithmetic
    if combination_type not in _WITH_DENSITY:
        raise ValueError(
            f"combination_type is {combination_type!r}; allowed: 'linear', {', '.join(map(repr, _WITH_DENSITY))}"
        )
    if density is None or not 0 < density <= 1:
        raise ValueError(f"combination_type {combination_type!r} needs a density above 0 and at most 1, got {density}")
    options: dict[str, Any] = {"density": density}
    if combination_type in _WITH_SIGN:
        options["majority_sign_method"] = majority_sign_method
    return partial(getattr(merge_utils, combination_type), **options)


def combined_config(configs: Sequence[AdaptQConfig], combination_type: str) -> AdaptQConfig:
    """The config of an adapter that covers the blocks of all the given ones.

    Its corrections have the sum of their ranks, so that they hold the sum of the others'.

    Raises:
        ValueError: if the adapters differ in which layers of a block they adapt, train rows of embeddings, or have
            low-rank corrections and the combination is not "linear".
    """
    ranks = [config.frozen_rank for config in configs]
    if any(ranks) and combination_type != "linear":
        raise ValueError(
            f"combination_type is {combination_type!r}, and the adapters have low-rank corrections (frozen_rank "
            f"{ranks}), of which only a 'linear' combination is one again. Use 'linear'."
        )
    first = configs[0]
    for name in ("target_modules", "exclude_modules", "trainable_token_indices"):
        if any(getattr(config, name) != getattr(first, name) for config in configs):
            raise ValueError(
                f"the adapters to combine have different {name}: {[getattr(config, name) for config in configs]}; "
                "only adapters of the same layers can be combined"
            )
    if first.trainable_token_indices:
        raise ValueError(
            "the adapters to combine train rows of embeddings, which can't be combined and would be lost "
            f"(trainable_token_indices={first.trainable_token_indices}); combine adapters without them"
        )
    config = copy.deepcopy(first)
    blocks = {index for other in configs for index in other.layers_to_transform or []}  # type: ignore[union-attr]
    config.layers_to_transform = sorted(blocks) or None
    saved = {name for other in configs for name in other.modules_to_save or []}
    config.modules_to_save = sorted(saved) or None
    config.base_fingerprint = None  # it depends on the blocks; made again
    config.evaluation = config.certificate = None  # measured on the others
    config.profile, config.selection_strategy = None, "update"  # no rule has chosen the blocks of all
    # The default scale; the factors are filled in by combine_corrections.
    config.frozen_rank, config.frozen_alpha, config.frozen_rank_init = sum(ranks), None, "zero"
    return config


def check_modules_to_save(model: nn.Module, adapters: Sequence[str]) -> None:
    """Raise ValueError if two of the adapters train the same module whole: there is no rule to combine those."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    shared = [wrapper for wrapper in wrappers if sum(name in wrapper.modules_to_save for name in adapters) > 1]
    if shared:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s)."
        )


def copy_modules_to_save(model: nn.Module, adapters: Sequence[str], new: str) -> None:
    """Give the adapter `new` the modules that one of the others trains whole."""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and new in wrapper.modules_to_save:
            for name in adapters:
                if name in wrapper.modules_to_save:
                    wrapper.modules_to_save[new].load_state_dict(wrapper.modules_to_save[name].state_dict())


@torch.no_grad()
def combine_deltas(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], new: str, combine: Combination
) -> None:
    """Set the deltas of adapter `new`, on each layer, to the combination of the other adapters' s * delta.

    An adapter with a low-rank correction there counts as s * B A, one that a layer does not have as zero. The sum is
    divided by the scale of `new`.
    """
    for layer in model.modules():
        if not isinstance(layer, AdaptQLayer) or new not in layer.adaptq_delta:
            continue
        for name, target in layer.adaptq_delta[new].named_parameters():
            scaled = [_scaled(layer, adapter, name, target) for adapter in adapters]
            combined = combine(scaled, torch.tensor(list(weights), device=target.device))
            target.copy_(combined / layer.scaling[new])


def _scaled(layer: AdaptQLayer, adapter: str, name: str, like: torch.Tensor) -> torch.Tensor:
    """What an adapter adds to a parameter, in float32 and the shape of `like`."""
    if adapter in layer.adaptq_delta:
        return layer.scaling[adapter] * getattr(layer.adaptq_delta[adapter], name).float()
    if layer.is_corrected_by(adapter) and name == "weight":
        return layer.correction_of(adapter).float()
    return torch.zeros_like(like, dtype=torch.float32)


@torch.no_grad()
def combine_corrections(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], new: str) -> None:
    """Set the corrections of adapter `new` to the weighted sum of the others': their factors side by side."""
    for layer in model.modules():
        if not isinstance(layer, AdaptQLayer) or not layer.is_corrected_by(new):
            continue
        factors_a, factors_b = [], []
        for name, weight in zip(adapters, weights, strict=True):
            if layer.is_corrected_by(name):
                a, b = layer.factors_of(name)
                factors_a.append(a.float())
                factors_b.append(weight * layer.scaling[name] * b.float())
        if factors_a:
            layer.set_correction(new, torch.cat(factors_a), torch.cat(factors_b, dim=1))
