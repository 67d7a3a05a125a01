"""The search of `fit_to_budget`: how much to shrink a model's deltas, and a factor for those of each block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: Factors that are tried on all blocks together, first.
GLOBAL_FACTORS = (1.0, 0.7, 0.4, 0.0)
#: Values of lambda that are tried without factors, and factors that are tried on the best of them.
STRENGTHS, FACTORS_OF_SHRUNK = (0.03, 0.1, 0.3, 1.0), (0.7, 0.4)
#: Steps block by block from the best of all these: how many are tried, and the root mean square of the first.
STEPS, FIRST_STEP = 3, 0.2
#: Where candidates lie on the way from the best setting to the safest.
CANDIDATES = (0.0, 1 / 3, 2 / 3, 1.0)


@dataclass(frozen=True)
class Setting:
    """How an adapter is weakened.

    Args:
        factors: on the deltas of each block, [blocks].
        strength: lambda of the shrinkage before that; 0 is none.
    """

    factors: np.ndarray
    strength: float = 0.0

    def towards(self, other: Setting, part: float) -> Setting:
        """A setting on the straight way to another; `part` from 0 to 1."""
        strength = self.strength + part * (other.strength - self.strength)
        return Setting(self.factors + part * (other.factors - self.factors), strength)

    def equals(self, other: Setting) -> bool:
        return self.strength == other.strength and np.array_equal(self.factors, other.factors)


@dataclass(frozen=True)
class Point:
    """A setting and what it gives on the text for choosing.

    Args:
        setting: how the adapter is weakened.
        bound: upper confidence bound of the general rise, nats a token.
        domain: domain loss, nats a token.
    """

    setting: Setting
    bound: float
    domain: float


def search(
    evaluate: Callable[[Setting], Point],
    slopes: Callable[[Setting], tuple[np.ndarray, np.ndarray]],
    blocks: int,
    limit: float,
    shrinks: bool,
) -> list[Point]:
    """All settings that were tried: [-1] is the best, and others may be safer.

    Args:
        evaluate: measures a setting.
        slopes: d loss / d factor at a setting, on the domain and on general text, [blocks] each, nats a token.
        blocks: their number.
        limit: of the bound, nats a token.
        shrinks: whether lambdas other than 0 are tried, too.
    """

    def rank(point: Point) -> tuple[bool, float]:
        """Lower is better: first within the limit, then the domain loss; outside of it, how far."""
        outside = point.bound > limit
        return outside, point.bound if outside else point.domain

    ones = np.ones(blocks)
    points = [evaluate(Setting(factor * ones)) for factor in GLOBAL_FACTORS]
    if shrinks:
        shrunk = [evaluate(Setting(ones, strength)) for strength in STRENGTHS]
        strength = min(shrunk, key=rank).setting.strength
        points += shrunk + [evaluate(Setting(factor * ones, strength)) for factor in FACTORS_OF_SHRUNK]
    best, radius = min(points, key=rank), FIRST_STEP
    slope = slopes(best.setting)
    for step in range(STEPS):
        factors = propose_step(best.setting.factors, *slope, limit - best.bound, radius)
        point = evaluate(Setting(factors, best.setting.strength))
        points.append(point)
        if rank(point) >= rank(best):
            radius /= 2
            continue
        best = point
        slope = slopes(best.setting) if step + 1 < STEPS else slope
    return [*(point for point in points if point is not best), best]


def most_settings(shrinks: bool) -> int:
    """How many settings are measured at most: those that `search` tries, and the candidates."""
    shrunk = len(STRENGTHS) + len(FACTORS_OF_SHRUNK) if shrinks else 0
    return len(GLOBAL_FACTORS) + shrunk + STEPS + len(CANDIDATES)


def candidates(points: list[Point]) -> list[Setting]:
    """Settings to certify, from the best to the safest that was seen."""
    best, safest = points[-1].setting, min(points, key=lambda point: point.bound).setting
    return [best.towards(safest, part) for part in (CANDIDATES[:1] if best.equals(safest) else CANDIDATES)]


def propose_step(
    factors: np.ndarray, domain: np.ndarray, general: np.ndarray, slack: float, radius: float
) -> np.ndarray:
    """Factors a step away that lower the domain loss while general loss rises by no more than `slack`, to first order.

    The step is along -(domain + mu * general), with the least mu that does it.

    Args:
        factors: [blocks], each in [0, 1].
        domain: d domain loss / d factor, [blocks], nats a token.
        general: the same on general text.
        slack: nats a token; negative if general loss must fall.
        radius: root mean square of the step, before it is cut to [0, 1].

    Returns:
        [blocks], in [0, 1]. If no mu reaches the slack, a step along -general.
    """
    ratio = np.linalg.norm(domain) / max(float(np.linalg.norm(general)), 1e-30)
    for mu in (0.0, *np.geomspace(0.1, 100, 25) * ratio):
        moved = _step(factors, domain + mu * general, radius)
        if general @ (moved - factors) <= slack:
            return moved
    return _step(factors, general, radius)


def _step(factors: np.ndarray, slope: np.ndarray, radius: float) -> np.ndarray:
    size = math.sqrt(float((slope**2).mean()))
    return np.clip(factors - radius * slope / size, 0, 1) if size > 0 else factors
