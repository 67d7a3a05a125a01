"""Forgetting measured while a model trains, logged beside the loss, and training stopped where it passes a budget."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..evaluation import degradation
from .documents import DocumentLosses, measure_documents
from .forgetting import BaseReference, measure_domain, measure_quantized
from .original_model import unwrapped
from .report import TextComparison

if TYPE_CHECKING:
    from transformers import Trainer

#: What is logged; the lower, the better.
METRICS = (
    "eval_general_perplexity",
    "eval_general_degradation",
    "eval_general_upper_bound",
    "eval_domain_perplexity",
    "eval_domain_change",
    "eval_domain_kl",
)


class ForgettingCallback(TrainerCallback):
    """At each evaluation logs general perplexity, degradation and KL through `trainer.log`, so every tracker has them.

    `trainer.add_callback(ForgettingCallback(trainer, reference))`, for transformers' `Trainer`, TRL's trainers, and
    any PEFT method. A callback is not told its trainer, so it is given one, as TRL's are. Logged are
    `eval_general_perplexity`, `eval_general_degradation`, `eval_general_upper_bound` and, if the reference has domain
    text, `eval_domain_perplexity`, `eval_domain_change` and `eval_domain_kl`. They are in the metrics of the
    evaluation too, so each can be `metric_for_best_model`, with `greater_is_better=False`; an `EarlyStoppingCallback`
    is then added after this one.

    Args:
        trainer: the trainer that it is added to.
        reference: what the 16-bit base predicts, made before `get_peft_model`. `fit_to_budget` needs other general
            documents than those by which training is stopped or a checkpoint chosen.
        budget: training stops where the degradation is above this fraction, or is not a number. Where quantization
            alone has spent it, training stops where it makes that worse. `None` (default): never.
        confidence: of the logged upper bound. Default 0.95.

    Raises:
        ValueError: when training begins, if these figures choose the best model and `greater_is_better` is True, or an
            `EarlyStoppingCallback` comes before.
    """

    def __init__(
        self, trainer: Trainer, reference: BaseReference, budget: float | None = None, confidence: float = 0.95
    ) -> None:
        self._trainer = trainer
        self._reference = reference
        self._budget = budget
        self._confidence = confidence
        self._quantized: DocumentLosses | None = None
        self._is_training = False
        self._logged: dict[str, float] | None = None  # at this step of training,
        self._sets: set[frozenset[str]] = set()  # for these evaluation sets, told apart by their metrics

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start anew, and say where settings keep the figures from being measured or used."""
        self._is_training, self._logged = True, None
        if args.eval_strategy == "no":
            lost = "" if self._budget is None else ", and the budget stops nothing"
            warnings.warn(
                f'eval_strategy is "no", so ForgettingCallback measures nothing while the model trains{lost}; give '
                'eval_strategy="steps" (or "epoch") and an eval_dataset',
                stacklevel=2,
            )
        self._check_choice_of_the_best(args)

    def _check_choice_of_the_best(self, args: TrainingArguments) -> None:
        """Refuse settings that would choose the worst model, or look for the figures before they are there."""
        metric = "eval_" + (args.metric_for_best_model or "").removeprefix("eval_")
        if metric not in METRICS:
            return
        if args.greater_is_better:
            raise ValueError(
                f"metric_for_best_model={metric!r} is better the lower it is, and greater_is_better is True (the "
                "default for names that don't end in 'loss'); pass greater_is_better=False"
            )
        before = self._trainer.callback_handler.callbacks
        before = before[: before.index(self)]
        if any(isinstance(callback, EarlyStoppingCallback) for callback in before):
            raise ValueError(
                f"EarlyStoppingCallback comes before ForgettingCallback, so it never sees {metric!r}; add it after "
                "that: trainer.add_callback(EarlyStoppingCallback(...))"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on each evaluation is measured: weights may change in ways that count no steps."""
        self._is_training, self._logged = False, None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What was measured is of other weights."""
        self._logged = None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        evaluated = frozenset(metrics or ())
        # Several evaluation sets: one event for each. One that comes again is another evaluation.
        if self._logged is not None and metrics is not None and evaluated not in self._sets:
            self._sets.add(evaluated)
            metrics.update(self._logged)
            return
        model = unwrapped(self._trainer.model)  # type: ignore[arg-type]
        general = self._measure_general(model)
        logs = {
            "eval_general_perplexity": general.adapted.total.value,
            "eval_general_degradation": general.degradation,
            "eval_general_upper_bound": general.upper_bound(self._confidence),
            **self._measure_domain(model),
        }
        self._logged, self._sets = logs if self._is_training else None, {evaluated}
        if metrics is not None:
            metrics.update(logs)
        self._trainer.log(dict(logs))  # TRL's trainers add to it
        if self._budget is None or general.degradation <= max(self._budget, general.quantization):
            return
        control.should_training_stop = True
        if math.isnan(general.degradation):
            warnings.warn(
                f"the loss on general text is not a number after step {state.global_step}: the training has diverged "
                "and is stopped; lower the learning rate",
                stacklevel=2,
            )

    def _measure_general(self, model: nn.Module) -> TextComparison:
        documents, base, size = self._reference.general, self._reference.general_losses, self._reference.batch_size
        if self._quantized is None:  # does not change while the adapter trains
            self._quantized = measure_quantized(model, documents, base, size)
        return TextComparison(base, self._quantized, measure_documents(model, documents, batch_size=size))

    def _measure_domain(self, model: nn.Module) -> dict[str, float]:
        if self._reference.domain is None or self._reference.domain_losses is None:
            return {}
        losses, kl = measure_domain(model, self._reference)
        change = degradation(losses.total, self._reference.domain_losses.total)
        return {"eval_domain_perplexity": losses.total.value, "eval_domain_change": change, "eval_domain_kl": kl}
