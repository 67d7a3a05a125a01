"""The weight of the anchor: a number, or one that holds the measured KL at a target."""

from __future__ import annotations

import math
from typing import Any


class AdaptiveWeight:
    """Holds a measured divergence at a target by a proportional-integral controller on the logarithm of a weight.

    The integral part is dual ascent on the constraint KL <= target with multiplicative steps; the proportional part
    damps its oscillation (PID Lagrangian, Stooke et al. 2020, arXiv:2007.03964). The error is the logarithm of the
    smoothed KL over the target, cut to [-1, 1], so that it has no units. The integral part stays within a factor of
    100 of the start, so that it comes back soon when the target can't be met.

    Args:
        initial: the weight to begin with, positive.
        target: the KL to hold, in nats a token; None: the weight stays as it is.
        integral: change of log(weight) a step at an error of 1. Default 0.05.
        proportional: part of log(weight) that follows the error at once. Default 0.5.
        smoothing: share of the old value in the running mean of the KL. Default 0.9.

    Attributes:
        value: the weight now.
    """

    def __init__(
        self,
        initial: float,
        target: float | None = None,
        *,
        integral: float = 0.05,
        proportional: float = 0.5,
        smoothing: float = 0.9,
    ) -> None:
        self.value = initial
        self._target = target
        self._gains = (integral, proportional)
        self._smoothing = smoothing
        self._center = math.log(initial)
        self._log_weight = self._center
        self._mean: float | None = None

    def update(self, kl: float) -> None:
        """Take in the KL of one step, in nats a token."""
        if self._target is None or not math.isfinite(kl):
            return
        self._mean = kl if self._mean is None else self._smoothing * self._mean + (1 - self._smoothing) * kl
        error = min(max(math.log(max(self._mean, 1e-12) / self._target), -1.0), 1.0)
        integral, proportional = self._gains
        bound = math.log(100)
        moved = self._log_weight - self._center + integral * error
        self._log_weight = self._center + min(max(moved, -bound), bound)
        self.value = math.exp(self._log_weight + proportional * error)

    def state_dict(self) -> dict[str, float | None]:
        """What `load_state_dict` needs to go on, ready for JSON."""
        return {"value": self.value, "log_weight": self._log_weight, "mean": self._mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another left off."""
        self.value, self._log_weight, self._mean = state["value"], state["log_weight"], state["mean"]
