"""One training of a method, and the results of all methods that share it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from ..config import AdaptQConfig
from ..demo.training import StepReport, train
from ..evaluation import describe_environment
from ..preservation import PreservationCallback, fit_to_budget
from ..preservation.documents import LossNotFiniteError
from .measure import Load, Measurements, finite, report_figures, training_memory
from .methods import Inputs, Method, quantize_lower_blocks
from .records import Record, Run
from .settings import StudySettings
from .untrained import UntrainedAdapters

Windows = list[dict[str, torch.Tensor]]
#: "the same half" of `lora-quantize`, as in `quantize-lora` and ADAPT-Q-50.
QUANTIZED_SHARE = 0.5


@dataclass
class Trained:
    """A model after its training.

    Args:
        model: the model.
        memory: bytes of training it; see `training_memory`.
        losses: of each step, nats a token.
        seconds: "build", "train", "step" (the median), and what is added later.
    """

    model: nn.Module
    memory: dict[str, int]
    losses: list[float]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note the wall time of a part."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def draw_samples(windows: Windows, count: int, seed: int) -> Windows:
    """`count` training samples; with one seed fewer are the first of more.

    Raises:
        ValueError: if there are too few windows.
    """
    if count > len(windows):
        raise ValueError(
            f"N={count} training samples are asked for, and the domain's training text has {len(windows)}; give more "
            "text, a smaller N or a smaller length"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return [windows[index] for index in order[:count].tolist()]


def num_steps(samples: int, method: Method, settings: StudySettings) -> int:
    """Optimizer steps of a run: each epoch ends with a smaller step where the sizes do not divide."""
    batches = -(-samples // settings.batch_size)
    return settings.epochs * -(-batches // method.accumulation) if method.is_trained else 0


def train_run(
    run: Run,
    load: Load,
    windows: Windows,
    measurements: Measurements,
    settings: StudySettings,
    on_step: StepReport,
    untrained: UntrainedAdapters,
    steps: int | None = None,
) -> Trained:
    """Prepare and train a model.

    Args:
        run: which.
        load: loads the base anew.
        windows: all training samples there are.
        measurements: of the study; has what the anchor needs.
        settings: of the study.
        on_step: called after each step.
        untrained: of the study; prepares the model.
        steps: `None`: all steps of the run.
    """
    set_seed(run.seed)
    samples = draw_samples(windows, run.samples, run.seed)
    anchors = _anchors(run, measurements)
    base = load()
    autocast = base.dtype if run.method.autocast and base.dtype != torch.float32 else None
    lists = [{"input_ids": sample["input_ids"].tolist()} for sample in samples]
    general = measurements.general_samples if samples and run.method.has_general_text else []
    inputs = Inputs(lists, general, run.seed)
    model, seconds = untrained.prepare(run, base, inputs)
    trained = Trained(model, training_memory(model), [], {"build": seconds})
    steps = num_steps(run.samples, run.method, settings) if steps is None else steps
    if steps and run.method.is_trained:
        timer = _StepTimer()
        with trained.timed("train"):
            trained.losses = train(
                model,
                samples,
                steps=steps,
                learning_rate=run.rate,
                batch_size=settings.batch_size,
                seed=run.seed,
                on_step=on_step,
                accumulation=run.method.accumulation,
                weight_decay=settings.weight_decay,
                autocast=autocast,
                callbacks=[timer, *anchors],
            )
        trained.seconds["step"] = statistics.median(timer.seconds[1:] or timer.seconds)
    return trained


def results(
    trained: Trained,
    runs: Sequence[Run],
    load: Load,
    measurements: Measurements,
    settings: StudySettings,
    save: Callable[[Run, nn.Module], None],
) -> Iterator[tuple[Run, Record]]:
    """Finish and measure a trained model as each of the runs that share its training asks.

    Args:
        trained: the model. The last finish changes it for good.
        runs: in any order; they are finished in that of `_FINISHES`.
        load, measurements, settings: of the study.
        save: called with each run and its finished model, before the record is there.
    """
    ordered = sorted(runs, key=lambda run: list(_FINISHES).index(run.method.finish))
    for run in ordered:
        if not all(map(math.isfinite, trained.losses)):
            yield run, {**_about(trained), **_DIVERGED}
            continue
        kept = _copies(trained.model) if run.method.finish and run is not ordered[-1] else {}
        try:
            with trained.timed("finish"):
                model, untrained, about = _FINISHES[run.method.finish](trained.model, load, measurements, settings)
        except LossNotFiniteError:  # the last step may have broken it, after its loss
            yield run, {**_about(trained), **_DIVERGED}
            continue
        with trained.timed("evaluation"):
            record = _measure(model, untrained, measurements)
        if run.method.is_scaled:
            record["scaled"] = measurements.scaled(model)
        save(run, model)
        for parameter, value in kept.items():
            parameter.data.copy_(value)
        yield run, {**_about(trained), "finish": about, **record}


_DIVERGED: Record = {
    "validation": {"domain": None, "general": None},
    "test": None,
    "failure": "its loss is not a finite number",
}


def _measure(model: nn.Module, untrained: nn.Module | None, measurements: Measurements) -> Record:
    report = measurements.report(model, untrained)
    if report is None:
        return dict(_DIVERGED)
    return {"validation": measurements.validation(model), "test": report_figures(report), "failure": None}


def _copies(model: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    return {parameter: parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad}


def _about(trained: Trained) -> Record:
    return {
        "environment": describe_environment(),
        "memory": trained.memory,
        "seconds": dict(trained.seconds),
        "losses": [finite(loss) for loss in trained.losses],
        "blocks": _adapted_blocks(trained.model),
    }


Finished = tuple[nn.Module, nn.Module | None, dict[str, Any]]
"""The model, the quantized base where switching adapters off does not give it, and what is to be known."""


def _as_it_is(model: nn.Module, load: Load, measurements: Measurements, settings: StudySettings) -> Finished:
    return model, None, {}


def _hold_to_budget(model: nn.Module, load: Load, measurements: Measurements, settings: StudySettings) -> Finished:
    report = fit_to_budget(model, base=measurements.valid, budget=settings.budget)
    return model, None, {**report.certificate(), "feasible": bool(report.feasible), "note": report.note}


def _merge_and_quantize(model: Any, load: Load, measurements: Measurements, settings: StudySettings) -> Finished:
    merged, untrained = model.merge_and_unload(), load()
    for each in (merged, untrained):
        quantize_lower_blocks(each, QUANTIZED_SHARE)
    return merged, untrained, {}


#: In the order in which the methods of one training are finished: merging takes the adapter away.
_FINISHES: dict[str, Callable[..., Finished]] = {
    "": _as_it_is,
    "budget": _hold_to_budget,
    "quantize": _merge_and_quantize,
}


def _anchors(run: Run, measurements: Measurements) -> list[PreservationCallback]:
    """The anchor of the run's method, or none."""
    kind = run.method.anchor
    if not kind:
        return []
    answers = measurements.answers_on_general if run.method.has_general_text else measurements.answers_on_written
    return [PreservationCallback(answers, seed=run.seed, one_sided=kind.endswith("one-sided"))]


def _adapted_blocks(model: nn.Module) -> list[int] | None:
    config = model.peft_config["default"] if isinstance(model, PeftModel) else None
    return list(config.layers_to_transform) if isinstance(config, AdaptQConfig) else None  # type: ignore[arg-type]


class _StepTimer(TrainerCallback):
    """Wall time of each optimizer step, with what other callbacks do in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds.append(time.perf_counter() - self._start)
