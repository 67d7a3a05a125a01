"""Negative log likelihoods of documents, kept one by one so that two models can be compared in pairs.

Each document is tokenized by itself, with the special tokens that the tokenizer adds (a BOS token, where it has one),
and cut into windows as the transformers documentation does for perplexity: a window starts `stride` tokens after the
one before, and predicts the tokens that the one before did not reach, given all that it holds of the document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..evaluation import Perplexity, token_nll
from ..evaluation.perplexity import token_logits
from ..evaluation_mode import evaluation_mode
from ..offloading import input_device
from ..selection.calibration import position_limit

#: Called with (batches done, batches in all).
Progress = Callable[[int, int], None]


class Window(NamedTuple):
    """Part of a document.

    Args:
        document: which one.
        tokens: [tokens], int64.
        num_context: how many tokens at the start are only read, at least 1; the others are predicted.
    """

    document: int
    tokens: Tensor
    num_context: int


class DocumentBatch(NamedTuple):
    """Windows run at once.

    Args:
        input_ids: [windows, positions], int64, shorter windows padded on the right.
        predicted: [windows, positions], bool: whether the token after a position counts; False at the last.
        targets: [predicted tokens], int64: those tokens.
        document: [predicted tokens], int64: the document that each belongs to.
    """

    input_ids: Tensor
    predicted: Tensor
    targets: Tensor
    document: Tensor

    def logits(self, model: nn.Module) -> Tensor:
        """What the model predicts for each of `targets`: [predicted tokens, vocabulary].

        No attention mask is given: the padding is on the right, where no token of a causal model looks.
        """
        logits = token_logits(model, input_ids=self.input_ids.to(input_device(model)))
        return logits[self.predicted.to(logits.device)]


@dataclass(frozen=True)
class Documents:
    """Tokenized documents in windows; made by `tokenize_documents`.

    Attributes:
        windows: of all documents, in their order.
        num_documents: number of documents that have a token to predict.
        num_skipped: number of texts of fewer than 2 tokens, which were left out.
        max_length: tokens in a window at most.
        stride: how far a window is from the one before.
    """

    windows: tuple[Window, ...]
    num_documents: int
    num_skipped: int
    max_length: int
    stride: int

    def batches(self, batch_size: int) -> list[DocumentBatch]:
        """Batches of at most `batch_size` full windows, or of more that are shorter and with padding no larger.

        The longest windows come first, so that little is padded.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; it must be at least 1")
        ordered = sorted(self.windows, key=lambda window: -len(window.tokens))
        batches, start = [], 0
        while start < len(ordered):
            count = batch_size * self.max_length // len(ordered[start].tokens)
            batches.append(_batch(ordered[start : start + count]))
            start += count
        return batches

    def subset(self, documents: Sequence[int]) -> Documents:
        """Only these documents, numbered anew in the order given."""
        number = {document: new for new, document in enumerate(documents)}
        windows = [w._replace(document=number[w.document]) for w in self.windows if w.document in number]
        return Documents(tuple(windows), len(number), 0, self.max_length, self.stride)


@dataclass(frozen=True)
class DocumentLosses:
    """How well a model predicts documents, one by one.

    Attributes:
        nll: [documents], float64: negative log likelihood in nats, summed over the predicted tokens of a document.
        num_tokens: [documents], int64: number of those tokens.
    """

    nll: np.ndarray
    num_tokens: np.ndarray

    @property
    def total(self) -> Perplexity:
        """Over the tokens of all documents."""
        return Perplexity(nll=float(self.nll.sum()), num_tokens=int(self.num_tokens.sum()))

    def subset(self, documents: Sequence[int]) -> DocumentLosses:
        """Only these documents, in the order given."""
        return DocumentLosses(self.nll[list(documents)], self.num_tokens[list(documents)])


