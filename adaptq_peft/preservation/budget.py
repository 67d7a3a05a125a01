"""Holds a trained adapter to a budget: weakens its deltas until little enough is forgotten.

Interpolation towards the base, W0 + factor * delta, trades what was learned for what was known (WiSE-FT, Wortsman et
al. 2022), and factors of their own for the layers trade better (Lin et al. 2023, arXiv 2309.06256), as does RegMean
(Jin et al. 2022, arXiv 2212.09849) between the base and what was trained: see `shrinkage`. Here factors and shrinkage
are chosen on one half of the general documents and on domain text, and certified on the other half. A few candidates
are certified at once, by bounds that hold for all of them, so picking one that passes keeps the confidence, whatever
the order and although degradation need not rise with the factor (the "learn then test" scheme, Angelopoulos et al.
2021, arXiv 2110.01052, with a joint bound for the multiple tests).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict
from torch import nn
from tqdm.auto import tqdm

from ..artifacts.certified_deltas import certified_state
from ..config import AdaptQConfig
from .block_scales import BlockScales
from .bounds import MIN_DOCUMENTS, degradation_of, upper_bounds
from .budget_search import Point, Setting, candidates, most_settings, search
from .delta_shrinkage import DeltaShrinkage
from .documents import DocumentLosses, Documents, check_finite, measure_documents
from .forgetting import BaseReference, measure_domain, measure_quantized, resolve_reference
from .original_model import unwrapped
from .report import ForgettingReport, TextComparison

#: Half of the general documents choose, half certify.
MIN_GENERAL_DOCUMENTS = 2 * MIN_DOCUMENTS
#: Families of settings; see `fit_to_budget`.
FAMILIES = ("scales", "shrinkage")


def fit_to_budget(
    model: nn.Module,
    general: Iterable[str | Mapping[str, Any]] | None = None,
    domain: Iterable[str | Mapping[str, Any]] | None = None,
    budget: float = 0.05,
    confidence: float = 0.95,
    *,
    base: BaseReference | nn.Module | None = None,
    seed: int = 0,
    family: str = "scales",
    **options: Any,
) -> ForgettingReport:
    """Weaken an adapter's deltas until general text gets no more than `budget` worse.

    Of all settings that hold the budget it looks for that with the least loss on `domain`. It is written into the
    deltas, so it is saved, loaded and merged with them. If none holds the budget, the adapter is left as it was, bit
    for bit, and the report is on the setting that came closest and says what to do.

    Args:
        model: a `PeftModel` with one active adapter, of ADAPTQ, LoRA, AdaLoRA, SHiRA, LoHa, LoKr or RandLoRA. DoRA is
            refused: its weight is not linear in anything that is trained.
        general: general documents, 16 or more, better 64; half of them choose, half certify. The certificate holds if
            they had no part in the training: they are not the anchor's texts, nor those that stopped training or chose
            a checkpoint.
        domain: domain documents that were not trained on.
        budget: allowed degradation: 0.05 allows 5% more perplexity on general text than the 16-bit base has.
        confidence: of the upper bound that must be within the budget. Default 0.95.
        base: as in `measure_forgetting`; with a `BaseReference`, which must have domain text, no texts are given here.
        seed: of the halves and the bootstrap.
        family: what a setting is. "scales" (default): a factor from 0 to 1 on the deltas of each block. "shrinkage":
            those, after each linear's delta has been shrunk by the second moments of its inputs on both texts (see
            `DeltaShrinkage`, also for the memory it takes), by one lambda; 0, which is no shrinkage, is tried, too.
            Only for ADAPTQ, LoRA and AdaLoRA.
        options: of `BaseReference.of`: `tokenizer`, `max_length`, `stride`, `max_tokens`, `batch_size`, `top_k`.

    Returns:
        A report on the documents that certify. An ADAPTQ adapter that holds the budget gets its figures as
        `config.certificate`, and they are printed in its model card, with a sample of the deltas that they hold for:
        if it is trained on, the card does not state them, and loading drops them with a warning.

    Raises:
        ValueError: if there are too few documents or no domain text, the base can't be had, the adapter can't be
            scaled, or `family` is unknown or "shrinkage" where blocks can't be run one by one.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; allowed: {list(FAMILIES)}")
    if torch.is_inference_mode_enabled():
        raise ValueError("fit_to_budget takes derivatives; call it outside of torch.inference_mode()")
    model = unwrapped(model)
    scales = BlockScales(model)
    reference = resolve_reference(model, general, domain, base, options)
    _check(reference, budget)
    kept, most = False, most_settings(shrinks=family == "shrinkage")
    with tqdm(total=most, desc="Holding to the budget", unit="setting", delay=2) as progress:
        fit = _Fit(model, scales, reference, math.log1p(budget), confidence, seed, family, progress)
        try:
            chosen, report = fit.certify(fit.search(), budget)
            if report.feasible:
                fit.keep(chosen)
                kept = True
        finally:
            if not kept:
                fit.undo()
    config = model.peft_config[scales.adapter]  # type: ignore[union-attr, index]
    if isinstance(config, AdaptQConfig) and report.feasible:
        tensors = get_peft_model_state_dict(model, adapter_name=scales.adapter, save_embedding_layers=False)
        config.certificate = {**report.certificate(), **certified_state(vars(config), tensors)}
    return report


