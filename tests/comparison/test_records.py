"""Finished runs: found by what they depend on, never half written; the rate is chosen on validation text alone."""

from __future__ import annotations

import json

import pytest

from adaptq_peft.comparison import records
from adaptq_peft.comparison.methods import resolve_methods
from adaptq_peft.comparison.records import Run, RunStore, choose_rate


def run_of(name="lora", samples=8, rate=1e-3, seed=0):
    return Run(resolve_methods([name])[0], samples, rate, seed)


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path, {"model": "m", "texts": "t"})


def test_saved_run_is_found_and_says_what_it_depends_on(store):
    store.save(run_of(), {"losses": [1.0]})
    assert store.find(run_of())["losses"] == [1.0]
    (file,) = store.folder.iterdir()
    assert file.name.startswith("lora_n8_lr0.001_seed0_")
    depends_on = json.loads(file.read_text())["depends_on"]
    assert (depends_on["model"], depends_on["finish"], depends_on["rate"]) == ("m", "", 1e-3)


@pytest.mark.parametrize(
    "other", [run_of("lora-quantize"), run_of("lora-qv"), run_of(samples=9), run_of(rate=2e-3), run_of(seed=1)]
)
def test_another_run_is_not_found(store, other):
    store.save(run_of(), {})
    assert store.find(other) is None


def test_another_model_is_not_found(store, tmp_path):
    store.save(run_of(), {})
    other = RunStore(tmp_path, {"model": "other", "texts": "t"})
    assert other.find(run_of()) is None
    assert other.records() == []
    assert len(store.records()) == 1


def test_same_method_under_another_name_is_found(store):
    store.save(run_of("adaptq-50"), {"losses": [2.0]})
    assert store.find(run_of("select-activation"))["losses"] == [2.0]


def test_search_has_all_rates_of_the_method_the_size_and_the_seed(store):
    for other in (run_of("lora-qv"), run_of(samples=9), run_of(seed=1), run_of("lora-quantize")):
        store.save(other, {})
    for rate in (2e-3, 1e-3):
        store.save(run_of("adaptq-50", rate=rate), {"losses": [rate]})
    (method,) = resolve_methods(["ratio-50"])  # the same one
    assert {seed: [r["losses"] for r in found] for seed, found in store.searched(method, 8).items()} == {
        0: [[1e-3], [2e-3]]
    }
    assert list(store.searched(resolve_methods(["lora"])[0], 8)) == [1]


def test_environments_are_each_named_once_and_runs_that_know_none_are_left_out(store):
    store.save(run_of(), {})  # as before it was recorded
    for seed, device in enumerate(("CPU", "H200", "CPU"), 1):
        store.save(run_of(seed=seed), {"environment": {"device": device}})
    assert sorted(one["device"] for one in store.environments()) == ["CPU", "H200"]


def test_run_killed_while_it_is_written_leaves_nothing_that_is_found(store, monkeypatch):
    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save(run_of(), {})
    assert store.find(run_of()) is None
    assert store.records() == []


def test_seconds_are_those_of_a_run_that_trained_alike(store):
    store.save(run_of("lora"), {"seconds": {"build": 1.0, "step": 2.0}})
    assert store.timed(run_of("lora-quantize").method) == {"build": 1.0, "step": 2.0}
    assert store.timed(run_of("lora-qv").method) is None


def record(rate, validation, test=1.0, **finish):
    return {"rate": rate, "validation": {"domain": validation}, "test": test, "finish": finish}


def test_rate_is_chosen_on_validation_not_on_test():
    assert choose_rate([record(1e-4, 20.0, test=1.0), record(2e-4, 10.0, test=99.0)]) == 2e-4


def test_runs_out_of_budget_and_diverged_ones_come_last():
    diverged, out, within = record(1e-4, None), record(2e-4, 5.0, feasible=False), record(3e-4, 9.0, feasible=True)
    assert choose_rate([diverged, out, within]) == 3e-4
    assert choose_rate([diverged, out]) == 2e-4
    assert choose_rate([diverged]) == 1e-4
