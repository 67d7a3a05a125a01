from __future__ import annotations

import pytest

from adaptq_peft import ActivationProfile, SelectionRequest, register_selection_strategy
from adaptq_peft.selection import select_blocks, selection_strategy_names, strategies

PROFILE = ActivationProfile(
    magnitude=[1.0, 4.0, 2.0, 3.0],
    update=[0.9, 0.1, 0.8, 0.2],
    num_samples=50,
    num_tokens=500,
    general_magnitude=[0.5, 8.0, 1.5, 3.0],
    sensitivity=[0.4, 0.1, 0.1, 0.05],
)


def select(name, count, profile=PROFILE, seed=0, num_blocks=4):
    return select_blocks(name, SelectionRequest(num_blocks=num_blocks, profile=profile, seed=seed), count)


@pytest.fixture
def register():
    names = []

    def add(scores, name="test"):
        names.append(name)
        register_selection_strategy(name, needs="none")(lambda request: scores)
        return name

    yield add
    for name in names:
        strategies._REGISTRY.pop(name, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("activation", [1, 3]),
        ("update", [0, 2]),
        ("contrast", [0, 2]),
        ("sensitivity", [0, 2]),
        ("activation+sensitivity", [0, 1]),  # ranks 0, 3, 1, 2 and 3, 1.5, 1.5, 0
        ("first", [0, 1]),
        ("last", [2, 3]),
    ],
)
def test_each_rule_takes_its_highest_scores(name, expected):
    assert select(name, 2) == expected


def test_random_is_seeded():
    assert select("random", 2, seed=3) == select("random", 2, seed=3)
    assert len({tuple(select("random", 3, num_blocks=30, seed=seed)) for seed in range(20)}) > 15


def test_all_and_one():
    assert select("activation", 4) == [0, 1, 2, 3]
    assert select("activation", 1) == [1]


@pytest.mark.parametrize("count", [0, 5, -1])
def test_a_count_out_of_range(count):
    with pytest.raises(ValueError, match=rf"{count} blocks are to be adapted, but the model has 4; allowed: 1 to 4"):
        select("last", count)


def test_of_equal_scores_the_deeper_block_wins(register):
    assert select(register([1.0, 1.0, 1.0, 0.0]), 2) == [1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_an_error(register, bad):
    with pytest.raises(ValueError, match=r"strategy 'test' gave blocks \[1, 3\] scores that are not finite"):
        select(register([1.0, bad, 2.0, bad]), 2)


def test_a_wrong_number_of_scores(register):
    with pytest.raises(
        ValueError, match=r"strategy 'test' returned 3 scores for 4 blocks; it must return one for each"
    ):
        select(register([1.0, 2.0, 3.0]), 2)


def test_a_users_own_strategy_is_listed(register):
    assert register([0.0], name="mine") in selection_strategy_names()


def test_a_profile_is_needed():
    with pytest.raises(ValueError, match="needs a profile of the model on domain data"):
        select("activation", 2, profile=None)
    domain_only = ActivationProfile(magnitude=[1.0] * 4, update=[1.0] * 4, num_samples=1, num_tokens=1)
    with pytest.raises(ValueError, match="pass general_calibration_data"):
        select("contrast", 2, profile=domain_only)
    for name in ("sensitivity", "activation+sensitivity"):
        with pytest.raises(ValueError, match="needs a profile with sensitivities, and none were measured"):
            select(name, 2, profile=domain_only)


def test_unknown_needs_are_an_error():
    with pytest.raises(ValueError, match=r"needs is 'both'; allowed: \['none', 'domain', 'domain and general', "):
        register_selection_strategy("mine", needs="both")