def tokenize_documents(
    tokenizer: Any,
    texts: Iterable[str | Mapping[str, Any]],
    *,
    max_length: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> Documents:
    """Tokenize each text by itself and cut it into windows.

    Args:
        tokenizer: the model's tokenizer; whether a BOS token stands first is its choice.
        texts: documents, or rows of a `datasets.Dataset` with the column "text". Those of fewer than 2 tokens, such as
            blank ones, predict nothing; they are left out and counted.
        max_length: tokens in a window, at least 2. Figures with different windows are not comparable.
        stride: 1 to `max_length`. `None` (default): `max_length`, windows do not overlap. A smaller stride gives each
            token more context and costs more time.
        max_tokens: tokens that are used of each document, from its start; `None`: all.

    Raises:
        ValueError: if no text has 2 tokens, or a number is out of range.
        TypeError: if `texts` is one string in place of a list of them, or something in it is no text.
    """
    stride = max_length if stride is None else stride
    texts = _texts_of(texts)
    _check(texts, max_length, stride, max_tokens)
    # verbose=False: a document is cut into windows afterwards, so it may be longer than the model's context.
    encoded = [tokenizer(text, verbose=False)["input_ids"][:max_tokens] for text in texts]
    kept = [tokens for tokens in encoded if len(tokens) > 1]
    if not kept:
        raise ValueError(f"none of the {len(texts)} texts has 2 tokens, one to predict the other; pass longer texts")
    windows = [window for number, tokens in enumerate(kept) for window in _windows(number, tokens, max_length, stride)]
    return Documents(tuple(windows), len(kept), len(texts) - len(kept), max_length, stride)


def load_tokenizer(model: nn.Module, tokenizer: Any = None) -> Any:
    """`tokenizer`, or if it is `None` that of the model's `name_or_path`.

    Raises:
        ValueError: if there is none.
    """
    if tokenizer is not None:
        return tokenizer
    from transformers import AutoTokenizer

    name = getattr(model, "name_or_path", None) or ""
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(
            f"no tokenizer was given, and none could be loaded for {type(model).__name__} ({name!r}: {error}). Pass "
            "tokenizer=..."
        ) from error


def measure_documents(
    model: nn.Module, documents: Documents, *, batch_size: int = 4, progress: Progress | None = None
) -> DocumentLosses:
    """Negative log likelihood of each document under a causal language model.

    Args:
        model: is run in evaluation mode without gradients, on the device it is on; its mode is as before afterwards.
        documents: made by `tokenize_documents`.
        batch_size: full windows run at once, or as many tokens in shorter ones. It changes the speed; the result
            only by float rounding.
        progress: called with (batches done, batches in all) after each.
    """
    batches = documents.batches(batch_size)
    losses = LossSum(documents.num_documents)
    with evaluation_mode(model), torch.no_grad():
        for done, batch in enumerate(batches, 1):
            losses.add(batch, token_nll(batch.logits(model), batch.targets))
            if progress is not None:
                progress(done, len(batches))
    return losses.result()


class LossSum:
    """Adds up the losses of tokens document by document."""

    def __init__(self, num_documents: int) -> None:
        self._nll = torch.zeros(num_documents, dtype=torch.float64)
        self._num_tokens = torch.zeros(num_documents, dtype=torch.int64)

    def add(self, batch: DocumentBatch, nll: Tensor) -> None:
        """Add `nll`, [predicted tokens], of a batch."""
        self._nll.index_add_(0, batch.document, nll.detach().cpu().double())  # MPS has no float64
        self._num_tokens.index_add_(0, batch.document, torch.ones_like(batch.document))

    def result(self) -> DocumentLosses:
        return DocumentLosses(self._nll.numpy(), self._num_tokens.numpy())


def check_positions(model: nn.Module, documents: Documents) -> None:
    """Raise ValueError if a window is longer than the model has positions."""
    limit = position_limit(model)
    longest = max(len(window.tokens) for window in documents.windows)
    if limit is not None and limit < longest:
        raise ValueError(
            f"windows of {longest} tokens are longer than the {limit} positions of {type(model).__name__}; pass "
            f"max_length={limit} or less"
        )


class LossNotFiniteError(ValueError):
    """The loss of a model is not a finite number on some document."""


def check_finite(losses: DocumentLosses, name: str) -> None:
    """Raise LossNotFiniteError naming the first document whose loss is not a finite number."""
    broken = np.flatnonzero(~np.isfinite(losses.nll))
    if len(broken):
        raise LossNotFiniteError(
            f"the loss of the {name} is {losses.nll[broken[0]]} on document {broken[0]} ({len(broken)} of "
            f"{len(losses.nll)} documents are not finite): its weights or activations overflow"
        )


def _texts_of(texts: Iterable[Any]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("texts is one string; pass a list of documents, for one document [text]")
    found: list[Any] = [entry.get("text") if isinstance(entry, Mapping) else entry for entry in texts]
    for index, text in enumerate(found):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise TypeError(f'text {index} is a {kind}; allowed: a str, or a dict (a row of a Dataset) with "text"')
    return found


def _check(texts: Sequence[str], max_length: int, stride: int, max_tokens: int | None) -> None:
    if len(texts) == 0:
        raise ValueError("texts is empty; at least one document is needed")
    limits = {"max_length": (max_length, 2, math.inf), "stride": (stride, 1, max_length)}
    limits["max_tokens"] = (2 if max_tokens is None else max_tokens, 2, math.inf)
    for name, (given, least, most) in limits.items():
        if not least <= given <= most:
            allowed = f"from {least} to max_length={most}" if most < math.inf else f"at least {least}"
            raise ValueError(f"{name}={given} is out of range; it must be {allowed}")


def _windows(document: int, tokens: Sequence[int], max_length: int, stride: int) -> Iterator[Window]:
    """The windows of a document that predict something; each token but the first is predicted by one at most."""
    reached = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + max_length, len(tokens))
        num_context = max(1, reached - begin)  # the first token of a window has nothing before it
        if end - begin > num_context:
            yield Window(document, torch.tensor(tokens[begin:end], dtype=torch.long), num_context)
        reached = end
        if end == len(tokens):
            return


def _batch(windows: list[Window]) -> DocumentBatch:
    input_ids = nn.utils.rnn.pad_sequence([window.tokens for window in windows], batch_first=True)
    following = torch.arange(1, input_ids.shape[1] + 1)
    lengths = torch.tensor([len(window.tokens) for window in windows])[:, None]
    context = torch.tensor([window.num_context for window in windows])[:, None]
    predicted = (following >= context) & (following < lengths)
    document = torch.tensor([window.document for window in windows])[:, None].expand_as(predicted)
    return DocumentBatch(input_ids, predicted, input_ids.roll(-1, 1)[predicted], document[predicted])
