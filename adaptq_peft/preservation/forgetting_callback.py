"""Forgetting measured while a model trains, logged beside the loss, and training stopped where it passes a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..evaluation import degradation
from .documents import DocumentLosses, measure_documents
from .forgetting import BaseReference, measure_domain, measure_quantized
from .report import TextComparison

if TYPE_CHECKING:
    from transformers import Trainer


class ForgettingCallback(TrainerCallback):
    """At each evaluation logs general perplexity, degradation and KL through `trainer.log`, so every tracker has them.

    `trainer.add_callback(ForgettingCallback(trainer, reference))`, for transformers' `Trainer`, TRL's trainers, and
    any PEFT method. A callback is not told its trainer, so it is given one, as TRL's are. Logged are
    `eval_general_perplexity`, `eval_general_degradation`, `eval_general_upper_bound` and, if the reference has domain
    text, `eval_domain_perplexity`, `eval_domain_change` and `eval_domain_kl`. They are in the metrics of the
    evaluation too, so each can be `metric_for_best_model`.

    Args:
        trainer: the trainer that it is added to.
        reference: what the 16-bit base predicts, made before `get_peft_model`.
        budget: training stops where the degradation is above this fraction. Where quantization alone has spent it,
            training stops where it makes that worse. `None` (default): never.
        confidence: of the logged upper bound. Default 0.95.
    """

    def __init__(
        self, trainer: Trainer, reference: BaseReference, budget: float | None = None, confidence: float = 0.95
    ) -> None:
        self._trainer = trainer
        self._reference = reference
        self._budget = budget
        self._confidence = confidence
        self._quantized: DocumentLosses | None = None
        self._measured_at: int | None = None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._measured_at == state.global_step:  # several evaluation sets: one event for each
            return
        self._measured_at = state.global_step
        general = self._measure_general()
        logs = {
            "eval_general_perplexity": general.adapted.total.value,
            "eval_general_degradation": general.degradation,
            "eval_general_upper_bound": general.upper_bound(self._confidence),
            **self._measure_domain(),
        }
        if metrics is not None:
            metrics.update(logs)
        self._trainer.log(dict(logs))  # TRL's trainers add to it
        if self._budget is not None and general.degradation > max(self._budget, general.quantization):
            control.should_training_stop = True

    def _measure_general(self) -> TextComparison:
        model: Any = self._trainer.accelerator.unwrap_model(self._trainer.model)
        documents, base, size = self._reference.general, self._reference.general_losses, self._reference.batch_size
        if self._quantized is None:  # does not change while the adapter trains
            self._quantized = measure_quantized(model, documents, base, size)
        return TextComparison(base, self._quantized, measure_documents(model, documents, batch_size=size))

    def _measure_domain(self) -> dict[str, float]:
        if self._reference.domain is None or self._reference.domain_losses is None:
            return {}
        model: Any = self._trainer.accelerator.unwrap_model(self._trainer.model)
        losses, kl = measure_domain(model, self._reference)
        change = degradation(losses.total, self._reference.domain_losses.total)
        return {"eval_domain_perplexity": losses.total.value, "eval_domain_change": change, "eval_domain_kl": kl}
