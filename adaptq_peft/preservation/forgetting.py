"""How much a model with an adapter has forgotten, against the 16-bit model that it started from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..evaluation import token_nll
from ..evaluation.perplexity import LOSS_ROWS, check_decoder_only
from ..evaluation_mode import evaluation_mode
from ..quantization import has_quantized
from .documents import (
    DocumentLosses,
    Documents,
    LossSum,
    check_finite,
    check_positions,
    load_tokenizer,
    measure_documents,
    tokenize_documents,
)
from .original_model import adapters_disabled, changes_base, has_adapter, original_model, unwrapped
from .report import ForgettingReport, TextComparison


class TopLogProbs(NamedTuple):
    """The likeliest next tokens of a batch.

    Args:
        log_probs: [predicted tokens, k], float32, natural logarithm.
        tokens: [predicted tokens, k], int32.
    """

    log_probs: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class BaseReference:
    """What the 16-bit base predicts for given texts: all that is needed of it to measure forgetting later.

    Make one with `BaseReference.of(model, ...)` before `get_peft_model` quantizes the model.

    Attributes:
        general: general documents.
        general_losses: the base's losses on them.
        domain: domain documents, or `None`.
        domain_losses: the base's losses on them, or `None`.
        domain_top: the base's likeliest tokens on them, by batch; `top_k` x 8 bytes a token.
        batch_size: full windows in a batch, or as many tokens in shorter ones.
    """

    general: Documents
    general_losses: DocumentLosses
    domain: Documents | None
    domain_losses: DocumentLosses | None
    domain_top: tuple[TopLogProbs, ...]
    batch_size: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        general_texts: Iterable[str | Mapping[str, Any]],
        domain_texts: Iterable[str | Mapping[str, Any]] | None = None,
        *,
        tokenizer: Any = None,
        max_length: int = 512,
        stride: int | None = None,
        max_tokens: int | None = None,
        batch_size: int = 4,
        top_k: int = 128,
    ) -> BaseReference:
        """Run the base on texts.

        Args:
            model: the original model. If it has adapters or quantized linears already, its originals are put in place
                for the while (see `original_model`).
            general_texts: general documents, each an independent sample of what must not be forgotten: strings, or a
                `datasets.Dataset` with the column "text".
            domain_texts: domain documents that were not trained on; needed for the KL and the change on the domain.
            tokenizer: `None` (default): that of the model's `name_or_path`.
            max_length: tokens in a window. Default 512.
            stride: distance of windows; `None` (default): `max_length`.
            max_tokens: tokens used of each document; `None` (default): all.
            batch_size: full windows run at once, or as many tokens in shorter ones. Default 4.
            top_k: for the KL: how many of the likeliest tokens are kept apart; the others are one class. Default 128.

        Raises:
            ValueError: if texts are empty, the model has an encoder or too few positions, or its original can't be
                had.
        """
        model = unwrapped(model)
        check_decoder_only(model, "BaseReference")
        tokenizer = load_tokenizer(model, tokenizer)
        sizes: dict[str, Any] = {"max_length": max_length, "stride": stride, "max_tokens": max_tokens}
        general = tokenize_documents(tokenizer, general_texts, **sizes)
        domain = None if domain_texts is None else tokenize_documents(tokenizer, domain_texts, **sizes)
        for documents in (general, domain):
            if documents is not None:
                check_positions(model, documents)
        domain_losses: DocumentLosses | None = None
        domain_top: tuple[TopLogProbs, ...] = ()
        with original_model(model):
            general_losses = measure_documents(model, general, batch_size=batch_size)
            if domain is not None:
                domain_losses, domain_top = _measure_with_top(model, domain, batch_size, top_k)
        check_finite(general_losses, "base")
        if domain_losses is not None:
            check_finite(domain_losses, "base on domain text")
        return cls(general, general_losses, domain, domain_losses, domain_top, batch_size)


def measure_forgetting(
    model: nn.Module,
    general_texts: Iterable[str | Mapping[str, Any]] | None = None,
    domain_texts: Iterable[str | Mapping[str, Any]] | None = None,
    *,
    base: BaseReference | nn.Module | None = None,
    budget: float | None = None,
    confidence: float = 0.95,
    **options: Any,
) -> ForgettingReport:
    """Compare a model with the 16-bit base that it started from, document by document.

    The rise of the general perplexity is split into what quantizing brought (adapters off) and what training added.

    Args:
        model: a `PeftModel` of any method, with the active adapter to measure.
        general_texts: general documents, independent samples of what must not be forgotten; 64 or more.
        domain_texts: held-out domain documents; `None`: no KL and no domain perplexity.
        base: what to compare with. `None` (default): the original weights of this model, kept by the adapter or read
            from its checkpoint, are put in place for the while. A model: that one. A `BaseReference`: the one that it
            was made from; then no texts are given here.
        budget: degradation that is allowed, such as 0.05; sets `feasible` in the report. Default `None`.
        confidence: of the upper bound, one-sided. Default 0.95.
        options: of `BaseReference.of`: `tokenizer`, `max_length`, `stride`, `max_tokens`, `batch_size`, `top_k`.

    Raises:
        ValueError: if the base can't be had, both texts and a `BaseReference` are given or neither, or adapters are
            merged.
    """
    model = unwrapped(model)
    reference = resolve_reference(model, general_texts, domain_texts, base, options)
    general, domain, kl = compare(model, reference)
    bound = general.upper_bound(confidence)
    feasible = None if budget is None else bound <= budget
    return ForgettingReport(general, domain, kl, confidence, bound, budget, feasible)


def resolve_reference(
    model: nn.Module,
    general_texts: Iterable[str | Mapping[str, Any]] | None,
    domain_texts: Iterable[str | Mapping[str, Any]] | None,
    base: BaseReference | nn.Module | None,
    options: dict[str, Any],
) -> BaseReference:
    """The reference that was given, or one made from texts and a base model; see `measure_forgetting`."""
    if isinstance(base, BaseReference):
        given = {"general_texts": general_texts, "domain_texts": domain_texts, **options}
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise ValueError(f"base is a BaseReference, which has its own texts and settings; leave out {unused}")
        return base
    if general_texts is None:
        raise ValueError("there is no general text to measure on; pass general_texts, or a BaseReference as base=...")
    if base is None and not (has_adapter(model) or has_quantized(model)):
        raise ValueError(
            f"{type(model).__name__} has no adapter and nothing quantized (was it merged?), so there is no base in it "
            "to compare with; pass the original model as base=..., or a BaseReference"
        )
    options = {**options, "tokenizer": load_tokenizer(model, options.get("tokenizer"))}
    return BaseReference.of(model if base is None else base, general_texts, domain_texts, **options)


def compare(model: nn.Module, reference: BaseReference) -> tuple[TextComparison, TextComparison | None, float | None]:
    """The model against the reference: on general text, on domain text, and KL(base || adapted) on domain text."""
    losses, size = reference.general_losses, reference.batch_size
    quantized = measure_quantized(model, reference.general, losses, size)
    general = TextComparison(losses, quantized, measure_documents(model, reference.general, batch_size=size))
    check_finite(general.adapted, "adapted model")
    if reference.domain is None or reference.domain_losses is None:
        return general, None, None
    quantized = measure_quantized(model, reference.domain, reference.domain_losses, size)
    adapted, kl = measure_domain(model, reference)
    check_finite(adapted, "adapted model on domain text")
    return general, TextComparison(reference.domain_losses, quantized, adapted), kl


def measure_quantized(model: nn.Module, documents: Documents, base: DocumentLosses, batch_size: int) -> DocumentLosses:
    """Losses of the base as it was quantized.

    `base` itself if nothing is quantized, or if the adapter changed the base's weights: then there is none left.
    """
    if not has_quantized(model) or changes_base(model):
        return base
    with adapters_disabled(model):
        return measure_documents(model, documents, batch_size=batch_size)


def measure_domain(model: nn.Module, reference: BaseReference) -> tuple[DocumentLosses, float]:
    """Losses on the reference's domain text, and KL(base || model) there in nats a token (see `kl_divergence`).

    Raises:
        ValueError: if the reference has no domain text.
    """
    if reference.domain is None:
        raise ValueError("this BaseReference has no domain text; make it with domain_texts")
    losses, total = LossSum(reference.domain.num_documents), 0.0
    batches = reference.domain.batches(reference.batch_size)
    with evaluation_mode(model), torch.no_grad():
        for batch, top in zip(batches, reference.domain_top, strict=True):
            logits = batch.logits(model)
            losses.add(batch, token_nll(logits, batch.targets))
            total += kl_divergence(top, logits)
    return losses.result(), total / sum(len(batch.targets) for batch in batches)


def kl_divergence(top: TopLogProbs, logits: Tensor) -> float:
    """KL(base || model), summed over tokens, in nats, from the base's k likeliest tokens at each.

    All other tokens are one class, with the rest of the mass. That gives a lower bound (data processing inequality).

    Args:
        top: of the base.
        logits: of the model, [predicted tokens, vocabulary].
    """
    pieces = zip(logits.split(LOSS_ROWS), top.log_probs.split(LOSS_ROWS), top.tokens.split(LOSS_ROWS), strict=True)
    return sum(_kl_rows(rows.float(), base.to(rows.device), tokens.to(rows.device)) for rows, base, tokens in pieces)


def _kl_rows(logits: Tensor, base: Tensor, tokens: Tensor) -> float:
    model = torch.log_softmax(logits, -1).gather(-1, tokens.long())
    base, model = _with_rest(base), _with_rest(model)
    return nn.functional.kl_div(model, base, reduction="sum", log_target=True).item()


def _with_rest(log_probs: Tensor) -> Tensor:
    """Add the logarithm of the mass that is left as a last column. In float64, at least 1e-12: it is a difference."""
    log_probs = log_probs.cpu().double()  # MPS has no float64
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp_min(1e-12)
    return torch.cat([log_probs, rest.log()], -1)


def _measure_with_top(
    model: nn.Module, documents: Documents, batch_size: int, top_k: int
) -> tuple[DocumentLosses, tuple[TopLogProbs, ...]]:
    losses, tops = LossSum(documents.num_documents), []
    with evaluation_mode(model), torch.no_grad():
        for batch in documents.batches(batch_size):
            logits = batch.logits(model)
            losses.add(batch, token_nll(logits, batch.targets))
            tops.append(_top_log_probs(logits, top_k))
    return losses.result(), tuple(tops)


def _top_log_probs(logits: Tensor, top_k: int) -> TopLogProbs:
    pieces = [torch.log_softmax(rows.float(), -1).topk(min(top_k, rows.shape[-1])) for rows in logits.split(LOSS_ROWS)]
    log_probs = torch.cat([piece.values for piece in pieces]).cpu()
    return TopLogProbs(log_probs, torch.cat([piece.indices for piece in pieces]).int().cpu())