class _Fit:
    """The steps of `fit_to_budget`; `limit` is the budget in nats a token."""

    def __init__(
        self,
        model: nn.Module,
        scales: BlockScales,
        reference: BaseReference,
        limit: float,
        confidence: float,
        seed: int,
        family: str,
        progress: tqdm[Any],
    ) -> None:
        assert reference.domain is not None
        self._progress = progress
        self._model, self._scales, self._reference, self._family = model, scales, reference, family
        self._limit, self._confidence, self._seed = limit, confidence, seed
        order = np.random.default_rng(seed).permutation(reference.general.num_documents).tolist()
        self._choosing, self._certifying = order[: len(order) // 2], order[len(order) // 2 :]
        self._shrinkage: DeltaShrinkage | None = None
        self._strength = 0.0
        if family == "shrinkage":
            general = reference.general.subset(self._choosing)
            self._shrinkage = DeltaShrinkage(model, reference.domain, general, reference.batch_size)

    def search(self) -> list[Point]:
        """All settings that were tried: [-1] is the best, and others may be safer."""
        blocks = len(self._scales.blocks)
        return search(self._evaluate, self._slopes, blocks, self._limit, self._shrinkage is not None)

    def certify(self, points: list[Point], budget: float) -> tuple[Setting, ForgettingReport]:
        """Bound candidates from the best setting to the safest, jointly, and take the first within the limit."""
        settings = candidates(points)
        documents = self._reference.general.subset(self._certifying)
        base = self._reference.general_losses.subset(self._certifying)
        self._progress.total = self._progress.n + len(settings)
        losses = []
        for setting in settings:
            losses.append(self._measure(setting, documents))
            self._progress.update()
        differences = np.stack([candidate.nll - base.nll for candidate in losses])
        bounds = upper_bounds(differences, base.num_tokens, self._confidence, self._seed)
        passed = np.flatnonzero(bounds <= self._limit)
        index = int(passed[0]) if len(passed) else int(bounds.argmin())
        quantized = measure_quantized(self._model, documents, base, self._reference.batch_size)
        general = TextComparison(base, quantized, losses[index])
        report = self._report(settings[index], general, float(bounds[index]), budget, bool(len(passed)))
        return settings[index], report

    def keep(self, setting: Setting) -> None:
        """Write a setting into the adapter."""
        self._apply(setting)
        self._scales.fold(setting.factors)

    def undo(self) -> None:
        """Put the adapter back as it was trained, exactly: from stored values, whatever has been written by now."""
        self._strength = math.nan
        self._apply(Setting(np.ones(len(self._scales.blocks))))

    def _apply(self, setting: Setting) -> None:
        if self._shrinkage is not None and setting.strength != self._strength:
            self._strength = math.nan  # until all is written
            self._scales.set(1.0)
            self._shrinkage.set(setting.strength)
            self._scales.take_as_trained()
            self._strength = setting.strength
        self._scales.set(setting.factors)

    def _report(
        self, setting: Setting, general: TextComparison, bound: float, budget: float, feasible: bool
    ) -> ForgettingReport:
        reference = self._reference
        assert reference.domain is not None
        assert reference.domain_losses is not None
        size = reference.batch_size
        quantized = measure_quantized(self._model, reference.domain, reference.domain_losses, size)
        self._apply(setting)
        adapted, kl = measure_domain(self._model, reference)
        return ForgettingReport(
            general=general,
            domain=TextComparison(reference.domain_losses, quantized, adapted),
            domain_kl=kl,
            confidence=self._confidence,
            upper_bound=degradation_of(bound),
            budget=budget,
            feasible=feasible,
            family=self._family,
            shrinkage=None if self._shrinkage is None else float(setting.strength),
            scales={block: float(f) for block, f in zip(self._scales.blocks, setting.factors, strict=True)},
            note="" if feasible else _way_out(general, budget, self._scales.unscaled),
        )

    def _evaluate(self, setting: Setting) -> Point:
        general = self._measure(setting, self._reference.general.subset(self._choosing))
        base = self._reference.general_losses.subset(self._choosing)
        bound = upper_bounds((general.nll - base.nll)[None], base.num_tokens, self._confidence, self._seed)[0]
        assert self._reference.domain is not None
        domain = self._measure(setting, self._reference.domain).total
        self._progress.update()
        return Point(setting, float(bound), domain.nll / domain.num_tokens)

    def _measure(self, setting: Setting, documents: Documents) -> DocumentLosses:
        self._apply(setting)
        losses = measure_documents(self._model, documents, batch_size=self._reference.batch_size)
        check_finite(losses, "adapted model")
        return losses

    def _slopes(self, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
        """d loss / d factor on the domain and on general text, each [blocks]."""
        assert self._reference.domain is not None
        self._apply(setting)
        size, general = self._reference.batch_size, self._reference.general.subset(self._choosing)
        domain = self._scales.gradient(setting.factors, self._reference.domain, size)
        return domain, self._scales.gradient(setting.factors, general, size)


def _way_out(general: TextComparison, budget: float, unscaled: list[str]) -> str:
    if general.degradation <= budget:
        return (
            f"The mean is within the budget, but {len(general.base.nll)} documents are too few to show it with this "
            "confidence. Pass more general documents. The adapter was left as it was."
        )
    if general.quantization > max(budget, 0):
        return (
            f"Quantizing alone costs {general.quantization:+.1%}, which no scale takes back. Quantize fewer blocks (a "
            'higher selection_ratio) or less (quantization="int8" or "none"), or train with an anchor on general '
            "text, which repairs some of it. The adapter was left as it was."
        )
    others = f" No factor weakens what is trained whole or outside of the blocks: {unscaled}." if unscaled else ""
    way_out = f"Train anew with a lower rate, fewer steps, or an anchor on general text.{others}"
    return f"{way_out} The adapter was left as it was."


def _check(reference: BaseReference, budget: float) -> None:
    if reference.domain is None:
        raise ValueError("there is no domain text to keep the gain on; pass domain=..., or a BaseReference with it")
    if not budget > -1:
        raise ValueError(f"budget is {budget}; allowed: a fraction above -1, such as 0.05 for 5%")
    if reference.general.num_documents < MIN_GENERAL_DOCUMENTS:
        raise ValueError(
            f"there are {reference.general.num_documents} general documents; half choose and half certify, so at "
            f"least {MIN_GENERAL_DOCUMENTS} are needed, and 64 or more are better"
        )
