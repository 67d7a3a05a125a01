"""Upper bounds: exceeded by the truth as often as they say, on documents whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adaptq_peft.preservation.bounds import MIN_DOCUMENTS, degradation_of, rise_per_token, upper_bounds

DRAWS = 300


def draw(generator, count):
    """Differences of 3 models on documents of very different lengths, one of them skewed, that err together."""
    num_tokens = np.clip(np.exp(generator.normal(5, 0.6, count)), 16, 512).round()
    common = generator.gamma(2, 0.02, count) + generator.normal(0, 0.3, count) / np.sqrt(num_tokens)
    own = generator.normal(0, 0.01, (3, count))
    return (np.array([[0.5], [1.0], [1.2]]) * common + own) * num_tokens, num_tokens


@pytest.fixture(scope="module")
def truth():
    differences, num_tokens = draw(np.random.default_rng(0), 400_000)
    return rise_per_token(differences, num_tokens)


def largest_allowed(rate, draws):
    """What a rate may come to in so many draws: three standard errors above it."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / draws)


def test_truth_exceeds_the_bound_no_more_often_than_stated(truth):
    generator, confidence = np.random.default_rng(1), 0.9
    one, any_of_three = 0, 0
    for seed in range(DRAWS):
        differences, num_tokens = draw(generator, 48)
        one += truth[1] > upper_bounds(differences[1:2], num_tokens, confidence, seed, resamples=200)[0]
        any_of_three += bool((truth > upper_bounds(differences, num_tokens, confidence, seed, resamples=200)).any())
    assert one / DRAWS <= largest_allowed(1 - confidence, DRAWS)
    assert any_of_three / DRAWS <= largest_allowed(1 - confidence, DRAWS)
    assert one / DRAWS >= 0.02  # not just so wide that it never fails


def test_choosing_the_lowest_single_bound_would_break_the_confidence_and_the_joint_bound_keeps_it():
    generator, confidence = np.random.default_rng(2), 0.9
    num_tokens = np.full(32, 100.0)
    single, joint = 0, 0
    for seed in range(DRAWS):
        differences = generator.normal(0, 5, (6, 32))  # six models that are all exactly as good as the base
        apart = [upper_bounds(row[None], num_tokens, confidence, seed, resamples=100)[0] for row in differences]
        single += min(apart) < 0
        joint += upper_bounds(differences, num_tokens, confidence, seed, resamples=100).min() < 0
    assert single / DRAWS > 0.3
    assert joint / DRAWS <= largest_allowed(1 - confidence, DRAWS)


def test_bound_is_above_the_mean_shrinks_with_documents_and_repeats():
    differences, num_tokens = draw(np.random.default_rng(3), 400)
    rise = rise_per_token(differences, num_tokens)
    few, many = upper_bounds(differences[:, :40], num_tokens[:40]), upper_bounds(differences, num_tokens)
    assert (many > rise).all()
    assert (many - rise < few - rise_per_token(differences[:, :40], num_tokens[:40])).all()
    assert np.array_equal(many, upper_bounds(differences, num_tokens))


@pytest.mark.parametrize(("confidence", "quantile"), [(0.8, 0.842), (0.95, 1.645)])
def test_with_many_documents_it_is_the_one_sided_quantile_of_the_normal(confidence, quantile):
    differences = np.random.default_rng(0).normal(0, 1, (1, 1000))
    error = differences.std(ddof=1) / math.sqrt(1000)
    found = upper_bounds(differences, np.ones(1000), confidence)[0]
    assert (found - differences.mean()) / error == pytest.approx(quantile, abs=0.12)


def test_a_tail_of_rises_widens_the_bound_more_than_one_of_falls():
    rises, num_tokens = -np.log((np.arange(40)[None] + 0.5) / 40), np.ones(40)  # as an exponential distribution
    above, below = (upper_bounds(each, num_tokens)[0] - each.mean() for each in (rises, -rises))
    assert above > 1.2 * below


def test_a_model_equal_to_the_base_has_the_bound_zero():
    assert upper_bounds(np.zeros((1, 10)), np.full(10, 7.0)).tolist() == [0]


def test_degradation():
    assert degradation_of(math.log(1.05)) == pytest.approx(0.05)
    assert degradation_of(1e4) == math.inf


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_confidence_out_of_range_is_refused(confidence):
    with pytest.raises(ValueError, match=rf"confidence is {confidence}; allowed: a number between 0 and 1"):
        upper_bounds(np.zeros((1, 10)), np.ones(10), confidence)


def test_too_few_documents_are_refused():
    with pytest.raises(ValueError, match="bound from 7 documents was asked for; it needs at least 8"):
        upper_bounds(np.zeros((1, MIN_DOCUMENTS - 1)), np.ones(MIN_DOCUMENTS - 1))
