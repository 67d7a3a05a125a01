"""A model that was prepared once is the same model for the next learning rate, and for no other run."""

from __future__ import annotations

import pytest
import torch

from adaptq_peft.comparison import methods
from adaptq_peft.comparison.methods import resolve_methods
from adaptq_peft.comparison.records import Run
from adaptq_peft.comparison.training import train_run
from adaptq_peft.comparison.untrained import UntrainedAdapters

pytestmark = pytest.mark.filterwarnings("ignore:Profiled")


@pytest.fixture
def train(load, windows, measurements, settings, untrained):
    """`train(method, rate, samples, seed)`: the model after two steps, and its losses."""

    def run(name, rate=1e-3, samples=8, seed=0, prepared=untrained):
        (method,) = resolve_methods([name])
        arguments = (load, windows, measurements, settings(), lambda step, loss: None, prepared)
        return train_run(Run(method, samples, rate, seed), *arguments, steps=2)

    return run


@pytest.fixture
def builds(monkeypatch):
    """How often a model with an ADAPTQ adapter was prepared."""
    made, original = [], methods.get_peft_model
    monkeypatch.setattr(methods, "get_peft_model", lambda *arguments: made.append(1) or original(*arguments))
    return made


@pytest.mark.parametrize("name", ["adaptq-50-mixed", "frozen-nf4-calibrated"])
def test_second_learning_rate_trains_as_if_it_had_been_prepared_anew(name, train, builds):
    train(name, rate=5e-3)
    shared = train(name, rate=1e-3)
    assert len(builds) == 1
    alone = train(name, rate=1e-3, prepared=UntrainedAdapters())
    assert len(builds) == 2
    assert shared.losses == alone.losses
    expected = alone.model.state_dict()
    assert shared.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in shared.model.state_dict().items())
    assert shared.memory == alone.memory


def test_anchored_training_starts_from_the_same_model(train, builds):
    first, second = train("adaptq-50-mixed"), train("adaptq-50-mixed-anchor")
    assert len(builds) == 1
    assert second.seconds["build"] == first.seconds["build"] > 0


@pytest.mark.parametrize("other", [{"seed": 1}, {"samples": 16}, {"name": "adaptq-50-mixed"}])
def test_other_samples_seeds_and_options_are_prepared_anew(other, train, builds):
    train("adaptq-50")
    train(**({"name": "adaptq-50"} | other))
    assert len(builds) == 2


def test_methods_without_general_text_start_from_another_model():
    recipe, unanchored, written = (
        Run(method, 8, 1e-3, seed=0).untrained
        for method in resolve_methods(
            ["adaptq-recipe-4bit", "adaptq-recipe-4bit-unanchored", "adaptq-recipe-4bit-written"]
        )
    )
    assert recipe == unanchored != written


def test_other_methods_keep_nothing(train, builds):
    train("lora")
    train("lora")
    assert len(builds) == 2
