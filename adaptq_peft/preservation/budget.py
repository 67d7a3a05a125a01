"""Holds a trained adapter to a budget: scales its deltas block by block until little enough is forgotten.

Interpolation towards the base, W0 + factor * delta, trades what was learned for what was known (WiSE-FT, Wortsman et
al. 2022), and factors of their own for the layers trade better (Lin et al. 2023, arXiv 2309.06256). Here the factors
are chosen on one half of the general documents and on domain text, and certified on the other half. A few candidates
are certified at once, by bounds that hold for all of them, so picking one that passes keeps the confidence, whatever
the order and although degradation need not rise with the factor (the "learn then test" scheme, Angelopoulos et al.
2021, arXiv 2110.01052, with a joint bound for the multiple tests).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..config import AdaptQConfig
from .block_scales import BlockScales
from .bounds import MIN_DOCUMENTS, degradation_of, upper_bounds
from .documents import DocumentLosses, Documents, check_finite, measure_documents
from .forgetting import BaseReference, measure_domain, measure_quantized, resolve_reference
from .report import ForgettingReport, TextComparison

#: Factors that are tried on all blocks together, first.
GLOBAL_FACTORS = (1.0, 0.7, 0.4, 0.0)
#: Steps block by block from the best of them: how many are tried, and the root mean square of the first.
STEPS, FIRST_STEP = 3, 0.2
#: Where candidates lie on the way from the best factors to the safest.
CANDIDATES = (0.0, 1 / 3, 2 / 3, 1.0)


@dataclass(frozen=True)
class _Point:
    """Factors and what they give on the text for choosing.

    Args:
        factors: [blocks].
        bound: upper confidence bound of the general rise, nats a token.
        domain: domain loss, nats a token.
    """

    factors: np.ndarray
    bound: float
    domain: float


def fit_to_budget(
    model: nn.Module,
    general: Sequence[str] | None = None,
    domain: Sequence[str] | None = None,
    budget: float = 0.05,
    confidence: float = 0.95,
    *,
    base: BaseReference | nn.Module | None = None,
    seed: int = 0,
    **options: Any,
) -> ForgettingReport:
    """Scale an adapter's deltas, block by block, so that general text gets no more than `budget` worse.

    Of all factors from 0 to 1 that hold the budget it looks for those with the least loss on `domain`. They are
    multiplied into the deltas, so they are saved, loaded and merged with them. If none holds the budget, the adapter
    is left as it was, and the report is on the factors that came closest and says what to do.

    Args:
        model: a `PeftModel` with one active adapter, of ADAPTQ or LoRA.
        general: general documents, 16 or more, better 64; half of them choose, half certify.
        domain: domain documents that were not trained on.
        budget: allowed degradation: 0.05 allows 5% more perplexity on general text than the 16-bit base has.
        confidence: of the upper bound that must be within the budget. Default 0.95.
        base: as in `measure_forgetting`; with a `BaseReference`, which must have domain text, no texts are given here.
        seed: of the halves and the bootstrap.
        options: of `BaseReference.of`: `tokenizer`, `max_length`, `stride`, `max_tokens`, `batch_size`, `top_k`.

    Returns:
        A report on the documents that certify. An ADAPTQ adapter that holds the budget gets its figures as
        `config.certificate`, and they are printed in its model card.

    Raises:
        ValueError: if there are too few documents or no domain text, the base can't be had, or the adapter can't be
            scaled.
    """
    scales = BlockScales(model)
    reference = resolve_reference(model, general, domain, base, options)
    _check(reference, budget)
    fit = _Fit(model, scales, reference, math.log1p(budget), confidence, seed)
    try:
        chosen, report = fit.certify(fit.search(), budget)
        if report.feasible:
            scales.fold(chosen)
    finally:
        scales.set(np.ones(len(scales.blocks)))
    config = model.peft_config[scales.adapter]  # type: ignore[union-attr, index]
    if isinstance(config, AdaptQConfig) and report.feasible:
        config.certificate = report.certificate()
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
    ) -> None:
        self._model, self._scales, self._reference = model, scales, reference
        self._limit, self._confidence, self._seed = limit, confidence, seed
        order = np.random.default_rng(seed).permutation(reference.general.num_documents).tolist()
        self._choosing, self._certifying = order[: len(order) // 2], order[len(order) // 2 :]

    def search(self) -> list[_Point]:
        """All factors that were tried: [-1] are the best, and others may be safer."""
        ones = np.ones(len(self._scales.blocks))
        points = [self._evaluate(factor * ones) for factor in GLOBAL_FACTORS]
        best, radius = min(points, key=self._rank), FIRST_STEP
        slopes = self._slopes(best)
        for step in range(STEPS):
            point = self._evaluate(propose_step(best.factors, *slopes, self._limit - best.bound, radius))
            points.append(point)
            if self._rank(point) >= self._rank(best):
                radius /= 2
                continue
            best = point
            slopes = self._slopes(best) if step + 1 < STEPS else slopes
        return [*(point for point in points if point is not best), best]

    def certify(self, points: list[_Point], budget: float) -> tuple[np.ndarray, ForgettingReport]:
        """Bound candidates from the best factors to the safest, jointly, and take the first within the limit."""
        best, safest = points[-1].factors, min(points, key=lambda point: point.bound).factors
        parts = CANDIDATES[:1] if np.array_equal(best, safest) else CANDIDATES
        candidates = [best + part * (safest - best) for part in parts]
        documents = self._reference.general.subset(self._certifying)
        base = self._reference.general_losses.subset(self._certifying)
        losses = [self._measure(factors, documents) for factors in candidates]
        differences = np.stack([candidate.nll - base.nll for candidate in losses])
        bounds = upper_bounds(differences, base.num_tokens, self._confidence, self._seed)
        passed = np.flatnonzero(bounds <= self._limit)
        index = int(passed[0]) if len(passed) else int(bounds.argmin())
        quantized = measure_quantized(self._model, documents, base, self._reference.batch_size)
        general = TextComparison(base, quantized, losses[index])
        report = self._report(candidates[index], general, float(bounds[index]), budget, bool(len(passed)))
        return candidates[index], report

    def _report(
        self, factors: np.ndarray, general: TextComparison, bound: float, budget: float, feasible: bool
    ) -> ForgettingReport:
        reference = self._reference
        assert reference.domain is not None
        assert reference.domain_losses is not None
        size = reference.batch_size
        quantized = measure_quantized(self._model, reference.domain, reference.domain_losses, size)
        self._scales.set(factors)
        adapted, kl = measure_domain(self._model, reference)
        domain = TextComparison(reference.domain_losses, quantized, adapted)
        scales = {block: float(factor) for block, factor in zip(self._scales.blocks, factors, strict=True)}
        upper, note = degradation_of(bound), "" if feasible else _way_out(general, budget)
        return ForgettingReport(general, domain, kl, self._confidence, upper, budget, feasible, scales, note)

    def _evaluate(self, factors: np.ndarray) -> _Point:
        general = self._measure(factors, self._reference.general.subset(self._choosing))
        base = self._reference.general_losses.subset(self._choosing)
        bound = upper_bounds((general.nll - base.nll)[None], base.num_tokens, self._confidence, self._seed)[0]
        assert self._reference.domain is not None
        domain = self._measure(factors, self._reference.domain).total
        return _Point(factors, float(bound), domain.nll / domain.num_tokens)

    def _measure(self, factors: np.ndarray, documents: Documents) -> DocumentLosses:
        self._scales.set(factors)
        losses = measure_documents(self._model, documents, batch_size=self._reference.batch_size)
        check_finite(losses, "adapted model")
        return losses

    def _slopes(self, point: _Point) -> tuple[np.ndarray, np.ndarray]:
        """d loss / d factor on the domain and on general text, each [blocks]."""
        assert self._reference.domain is not None
        size, general = self._reference.batch_size, self._reference.general.subset(self._choosing)
        domain = self._scales.gradient(point.factors, self._reference.domain, size)
        return domain, self._scales.gradient(point.factors, general, size)

    def _rank(self, point: _Point) -> tuple[bool, float]:
        """Lower is better: first within the limit, then the domain loss; outside of it, how far."""
        outside = point.bound > self._limit
        return outside, point.bound if outside else point.domain


def propose_step(
    factors: np.ndarray, domain: np.ndarray, general: np.ndarray, slack: float, radius: float
) -> np.ndarray:
    """Factors a step away that lower the domain loss while general loss rises by no more than `slack`, to first order.

    The step is along -(domain + mu * general), with the least mu that does it.

    Args:
        factors: [blocks], each in [0, 1].
        domain: d domain loss / d factor, [blocks], nats a token.
        general: the same on general text.
        slack: nats a token; negative if general loss must fall.
        radius: root mean square of the step, before it is cut to [0, 1].

    Returns:
        [blocks], in [0, 1]. If no mu reaches the slack, a step along -general.
    """
    ratio = np.linalg.norm(domain) / max(float(np.linalg.norm(general)), 1e-30)
    for mu in (0.0, *np.geomspace(0.1, 100, 25) * ratio):
        moved = _step(factors, domain + mu * general, radius)
        if general @ (moved - factors) <= slack:
            return moved
    return _step(factors, general, radius)


def _step(factors: np.ndarray, slope: np.ndarray, radius: float) -> np.ndarray:
    size = math.sqrt(float((slope**2).mean()))
    return np.clip(factors - radius * slope / size, 0, 1) if size > 0 else factors


def _way_out(general: TextComparison, budget: float) -> str:
    if general.degradation <= budget:
        return (
            f"The mean is within the budget, but {len(general.base.nll)} documents are too few to show it with this "
            "confidence. Pass more general documents. The adapter was left as it was."
        )
    if general.quantization > budget:
        return (
            f"Quantizing alone costs {general.quantization:+.1%}, which no scale takes back. Quantize fewer blocks (a "
            'higher selection_ratio) or less (quantization="int8" or "none"), or train with an anchor on general '
            "text, which repairs some of it. The adapter was left as it was."
        )
    return "Train anew with a lower rate, fewer steps, or an anchor on general text. The adapter was left as it was."


def _check(reference: BaseReference, budget: float) -> None:
    if reference.domain is None:
        raise ValueError("there is no domain text to keep the gain on; pass domain=..., or a BaseReference with it")
    if not budget > -1:
        raise ValueError(f"budget is {budget}; allowed: a fraction above -1, such as 0.05 for 5%")
    if reference.general.num_documents < 2 * MIN_DOCUMENTS:
        raise ValueError(
            f"there are {reference.general.num_documents} general documents; half choose and half certify, so at "
            f"least {2 * MIN_DOCUMENTS} are needed, and 64 or more are better"
        )
