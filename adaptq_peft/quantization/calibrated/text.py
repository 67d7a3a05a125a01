"""The text that calibrated quantization looks at: a mix, because text of one kind helps only that kind.

What the model writes itself, sampled from its BOS token, is always part of it: it stands for all that the model knows
(LLM-QAT, Liu et al. 2023, arXiv:2305.17888), and it is what carries over to texts of kinds that nobody gave.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from ...selection.calibration import Batch, batch_token_count, calibration_batches, position_limit
from ...selection.written_text import SELF_WRITTEN_LENGTH, can_write_text, write_calibration_samples

CALIBRATION_TOKENS = 24_576
"""Tokens looked at in all. More help, slowly: see docs/experiment_log.md."""

_WRITTEN: ContextVar[dict[tuple[nn.Module, int, int], list[Batch]] | None] = ContextVar("written", default=None)
"""Within `text_written_once`: model, length of a sample and seed -> what was written."""


def mixed_calibration_batches(
    model: nn.Module,
    *data: Any,
    tokenizer: Any = None,
    tokens: int = CALIBRATION_TOKENS,
    max_length: int = 512,
    batch_size: int = 4,
    seed: int = 0,
) -> list[Batch]:
    """Batches of equal shares, in tokens, of each kind of text and of text that the model writes itself.

    Args:
        model: the model, which has to be able to generate text if no data is given.
        data: each kind of text (the domain's, general text), in any form that `AdaptQConfig.calibration_data` takes;
            `None` is left out.
        tokenizer: tokenizer for texts. Default `None`: that of the model's `name_or_path`.
        tokens: tokens in all, about. A kind of which there is less than its share gives what it has.
        max_length: tokens a sample is cut to.
        batch_size: samples in a batch.
        seed: seed of the model's own text.

    Raises:
        ValueError: if data is empty or in an unknown form, or there is none and the model can't write text.
    """
    given = [kind for kind in data if kind is not None]
    share = max(tokens // (len(given) + 1), 1)  # of each kind at least one sample
    options = {"tokenizer": tokenizer, "max_length": max_length, "batch_size": batch_size}
    batches: list[Batch] = []
    for kind in given:
        found = calibration_batches(model, kind, samples=max(share // 16, 1), **options)
        batches += _thin_out(found, share)
    if can_write_text(model) or not given:
        length = min(SELF_WRITTEN_LENGTH, max_length, position_limit(model) or max_length)
        written = _write(model, math.ceil(share / length), length, seed)
        batches += calibration_batches(model, written, samples=len(written), **options)
    return batches


@contextmanager
def text_written_once() -> Iterator[None]:
    """Within the context, in which models must not change, each writes its own text once: less of it is its beginning.

    Sensitivities and calibrated rounding want the same kind of text, and writing it takes a while.
    """
    token = _WRITTEN.set({})
    try:
        yield
    finally:
        _WRITTEN.reset(token)


def _write(model: nn.Module, count: int, length: int, seed: int) -> list[Batch]:
    known, key = _WRITTEN.get(), (model, length, seed)
    if known is None:
        return write_calibration_samples(model, count, length, seed=seed)
    if len(known.get(key, ())) < count:
        known[key] = write_calibration_samples(model, count, length, seed=seed)
    return known[key][:count]


def _thin_out(batches: list[Batch], tokens: int) -> list[Batch]:
    """Evenly spaced batches that hold about `tokens` tokens, padding not counted; at least one."""
    total = sum(batch_token_count(batch) for batch in batches)
    kept = min(len(batches), max(round(len(batches) * tokens / max(total, 1)), 1))
    return [batches[index * len(batches) // kept] for index in range(kept)]
