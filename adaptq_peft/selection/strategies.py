"""Which blocks are adapted: a registry of rules that give each block a score; the K highest scores win."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .profiling import ActivationProfile

ProfileNeed = Literal["none", "domain", "domain and general", "domain and sensitivity"]


@dataclass(frozen=True)
class SelectionRequest:
    """What a strategy may look at.

    Args:
        num_blocks: L.
        profile: statistics of the blocks on the calibration data; `None` for strategies that need none.
        seed: seed for strategies that draw at random.
    """

    num_blocks: int
    profile: ActivationProfile | None
    seed: int


SelectionStrategy = Callable[[SelectionRequest], Sequence[float]]


@dataclass(frozen=True)
class _Entry:
    score: SelectionStrategy
    needs: ProfileNeed


_REGISTRY: dict[str, _Entry] = {}


def register_selection_strategy(
    name: str, *, needs: ProfileNeed = "domain"
) -> Callable[[SelectionStrategy], SelectionStrategy]:
    """Decorator that registers a function under `name` for `AdaptQConfig(selection_strategy=name)`.

    The function takes a `SelectionRequest` and returns L finite scores; the K blocks with the highest are adapted.

    Args:
        name: the name; registering one again replaces it.
        needs: "none" (nothing is profiled), "domain" (default), "domain and general", or "domain and sensitivity"
            (`ActivationProfile.sensitivity` is measured, too).

    Raises:
        ValueError: if `needs` is none of these.
    """
    if needs not in get_args(ProfileNeed):
        raise ValueError(f"needs is {needs!r}; allowed: {list(get_args(ProfileNeed))}")

    def register(score: SelectionStrategy) -> SelectionStrategy:
        _REGISTRY[name] = _Entry(score, needs)
        return score

    return register


def selection_strategy_names() -> list[str]:
    """Names of all registered strategies, sorted."""
    return sorted(_REGISTRY)


def strategy_needs_profile(name: str) -> bool:
    """Whether the strategy looks at a profile of the domain data."""
    return _REGISTRY[name].needs != "none"


def strategy_needs_general_profile(name: str) -> bool:
    """Whether the strategy compares domain data with general data."""
    return _REGISTRY[name].needs == "domain and general"


def strategy_needs_sensitivity(name: str) -> bool:
    """Whether the strategy looks at what quantizing each block costs."""
    return _REGISTRY[name].needs == "domain and sensitivity"


def select_blocks(name: str, request: SelectionRequest, count: int) -> list[int]:
    """Indices of the `count` blocks with the highest score, ascending (Algorithm 1, line 17).

    Of blocks with equal scores the deeper one is taken: what lies below the lowest adapted block needs no backward
    pass, so a deeper choice is the cheaper one.

    Args:
        name: a registered strategy.
        request: what the strategy may look at.
        count: K, between 1 and `request.num_blocks`.

    Raises:
        ValueError: if `count` is out of range, the strategy returns other than L scores, or a score is not finite.
    """
    if not 1 <= count <= request.num_blocks:
        raise ValueError(
            f"{count} blocks are to be adapted, but the model has {request.num_blocks}; allowed: 1 to "
            f"{request.num_blocks}. Change num_adapted_blocks or selection_ratio."
        )
    scores = [float(score) for score in _REGISTRY[name].score(request)]
    if len(scores) != request.num_blocks:
        raise ValueError(
            f"selection strategy {name!r} returned {len(scores)} scores for {request.num_blocks} blocks; it must "
            "return one for each block"
        )
    bad = [index for index, score in enumerate(scores) if not math.isfinite(score)]
    if bad:
        raise ValueError(
            f"selection strategy {name!r} gave blocks {bad} scores that are not finite ({scores[bad[0]]}); a block "
            "can't be ranked by that. Look at the profile and the strategy."
        )
    ranked = sorted(range(request.num_blocks), key=lambda index: (scores[index], index), reverse=True)
    return sorted(ranked[:count])


def _profile(request: SelectionRequest) -> ActivationProfile:
    if request.profile is None:
        raise ValueError("this selection strategy needs a profile of the model on domain data, and none was made")
    return request.profile


@register_selection_strategy("activation")
def _activation(request: SelectionRequest) -> Sequence[float]:
    """The paper's rule (section 3.1): a_l, the mean absolute activation. Grows with depth in pre-norm models."""
    return _profile(request).magnitude


@register_selection_strategy("update")
def _update(request: SelectionRequest) -> Sequence[float]:
    """How much a block changes its input, relative to it: mean of norm(H_l - H_(l-1)) / norm(H_(l-1))."""
    return _profile(request).update


@register_selection_strategy("contrast", needs="domain and general")
def _contrast(request: SelectionRequest) -> Sequence[float]:
    """Activation on domain data relative to that on general data, a_l / g_l: divides the growth with depth out."""
    profile = _profile(request)
    if profile.general_magnitude is None:
        raise ValueError(
            "selection strategy 'contrast' needs a profile made with general data; pass general_calibration_data"
        )
    return [domain / general for domain, general in zip(profile.magnitude, profile.general_magnitude, strict=True)]


@register_selection_strategy("sensitivity", needs="domain and sensitivity")
def _sensitivity(request: SelectionRequest) -> Sequence[float]:
    """The predicted rise of the general loss if the block is quantized: those that suffer most stay as they are."""
    found = _profile(request).sensitivity
    if found is None:
        raise ValueError("this selection strategy needs a profile with sensitivities, and none were measured")
    return found


@register_selection_strategy("activation+sensitivity", needs="domain and sensitivity")
def _activation_and_sensitivity(request: SelectionRequest) -> Sequence[float]:
    """The mean of a block's rank by activation and its rank by sensitivity, 0 for the lowest: scales do not matter."""
    ranks = (_ranks(_profile(request).magnitude), _ranks(_sensitivity(request)))
    return [(activation + sensitivity) / 2 for activation, sensitivity in zip(*ranks, strict=True)]


def _ranks(values: Sequence[float]) -> list[float]:
    """How many values are lower than each; those that are equal to it count half, itself left out."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]


@register_selection_strategy("random", needs="none")
def _random(request: SelectionRequest) -> Sequence[float]:
    draw = random.Random(request.seed)
    return [draw.random() for _ in range(request.num_blocks)]


@register_selection_strategy("first", needs="none")
def _first(request: SelectionRequest) -> Sequence[float]:
    return [-float(index) for index in range(request.num_blocks)]


@register_selection_strategy("last", needs="none")
def _last(request: SelectionRequest) -> Sequence[float]:
    return [float(index) for index in range(request.num_blocks)]
