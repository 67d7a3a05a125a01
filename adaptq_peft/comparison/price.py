"""What a study will take: one step of each kind of training and a little evaluation are timed, the rest is counted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..preservation.documents import measure_documents
from .measure import Measurements
from .records import Run
from .settings import StudySettings
from .training import num_steps

#: `fit_to_budget` in forward passes over the validation text: up to 7 points on half the general text and the domain,
#: 3 gradients there at 3 passes each, 4 candidates and the quantized base on the other half, and the domain twice.
GENERAL_PASSES_OF_A_BUDGET, DOMAIN_PASSES_OF_A_BUDGET = 10.5, 18.0


@dataclass(frozen=True)
class Price:
    """Seconds of one kind of training.

    Args:
        build: loading and preparing a model.
        step: an optimizer step.
    """

    build: float
    step: float


@dataclass(frozen=True)
class Estimate:
    """What is left of a study.

    Args:
        trainings: how many.
        runs: how many results they give.
        hours: how long all takes.
        by_method: hours of the trainings that are counted under the name of their first method.
    """

    trainings: int
    runs: int
    hours: float
    by_method: dict[str, float]


def seconds_a_token(measurements: Measurements) -> float:
    """Seconds that evaluating a token takes, timed on a few windows of the test text with the base."""
    reference, model = measurements.test, measurements.load()
    documents = reference.general.subset(range(min(2, reference.general.num_documents)))
    start = time.perf_counter()
    losses = measure_documents(model, documents, batch_size=reference.batch_size)
    return (time.perf_counter() - start) / int(losses.num_tokens.sum())


def estimate(
    groups: Iterable[Sequence[Run]], prices: Mapping[str, Price], a_token: float, settings: StudySettings
) -> Estimate:
    """Add up the price of trainings and of measuring their results.

    Args:
        groups: runs that share a training.
        prices: of each kind of training, by `Method.training`.
        a_token: seconds that evaluating a token takes.
        settings: of the study.
    """
    by_method: dict[str, float] = {}
    trainings = results = 0
    prepared: set[tuple[str, int, int] | None] = set()
    for runs in groups:
        method, untrained = runs[0].method, runs[0].untrained
        price = prices[method.training]
        seconds = num_steps(runs[0].samples, method, settings) * price.step
        if untrained is None or untrained not in prepared:
            seconds += price.build
            prepared.add(untrained)
        seconds += sum(_tokens(run, settings) for run in runs) * a_token
        by_method[method.name] = by_method.get(method.name, 0.0) + seconds / 3600
        trainings, results = trainings + 1, results + len(runs)
    return Estimate(trainings, results, sum(by_method.values()), by_method)


def _tokens(run: Run, settings: StudySettings) -> float:
    """Tokens that measuring a run takes: validation, test and scales on both texts, and a budget."""
    validation, test = settings.validation_tokens, settings.evaluation_tokens
    scaled = len(settings.scales) if run.method.is_scaled else 0
    fitted = GENERAL_PASSES_OF_A_BUDGET + DOMAIN_PASSES_OF_A_BUDGET if run.method.finish == "budget" else 0.0
    return 2 * validation + 2 * (1 + scaled) * test + fitted * validation
