"""The callback: its figures are in the log, the metrics and the trackers, and a passed budget stops training."""

from __future__ import annotations

import pytest
from support import randomize
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from adaptq_peft import BaseReference, ForgettingCallback, measure_forgetting
from adaptq_peft.preservation.forgetting_callback import METRICS


class Tracker(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.fixture
def run(adapt, load, general, domain, tokenizer, tmp_path):
    def build(budget=None, confidence=0.95, std=0.0, lr=1e-3, early=(), before=(), adapter=(), **options):
        samples = [{**tokenizer(text), "labels": tokenizer(text)["input_ids"]} for text in domain]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=1, max_steps=4, eval_steps=2,
            learning_rate=lr, report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=1,
            **{"eval_strategy": "steps", "save_strategy": "no", **options},
        )  # fmt: skip
        reference = BaseReference.of(load(), general, domain, tokenizer=tokenizer)
        model, tracker = adapt(std=std, **dict(adapter)), Tracker()
        randomize(model, std=std)
        trainer = Trainer(
            model, arguments, train_dataset=samples, eval_dataset=samples[:2], callbacks=[tracker, *before]
        )
        trainer.add_callback(ForgettingCallback(trainer, reference, budget=budget, confidence=confidence))
        for callback in early:
            trainer.add_callback(callback)
        trainer.train()
        return trainer, tracker, reference

    return build


def test_figures_are_logged_to_every_tracker_at_each_evaluation(run):
    trainer, tracker, reference = run()
    entries = [entry for entry in trainer.state.log_history if "eval_general_degradation" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert sum("eval_domain_kl" in logs for logs in tracker.seen) == 2
    report = measure_forgetting(trainer.model, base=reference)
    assert entries[-1]["eval_general_degradation"] == pytest.approx(report.degradation)
    assert entries[-1]["eval_general_upper_bound"] == pytest.approx(report.upper_bound)
    assert entries[-1]["eval_domain_kl"] == pytest.approx(report.domain_kl)


def test_figures_are_metrics_of_the_evaluation(run):
    trainer, _, reference = run(confidence=0.6)
    found = trainer.evaluate()
    assert {name for name in found if name.startswith(("eval_general", "eval_domain"))} == set(METRICS)
    report = measure_forgetting(trainer.model, base=reference, confidence=0.6)
    assert found["eval_general_upper_bound"] == pytest.approx(report.upper_bound)
    assert found["eval_general_perplexity"] == pytest.approx(report.general.adapted.total.value)
    assert found["eval_domain_perplexity"] == pytest.approx(report.domain.adapted.total.value)
    assert found["eval_domain_change"] == pytest.approx(report.domain.degradation)


def test_weights_that_change_after_training_are_measured_anew(run):
    trainer, _, reference = run()
    randomize(trainer.model, std=0.3)
    found = trainer.evaluate()["eval_general_degradation"]
    assert found == pytest.approx(measure_forgetting(trainer.model, base=reference).degradation)


@pytest.mark.parametrize("sets", [1, 2])
def test_after_an_interrupt_each_evaluation_is_measured_anew(run, sets):
    """Weights may change in ways that count no steps: `fit_to_budget` is one."""

    class Interrupt(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "eval_runtime" in logs or "eval_1_runtime" in logs:
                raise KeyboardInterrupt

    trainer, _, reference = run()
    if sets == 2:
        trainer.eval_dataset = {"0": trainer.eval_dataset, "1": trainer.eval_dataset}
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupt)
    for std in (0.3, 0.0):
        randomize(trainer.model, std=std)
        found = trainer.evaluate()["eval_general_degradation"]
        assert found == pytest.approx(measure_forgetting(trainer.model, base=reference).degradation)


def test_autocast_is_not_taken_for_forgetting(run):
    trainer, _, reference = run(lr=0.0, bf16=True, adapter={"quantization": "none"})
    entries = [entry for entry in trainer.state.log_history if "eval_general_degradation" in entry]
    assert [entry["eval_general_degradation"] for entry in entries] == [0, 0]
    assert measure_forgetting(trainer.model, base=reference).degradation == 0


def test_a_second_training_is_measured_as_the_first(run):
    trainer, _, _ = run()
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_general_degradation" in entry] == [2, 4]


def test_several_evaluation_sets_are_measured_once_a_step(run):
    trainer, tracker, _ = run()
    samples, tracker.seen = trainer.eval_dataset, []
    trainer.eval_dataset = {"one": samples, "other": samples}
    trainer.train()
    assert sum("eval_general_degradation" in logs for logs in tracker.seen) == 2
    assert sum("eval_other_loss" in logs for logs in tracker.seen) == 2


KEPT = {"save_strategy": "steps", "save_steps": 2, "metric_for_best_model": "general_perplexity"}


def test_the_best_model_is_the_one_of_the_lowest_perplexity(run):
    trainer, _, _ = run(lr=0.5, load_best_model_at_end=True, greater_is_better=False, **KEPT)
    entries = [entry for entry in trainer.state.log_history if "eval_general_perplexity" in entry]
    found = {entry["step"]: entry["eval_general_perplexity"] for entry in entries}
    assert found[2] != found[4]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{min(found, key=found.get)}")


def test_a_metric_that_would_keep_the_worst_model_is_refused(run):
    with pytest.raises(ValueError, match=r"'eval_general_perplexity' is better the lower .* greater_is_better=False"):
        run(load_best_model_at_end=True, **KEPT)


@pytest.mark.parametrize(("budget", "lost"), [(None, "trains; give"), (0.1, "trains, and the budget stops nothing;")])
def test_without_evaluations_a_warning_says_that_nothing_is_measured(run, budget, lost):
    with pytest.warns(UserWarning, match=f'eval_strategy is "no", so ForgettingCallback measures nothing .* {lost}'):
        run(budget=budget, eval_strategy="no")


def test_early_stopping_sees_the_figures_or_is_refused(run):
    patience = {"greater_is_better": False, "load_best_model_at_end": True, **KEPT}
    trainer, _, _ = run(lr=0.5, early=[EarlyStoppingCallback(1, early_stopping_threshold=1e9)], **patience)
    assert trainer.state.global_step == 4
    with pytest.raises(ValueError, match="EarlyStoppingCallback comes before ForgettingCallback, so it never sees"):
        run(before=[EarlyStoppingCallback(1)], **patience)


def test_training_stops_where_the_budget_is_passed(run):
    trainer, _, _ = run(budget=0.0, std=0.3)
    assert trainer.state.global_step == 2


def test_training_goes_on_within_the_budget(run):
    trainer, _, _ = run(budget=1e6)
    assert trainer.state.global_step == 4


def test_what_quantizing_cost_stops_nothing(run):
    trainer, _, _ = run(budget=0.0, lr=0.0)
    assert trainer.state.log_history[-2]["eval_general_degradation"] > 0
    assert trainer.state.global_step == 4


def test_training_that_diverges_stops_with_a_budget(run):
    with pytest.warns(UserWarning, match="loss on general text is not a number after step 2: .* lower the learning"):
        trainer, _, _ = run(budget=1e6, lr=1e38)
    assert trainer.state.global_step == 2
