"""The callback: its figures are in the log, the metrics and the trackers, and a passed budget stops training."""

from __future__ import annotations

import pytest
from support import randomize
from transformers import Trainer, TrainerCallback, TrainingArguments

from adaptq_peft import BaseReference, ForgettingCallback, measure_forgetting


class Tracker(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.fixture
def run(adapt, load, general, domain, tokenizer, tmp_path):
    def build(budget=None, std=0.0, lr=1e-3):
        samples = [{**tokenizer(text), "labels": tokenizer(text)["input_ids"]} for text in domain]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=1, max_steps=4, eval_strategy="steps",
            eval_steps=2, learning_rate=lr, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
            per_device_eval_batch_size=1,
        )  # fmt: skip
        reference = BaseReference.of(load(), general, domain, tokenizer=tokenizer)
        model, tracker = adapt(std=std), Tracker()
        randomize(model, std=std)
        trainer = Trainer(model, arguments, train_dataset=samples, eval_dataset=samples[:2], callbacks=[tracker])
        trainer.add_callback(ForgettingCallback(trainer, reference, budget=budget))
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
    trainer, _, _ = run()
    trainer.state.global_step += 1
    assert trainer.evaluate()["eval_general_perplexity"] > 1


def test_training_stops_where_the_budget_is_passed(run):
    trainer, _, _ = run(budget=0.0, std=0.3)
    assert trainer.state.global_step == 2


def test_training_goes_on_within_the_budget(run):
    trainer, _, _ = run(budget=1e6)
    assert trainer.state.global_step == 4
