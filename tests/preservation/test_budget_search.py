"""The search for a setting, on losses given by formulas."""

from __future__ import annotations

import numpy as np
import pytest

from adaptq_peft.preservation.budget_search import (
    CANDIDATES,
    Point,
    Setting,
    candidates,
    most_settings,
    propose_step,
    search,
)


def shrinking_is_free(setting: Setting) -> Point:
    """General loss falls with lambda and with factors, the domain suffers from factors only."""
    factors = float(setting.factors.mean())
    return Point(setting, factors / (1 + 10 * setting.strength), -factors + 0.01 * setting.strength)


def run(limit: float, shrinks: bool):
    asked = []

    def slopes(setting):
        asked.append(setting)
        return -np.ones(3), np.ones(3) / (1 + 10 * setting.strength)

    points = search(shrinking_is_free, slopes, 3, limit, shrinks)
    assert all(setting.strength == asked[0].strength for setting in asked)
    assert len(points) + len(CANDIDATES) == most_settings(shrinks)
    return points


def test_the_least_lambda_that_holds_the_budget_is_found():
    best = run(0.6, shrinks=True)[-1].setting
    assert best.strength == 0.1
    assert best.factors.tolist() == [1, 1, 1]
    assert run(0.06, shrinks=True)[-1].bound <= 0.06


def test_without_shrinkage_only_factors_are_tried():
    points = run(0.6, shrinks=False)
    assert {point.setting.strength for point in points} == {0.0}
    # 0.4 is the best global factor; by the slopes, only the last of the steps up from it keeps within the limit.
    assert points[-1].setting.factors == pytest.approx([0.45] * 3)
    assert points[-1].bound <= 0.6


def test_candidates_lead_from_the_best_to_the_safest():
    best, safest = Setting(np.array([1.0, 0.5]), 0.1), Setting(np.array([0.4, 0.5]), 0.4)
    found = candidates([Point(safest, 0.0, 2.0), Point(best, 0.5, 1.0)])
    assert len(found) == len(CANDIDATES)
    assert found[0].equals(best)
    assert found[-1].factors == pytest.approx(safest.factors)
    assert [setting.strength for setting in found] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert len(candidates([Point(best, 0.5, 1.0)])) == 1


def test_a_step_lowers_the_domain_loss_within_the_slack():
    factors, domain, general = np.full(3, 0.5), np.array([-1.0, -1.0, 1.0]), np.array([1.0, -0.1, 0.0])
    free = propose_step(factors, domain, general, slack=10, radius=0.1)
    assert free == pytest.approx([0.6, 0.6, 0.4])
    held = propose_step(factors, domain, general, slack=0, radius=0.1)
    assert general @ (held - factors) <= 0
    assert domain @ (held - factors) < 0
    assert propose_step(np.ones(3), np.zeros(3), np.zeros(3), 0, 0.1).tolist() == [1, 1, 1]


def test_where_no_step_reaches_the_slack_general_loss_is_lowered():
    found = propose_step(np.full(3, 0.5), -np.ones(3), np.ones(3), slack=-10, radius=0.1)
    assert found == pytest.approx([0.4] * 3)
