"""What is measured of a model in a study, against the 16-bit base; all that the base has to be asked is asked once."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..demo.training import training_windows
from ..evaluation import measure_method
from ..preservation import BaseReference
from ..preservation.block_scales import BlockScales
from ..preservation.documents import DocumentLosses, measure_documents
from ..preservation.forgetting import measure_domain, measure_quantized
from ..preservation.report import ForgettingReport, TextComparison
from ..preservation.teacher import BaseAnswers
from ..quantization import is_quantized
from .settings import StudySettings
from .texts import StudyTexts, cut_documents

Load = Callable[[], PreTrainedModel]
CONFIDENCE = 0.95


class Measurements:
    """Measures models on the texts of a study.

    Args:
        load: loads the base anew.
        tokenizer: the base's.
        texts: of the study.
        settings: of the study.
    """

    def __init__(
        self, load: Load, tokenizer: PreTrainedTokenizerBase, texts: StudyTexts, settings: StudySettings
    ) -> None:
        self.load, self._tokenizer, self._texts, self._settings = load, tokenizer, texts, settings
        self._quantized: dict[int, tuple[DocumentLosses, DocumentLosses]] = {}

    @cached_property
    def test(self) -> BaseReference:
        """What the base predicts on the test texts."""
        tokens = self._settings.evaluation_tokens
        return self._reference(self._texts.general_test, self._texts.domain_test, tokens)

    @cached_property
    def valid(self) -> BaseReference:
        """What the base predicts on the validation texts."""
        tokens = self._settings.validation_tokens
        return self._reference(self._texts.general_valid, self._texts.domain_valid, tokens)

    @cached_property
    def general_samples(self) -> list[dict[str, list[int]]]:
        """General training text, in samples as the domain's."""
        windows = training_windows(self._tokenizer, self._texts.general_train, self._settings.length)
        return [{"input_ids": window["input_ids"].tolist()} for window in windows]

    @cached_property
    def answers_on_general(self) -> BaseAnswers:
        """What the base answers on general training text."""
        return self._answers(self.general_samples)

    @cached_property
    def answers_on_written(self) -> BaseAnswers:
        """What the base answers on text that it writes itself."""
        return self._answers(None)

    def validation(self, model: nn.Module) -> dict[str, float | None]:
        """Perplexities on the validation texts, "domain" and "general"; `None` where one is not finite."""
        return _perplexities(model, self.valid)

    def report(self, model: nn.Module, untrained: nn.Module | None = None) -> ForgettingReport | None:
        """The model against the base on the test texts; `None` if one of its losses is not finite.

        Args:
            model: as it was trained.
            untrained: the base, quantized as the model is, if switching the model's adapters off does not give that.
        """
        reference = self.test
        general_losses = measure_documents(model, reference.general, batch_size=reference.batch_size)
        domain_losses, kl = measure_domain(model, reference)
        if not all(math.isfinite(losses.total.nll) for losses in (general_losses, domain_losses)):
            return None
        quantized_general, quantized_domain = self._quantized_base(untrained or model)
        assert reference.domain_losses is not None
        general = TextComparison(reference.general_losses, quantized_general, general_losses)
        domain = TextComparison(reference.domain_losses, quantized_domain, domain_losses)
        return ForgettingReport(general, domain, kl, CONFIDENCE, general.upper_bound(CONFIDENCE))

    def scaled(self, model: nn.Module) -> dict[str, dict[str, float | None]]:
        """Test perplexities with the trained change multiplied by each of the settings' `scales`.

        Args:
            model: with an adapter that `BlockScales` takes, or with all weights trained.
        """
        if not self._settings.scales:
            return {}
        change, found = self._trained_change(model), {}
        for factor in self._settings.scales:
            change(factor)
            found[f"{factor:g}"] = _perplexities(model, self.test)
        change(1.0)
        return found

    def _trained_change(self, model: nn.Module) -> Callable[[float], None]:
        """What multiplies the trained change of a model by a factor."""
        if not isinstance(model, PeftModel):
            return _interpolation(self.load(), model)
        return BlockScales(model).set

    def _quantized_base(self, model: nn.Module) -> tuple[DocumentLosses, DocumentLosses]:
        """Losses of the quantized base on general and domain text; the same for all runs that quantize alike."""
        key, reference = _codes(model), self.test
        if key not in self._quantized:
            assert reference.domain is not None
            assert reference.domain_losses is not None
            pairs = ((reference.general, reference.general_losses), (reference.domain, reference.domain_losses))
            first, second = (measure_quantized(model, part, base, reference.batch_size) for part, base in pairs)
            self._quantized[key] = first, second
        return self._quantized[key]

    def _reference(self, general: list[str], domain: list[str], tokens: int) -> BaseReference:
        cut = (cut_documents(self._tokenizer, documents, tokens) for documents in (general, domain))
        length = self._settings.max_length
        return BaseReference.of(self.load(), *cut, tokenizer=self._tokenizer, max_length=length)

    def _answers(self, samples: list[dict[str, list[int]]] | None) -> BaseAnswers:
        chosen = self._settings
        reading: dict[str, Any] = {"samples": chosen.anchor_samples, "max_length": chosen.length}
        return BaseAnswers.of(self.load(), samples, self._tokenizer, **reading)


