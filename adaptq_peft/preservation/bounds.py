"""How sure a measured rise of the loss is: upper confidence bounds from paired differences by document.

The rise in nats a token is a ratio of sums over documents, R = sum(difference) / sum(tokens), and exp(R) - 1 is the
relative rise of the perplexity. Documents are drawn independently; tokens within one are not. So the bound resamples
documents. It is the studentized bootstrap ("bootstrap-t", Efron and Tibshirani 1993, chapter 12): differences are
skewed (a few documents lose much), and there a t interval or a percentile bootstrap gives bounds that are too low.
`scripts/benchmarks/bound_calibration.py` measures how often each fails.
"""

from __future__ import annotations

import math

import numpy as np

RESAMPLES = 2000
#: With fewer documents the spread between them says too little.
MIN_DOCUMENTS = 8


def rise_per_token(differences: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """sum(differences) / sum(num_tokens) over the last axis, nats a token.

    Args:
        differences: [..., documents], summed nats of the model minus those of the base.
        num_tokens: [documents] or [..., documents].
    """
    return differences.sum(-1) / num_tokens.sum(-1)


def upper_bounds(
    differences: np.ndarray,
    num_tokens: np.ndarray,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """Upper confidence bounds of the rise in nats a token, valid for all rows at once.

    With probability `confidence`, up to the error of the bootstrap, no row's true rise is above its bound. So a row
    may be chosen by its bound, in any way, without losing the confidence. The critical value is that of the largest
    studentized error over the rows (max-t: Romano and Wolf 2005, Econometrica 73). Rows measured on the same
    documents err together, so several cost little more than one.

    Args:
        differences: [rows, documents]: for each of several models, summed nats minus those of the base.
        num_tokens: [documents].
        confidence: in (0, 1), one-sided. Default 0.95.
        seed: of the resampling.
        resamples: how many times documents are drawn anew. Default 2,000.

    Returns:
        [rows], nats a token.

    Raises:
        ValueError: if `confidence` is out of range, or there are fewer than `MIN_DOCUMENTS` documents.
    """
    _check(num_tokens, confidence)
    rise = rise_per_token(differences, num_tokens)
    residual = differences - rise[:, None] * num_tokens
    count = len(num_tokens)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples).astype(float)
    shift, again = _shift_and_error(drawn, residual, num_tokens)
    # Rows that equal the base in each document have no error at all.
    errors = np.divide(-shift, again, out=np.zeros_like(shift), where=again > 0)
    _, error = _shift_and_error(np.ones((1, count)), residual, num_tokens)
    return rise + np.quantile(errors.max(1), confidence) * error[0]


def degradation_of(nats_per_token: float) -> float:
    """The relative rise of the perplexity for a rise of the loss: exp(x) - 1; infinite if it overflows."""
    try:
        return math.expm1(nats_per_token)
    except OverflowError:
        return math.inf


def _shift_and_error(
    weights: np.ndarray, residual: np.ndarray, num_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How far R moves if each document counts `weights` times, and its standard error there: each [resamples, rows].

    The error is that of a ratio, by linearization (Cochran 1977, Sampling Techniques, section 6.4).

    Args:
        weights: [resamples, documents].
        residual: [rows, documents]: differences less R x num_tokens.
        num_tokens: [documents].
    """
    total = (weights @ num_tokens)[:, None]
    shift = weights @ residual.T / total
    squares = weights @ (residual**2).T - 2 * shift * (weights @ (residual * num_tokens).T)
    squares += shift**2 * (weights @ num_tokens**2)[:, None]
    count = len(num_tokens)
    return shift, np.sqrt(count / (count - 1) * squares.clip(0)) / total


def _check(num_tokens: np.ndarray, confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; allowed: a number between 0 and 1, such as 0.95")
    if len(num_tokens) < MIN_DOCUMENTS:
        raise ValueError(
            f"a confidence bound from {len(num_tokens)} documents was asked for; it needs at least {MIN_DOCUMENTS}, "
            "and is good from 64 on. Pass more documents, or cut long ones into several"
        )
