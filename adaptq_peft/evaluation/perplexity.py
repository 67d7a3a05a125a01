"""Perplexity of a causal language model on texts, token-weighted, the way the transformers documentation does it.

The documents are joined by blank lines and tokenized once, with whatever special tokens the tokenizer adds: a
BOS token, where there is one, stands at the very start only (SmolLM2's tokenizer adds none). The stream is cut into
windows of `max_length` tokens that do not overlap (the documentation's `stride = max_length`). Within a window each
token but the first is predicted from those before it; nothing is padded, so nothing is masked out of the count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..evaluation_mode import evaluation_mode
from ..offloading import input_device
from ..selection import is_encoder_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOSS_ROWS = 256
"""Positions whose logits are in float32 at one time: 256 x 49k x 4 bytes = 50 MB, in place of 400 MB for 4 x 512."""

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a stream of tokens.

    Attributes:
        nll: Negative log likelihood in nats, summed over the predicted tokens.
        num_tokens: Number of predicted tokens (the first token of each window is not predicted).
    """

    nll: float
    num_tokens: int

    @property
    def value(self) -> float:
        """The perplexity, exp(nll / num_tokens): at least 1, lower is better; infinite if it overflows."""
        try:
            return math.exp(self.nll / self.num_tokens)
        except OverflowError:
            return math.inf


def degradation(adapted: Perplexity, base: Perplexity) -> float:
    """Relative rise of the perplexity, (adapted - base) / base; 0.05 means 5% worse, negative means better.

    Raises:
        ValueError: If the two were not measured on the same number of tokens, so cannot be compared.
    """
    if adapted.num_tokens != base.num_tokens:
        raise ValueError(
            f"perplexities over {adapted.num_tokens} and {base.num_tokens} tokens cannot be compared: measure both "
            "on the same texts with the same max_length and max_tokens"
        )
    return (adapted.value - base.value) / base.value


def evaluate_perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 512,
    batch_size: int = 4,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure the perplexity of a causal language model on `texts`.

    Args:
        model: Returns `logits` of shape [batch, positions, vocabulary] for `input_ids` of shape [batch, positions]. It
            is evaluated without gradients, on the device it is on, in its own dtype; the loss is taken in float32. Its
            training mode is as before afterwards, also after an error.
        tokenizer: The model's tokenizer.
        texts: Documents, joined in this order with blank lines between.
        max_length: Tokens in a window, at least 2. Perplexities with different windows are not comparable.
        batch_size: Windows run at once, at least 1. It changes the speed; the result only by float rounding.
        max_tokens: Use only so many tokens from the start of the stream; None uses all.
        progress: Called with (tokens done, tokens in all) after each batch.

    Raises:
        ValueError: If the model has an encoder, there are no texts, all are blank, they yield under two tokens, or a
            number is out of range.
        TypeError: If `texts` is one string in place of a list of them.
    """
    check_decoder_only(model, "perplexity")
    _check_arguments(texts, max_length, batch_size, max_tokens)
    windows = _windows(_token_stream(tokenizer, texts, max_tokens), max_length)
    total = sum(window.numel() for window in windows)
    nll, done = 0.0, 0
    with evaluation_mode(model), torch.no_grad():
        for batch in _batches(windows, batch_size):
            nll += _batch_nll(model, batch)
            done += batch.numel()
            if progress is not None:
                progress(done, total)
    return Perplexity(nll=nll, num_tokens=total - len(windows))


def _check_arguments(texts: Sequence[str], max_length: int, batch_size: int, max_tokens: int | None) -> None:
    if isinstance(texts, str):
        raise TypeError("texts is one string; pass a list of documents, for one document [text]")
    if len(texts) == 0:
        raise ValueError("texts is empty; perplexity needs at least one document")
    if not any(text.strip() for text in texts):
        raise ValueError(f"all {len(texts)} texts are blank; perplexity needs at least one with words in it")
    minimum = {"max_length": (max_length, 2), "batch_size": (batch_size, 1), "max_tokens": (max_tokens, 2)}
    for name, (given, least) in minimum.items():
        if given is not None and given < least:
            raise ValueError(f"{name}={given} is too small; it must be at least {least}")


def _token_stream(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int | None) -> Tensor:
    """Tokens of all documents, shape [tokens], int64; at most `max_tokens`."""
    # verbose=False: the stream is cut afterwards, so that it is longer than the model's context is no problem.
    tokens = tokenizer("\n\n".join(texts), verbose=False)["input_ids"][:max_tokens]
    if len(tokens) < 2:
        raise ValueError(
            f"the texts yield {len(tokens)} token(s); perplexity needs at least 2, one to predict the other"
        )
    return torch.tensor(tokens, dtype=torch.long)


def _windows(stream: Tensor, max_length: int) -> list[Tensor]:
    """Cut the stream into windows of `max_length`; a last one of a single token predicts nothing and is dropped."""
    return [window for window in stream.split(max_length) if window.numel() > 1]


def _batches(windows: list[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Stack windows of one length, shape [batch, positions]; the shorter last window is a batch of its own."""
    full = [window for window in windows if window.numel() == windows[0].numel()]
    for start in range(0, len(full), batch_size):
        yield torch.stack(full[start : start + batch_size])
    for window in windows[len(full) :]:
        yield window[None]


def _batch_nll(model: nn.Module, tokens: Tensor) -> float:
    """Summed negative log likelihood in nats of tokens[:, 1:], given those before; tokens is [batch, positions]."""
    tokens = tokens.to(input_device(model))
    logits = token_logits(model, input_ids=tokens)[:, :-1].flatten(0, 1)
    targets = tokens[:, 1:].flatten()
    return token_nll(logits, targets).cpu().double().sum().item()  # MPS has no float64


def check_decoder_only(model: nn.Module, purpose: str) -> None:
    """Raise ValueError if a model sees the tokens that are to be predicted, or predicts none."""
    if is_encoder_decoder(model):
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder; {purpose} works with decoder-only language models"
        )
    name = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
    if name.endswith(("ForMaskedLM", "ForTokenClassification")):
        raise ValueError(
            f"{name} does not predict the next token of a text; {purpose} works with causal language models"
        )


def token_logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    """What a causal language model predicts after each token: [batch, positions, vocabulary].

    Args:
        model: is called with `inputs`.
        inputs: with `input_ids`, [batch, positions].

    Raises:
        ValueError: if the model gives no logits for each token, as one that classifies sequences.
    """
    logits = model(**inputs).logits
    if logits.ndim != 3:
        raise ValueError(
            f"{type(model).__name__} returns logits of shape {list(logits.shape)}; needed is a causal language model, "
            "which returns [batch, positions, vocabulary]"
        )
    return logits[:, -inputs["input_ids"].shape[1] :]  # prompt tuning puts positions in front


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood of each token in nats, in float32; differentiable.

    Args:
        logits: [tokens, vocabulary], any floating dtype.
        targets: [tokens], on any device.

    Returns:
        [tokens], on the device of `logits`. Only `LOSS_ROWS` rows of the logits are in float32 at one time.
    """
    parts = zip(logits.split(LOSS_ROWS), targets.to(logits.device).split(LOSS_ROWS), strict=True)
    return torch.cat([nn.functional.cross_entropy(rows.float(), wanted, reduction="none") for rows, wanted in parts])
