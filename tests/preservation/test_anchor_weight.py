"""The weight that holds a divergence at a target."""

from __future__ import annotations

import json
import math

import pytest

from adaptq_peft.preservation.anchor_weight import AdaptiveWeight


def settle(weight, noise=0.0, steps=400, pull=1.0):
    """A parameter that the domain pulls away with a constant force and the anchor pulls back: KL = x^2 / 2."""
    x, trace = 0.0, []
    for step in range(steps):
        kl = x * x / 2 * (1 + noise * math.cos(1.7 * step))
        x += 0.1 * (pull - weight.value * x)
        weight.update(kl)
        trace.append(x * x / 2)
    return trace


@pytest.mark.parametrize("initial", [0.05, 1.0, 10.0])
def test_it_settles_at_the_target(initial):
    trace = settle(AdaptiveWeight(initial, 0.02))
    assert all(value == pytest.approx(0.02, rel=0.1) for value in trace[-50:])


def test_noise_of_the_batches_does_not_throw_it_off():
    trace = settle(AdaptiveWeight(1.0, 0.02), noise=0.8)
    assert sum(trace[-100:]) / 100 == pytest.approx(0.02, rel=0.2)


def test_it_lets_go_where_the_target_is_not_needed():
    weight = AdaptiveWeight(1.0, 0.5)
    settle(weight, pull=0.01)
    assert weight.value < 0.05


def test_it_stays_in_bounds_and_comes_back():
    weight = AdaptiveWeight(1.0, 0.01)
    for _ in range(1000):
        weight.update(5.0)
    assert weight.value == pytest.approx(100 * math.exp(0.5))
    for _ in range(250):
        weight.update(1e-6)
    assert weight.value < 1


def test_without_a_target_it_is_constant():
    weight = AdaptiveWeight(0.7)
    weight.update(100.0)
    assert weight.value == 0.7


def test_a_step_without_a_number_changes_nothing():
    weight = AdaptiveWeight(0.7, 0.1)
    weight.update(math.nan)
    assert weight.value == 0.7


def test_it_goes_on_from_a_saved_state():
    weight = AdaptiveWeight(1.0, 0.02)
    settle(weight, steps=20)
    other = AdaptiveWeight(1.0, 0.02)
    other.load_state_dict(json.loads(json.dumps(weight.state_dict())))
    for each in (weight, other):
        each.update(0.3)
    assert other.value == weight.value