def report_figures(report: ForgettingReport) -> dict[str, Any]:
    """A report as JSON types, with the losses of each document."""
    assert report.domain is not None
    return {
        "general": {
            **report.general.perplexities(),
            "degradation": report.degradation,
            "quantization": report.quantization,
            "training": report.training,
            "upper_bound": finite(report.upper_bound),
            "documents": _documents(report.general),
        },
        "domain": {
            **report.domain.perplexities(),
            "change": report.domain.degradation,
            "documents": _documents(report.domain),
        },
        "domain_kl": report.domain_kl,
    }


def training_memory(model: nn.Module) -> dict[str, int]:
    """Bytes of training with 8-bit optimizer states, without activations, over a 16-bit base.

    Frozen parameters in float32, as they are where a CPU computes faster in it, count 2 bytes each.
    """
    measured = measure_method(model)
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad and p.dtype == torch.float32}
    weights = measured.weights.total - sum(2 * parameter.numel() for parameter in frozen.values())
    states = measured.optimizer_states["adamw_bnb_8bit"]
    return {
        "trained_parameters": measured.trained_parameters,
        "weights": weights,
        "gradients": measured.gradients,
        "optimizer_states": states,
        "total": weights + measured.gradients + states,
    }


def finite(value: float) -> float | None:
    """The value, or `None` for what JSON has no number for."""
    return value if math.isfinite(value) else None


def _interpolation(base: nn.Module, model: nn.Module) -> Callable[[float], None]:
    """Sets all weights to base + factor * (trained - base): WiSE-FT (arXiv 2109.01903). Holds a copy of both."""
    originals = dict(base.named_parameters())
    weights = [(own, originals[name].to(own), own.detach().clone()) for name, own in model.named_parameters()]

    @torch.no_grad()
    def change(factor: float) -> None:
        for own, original, trained in weights:
            torch.lerp(original, trained, factor, out=own)

    return change


def _perplexities(model: nn.Module, reference: BaseReference) -> dict[str, float | None]:
    assert reference.domain is not None
    documents, size = {"domain": reference.domain, "general": reference.general}, reference.batch_size
    return {n: finite(measure_documents(model, part, batch_size=size).total.value) for n, part in documents.items()}


def _codes(model: nn.Module) -> int:
    """A checksum of the codes of all quantized linears."""
    checksum = 0
    for name, module in model.named_modules():
        if is_quantized(module):
            codes = module.get_parameter("weight").detach().cpu().contiguous().view(torch.uint8).numpy()
            checksum = zlib.crc32(codes.tobytes(), zlib.crc32(name.split(".")[-1].encode(), checksum))
    return checksum


def _documents(text: TextComparison) -> dict[str, list[float]]:
    stages = {"base": text.base, "quantized": text.quantized, "adapted": text.adapted}
    nll = {stage: losses.nll.round(4).tolist() for stage, losses in stages.items()}
    return {"num_tokens": text.base.num_tokens.tolist(), **nll}
