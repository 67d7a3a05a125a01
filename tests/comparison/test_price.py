"""What a study is said to take before it starts."""

from __future__ import annotations

import pytest

from adaptq_peft.comparison import StudySettings
from adaptq_peft.comparison.methods import resolve_methods
from adaptq_peft.comparison.price import Price, estimate
from adaptq_peft.comparison.records import Run


def test_estimate_adds_up_builds_steps_tokens_and_budgets():
    settings = StudySettings(epochs=2, batch_size=4, evaluation_tokens=1000, validation_tokens=100)
    plain, budget = resolve_methods(["lora-anchor", "lora-anchor-budget"])
    runs = [Run(plain, 10, 1e-4, 0), Run(budget, 10, 1e-4, 0)]
    found = estimate([runs], {plain.training: Price(build=5.0, step=2.0)}, 0.01, settings)
    steps, tokens = 2 * 3, 2 * (2 * 100 + 2 * 1000) + 28.5 * 100
    assert found.hours * 3600 == pytest.approx(5.0 + steps * 2.0 + tokens * 0.01)
    assert (found.trainings, found.runs) == (1, 2)


def test_estimate_counts_one_preparation_for_all_rates_of_an_adaptq_method():
    settings = StudySettings(epochs=1, batch_size=8, evaluation_tokens=2, validation_tokens=2)
    for name, builds in (("adaptq-50", 2), ("lora", 4)):
        (method,) = resolve_methods([name])
        groups = [[Run(method, 8, rate, seed)] for rate in (1e-4, 2e-4) for seed in (0, 1)]
        found = estimate(groups, {method.training: Price(build=5.0, step=2.0)}, 0.0, settings)
        assert found.hours * 3600 == pytest.approx(builds * 5.0 + 4 * 2.0)


@pytest.mark.parametrize(
    ("name", "texts"),
    [("full", 3), ("lora", 3), ("shira", 3), ("adaptq-50", 3), ("lora-quantize", 1), ("osf", 1), ("vanilla", 1)],
)
def test_estimate_counts_scales_where_they_are_measured(name, texts):
    settings = StudySettings(evaluation_tokens=1000, validation_tokens=100, scales=(0.25, 0.5))
    (method,) = resolve_methods([name])
    found = estimate([[Run(method, 8, 1e-4, 0)]], {method.training: Price(build=0.0, step=0.0)}, 0.01, settings)
    assert found.hours * 3600 == pytest.approx((2 * 100 + 2 * texts * 1000) * 0.01)
