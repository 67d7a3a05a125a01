"""What the base model answers on general text, cached once: the teacher of the anchor, with no second model in memory.

At each position the cache holds the k most likely next tokens and the log probabilities of them, of all others
together and of the token that follows in the text: 4k + 4 bytes a token for vocabularies up to 65,536 tokens, 6k + 4
for larger ones.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..evaluation.perplexity import check_decoder_only, token_logits, token_nll
from ..evaluation_mode import evaluation_mode
from ..offloading import input_device
from ..quantization import has_quantized
from ..selection.calibration import Batch, calibration_batches
from .original_model import adapters_disabled, check_base_is_kept, unwrapped
from .top_k_kl import LOG_ZERO, top_k_log_probs

_FORMAT = "adaptq_base_answers_2"


class AnsweredText(NamedTuple):
    """A text and the base's answers to it.

    Attributes:
        input_ids: [tokens], int32.
        tokens: [answers, k], uint16 or int32: the most likely next tokens after the first `answers` tokens.
        log_probs: [answers, k + 1], float16: natural log probabilities of them, and of all other tokens together.
        following_log_probs: [answers], float16: of the token that follows in the text; `LOG_ZERO` where none does.
    """

    input_ids: Tensor
    tokens: Tensor
    log_probs: Tensor
    following_log_probs: Tensor


class BaseAnswers(Sequence[AnsweredText]):
    """The answers to a list of texts, on the CPU.

    Args:
        texts: the texts with their answers.
        vocabulary: number of tokens that the base chooses among.
        kind: "kl" (default): what a base answered. "replay": the texts themselves as answers.
    """

    def __init__(self, texts: Sequence[AnsweredText], vocabulary: int, kind: str = "kl") -> None:
        self._texts = list(texts)
        self.vocabulary = vocabulary
        self.kind = kind

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        return self._texts[index]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for text in self._texts for tensor in text)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all texts."""
        return sum(text.input_ids.numel() for text in self._texts)

    @property
    def digest(self) -> int:
        """A checksum of the texts' tokens."""
        return zlib.crc32(torch.cat([text.input_ids for text in self._texts]).numpy().tobytes())

    @classmethod
    def of(
        cls,
        model: nn.Module,
        general_texts: Any = None,
        tokenizer: Any = None,
        *,
        samples: int = 256,
        max_length: int = 256,
        top_k: int = 64,
        batch_size: int = 8,
    ) -> BaseAnswers:
        """Ask a causal language model, without gradients, on the device that it is on.

        Call it with the original model, before `get_peft_model` quantizes. A `PeftModel` answers with its adapters
        off. If linears of that base are quantized, a warning says so: the anchor then holds the model to the quantized
        base and can't undo what rounding broke.

        Args:
            model: returns `logits` [batch, positions, vocabulary].
            general_texts: as `calibration_data` of `AdaptQConfig`: texts, dicts, a Dataset, a DataLoader or the path
                of a file. None: the model writes its own (`samples` texts of up to 128 tokens).
            tokenizer: for texts; None takes the one that `model.name_or_path` names.
            samples: texts at most, taken evenly spaced. Default 256.
            max_length: tokens that a text is cut to. Default 256.
            top_k: tokens kept at each position, at least 1. Default 64.
            batch_size: texts run at once. It changes the speed only.

        Raises:
            ValueError: if the texts can't be used, `top_k` is under 1, the model has an encoder, or its adapters are
                merged or changed the base (PiSSA).
        """
        if top_k < 1:
            raise ValueError(f"top_k={top_k}; it must be at least 1 (64 is usual)")
        model = unwrapped(model)
        found: list[AnsweredText] = []
        vocabulary = 0
        with _base_of(model), evaluation_mode(model), torch.no_grad():
            for batch in _read(model, general_texts, tokenizer, samples, max_length, batch_size):
                logits = token_logits(model, **_to(batch, input_device(model)))
                vocabulary = logits.shape[-1]
                for row, row_logits in _unpadded(batch, logits):
                    answers = top_k_log_probs(row_logits, min(top_k, vocabulary))
                    following = nn.functional.pad(-token_nll(row_logits[:-1], row[1:]), (0, 1), value=LOG_ZERO)
                    found.append(_answered(row, *answers, following, _smallest_dtype(vocabulary)))
        return cls(found, vocabulary)

    @classmethod
    def replay(
        cls,
        model: nn.Module,
        general_texts: Any = None,
        tokenizer: Any = None,
        *,
        samples: int = 256,
        max_length: int = 256,
    ) -> BaseAnswers:
        """The texts themselves as answers: KL to them is the cross-entropy of predicting the next token.

        The model is run only if it has to write the texts. Arguments and errors as in `of`.
        """
        model = unwrapped(model)
        found = []
        with _base_of(model) if general_texts is None else nullcontext():
            for batch in _read(model, general_texts, tokenizer, samples, max_length, 1):
                for row, _ in _unpadded(batch, batch["input_ids"]):
                    following = row[1:, None]
                    certain = torch.tensor([0.0, LOG_ZERO]).expand(len(following), 2)
                    found.append(_answered(row, following, certain, torch.zeros(len(following)), torch.int32))
        return cls(found, 1 + max((int(text.input_ids.max()) for text in found), default=0), kind="replay")

    def save(self, path: str | PathLike[str]) -> None:
        """Write the answers to a safetensors file, so that the base need not be asked again."""
        lengths = [[text.input_ids.numel(), text.tokens.shape[0]] for text in self._texts]
        parts = zip(AnsweredText._fields, zip(*self._texts, strict=True), strict=True)
        tensors = {name: torch.cat(part) for name, part in parts}
        tensors["lengths"] = torch.tensor(lengths, dtype=torch.int64)
        metadata = {"format": _FORMAT, "vocabulary": str(self.vocabulary), "kind": self.kind}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> BaseAnswers:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"{str(path)!r} has format {metadata.get('format')!r}; BaseAnswers.load reads {_FORMAT!r}, as "
                    "BaseAnswers.save writes it"
                )
            tokens, answers = file.get_tensor("lengths").T.tolist()
            sizes = {name: tokens if name == "input_ids" else answers for name in AnsweredText._fields}
            parts = [file.get_tensor(name).split(lengths) for name, lengths in sizes.items()]
        texts = [AnsweredText(*[part.clone() for part in text]) for text in zip(*parts, strict=True)]
        return cls(texts, int(metadata["vocabulary"]), metadata.get("kind", "kl"))  # files of old have no kind


def collate(texts: Sequence[AnsweredText], device: torch.device) -> tuple[Batch, Tensor, Tensor, Tensor, Tensor]:
    """A padded batch and the answers to it, on `device`.

    Returns:
        "input_ids" and "attention_mask", int64, [texts, longest], padded on the right; the rows [n] of the flattened
        [texts * longest] positions that have answers; tokens [n, k], int64; log probabilities [n, k + 1], float32;
        those of the tokens that follow in the texts [n], float32.
    """
    batch = _padded([text.input_ids.long() for text in texts])
    width = batch["input_ids"].shape[1]
    rows = torch.cat([torch.arange(len(text.tokens)) + i * width for i, text in enumerate(texts)])
    tokens = torch.cat([text.tokens for text in texts]).long()
    log_probs = torch.cat([text.log_probs for text in texts]).float()
    following = torch.cat([text.following_log_probs for text in texts]).float()
    return _to(batch, device), rows.to(device), tokens.to(device), log_probs.to(device), following.to(device)


@contextmanager
def _base_of(model: Any) -> Iterator[None]:
    """The model with its adapters off, within the context."""
    check_base_is_kept(model)
    if has_quantized(model):
        warnings.warn(
            "Linears of the model are quantized, so the anchor's answers come from the quantized base: training is "
            "held to it, and can't undo what rounding to fewer bits broke. Where the original model fits in memory, "
            "call PreservationCallback.from_base(model, ...) with it, before get_peft_model.",
            stacklevel=5,
        )
    with adapters_disabled(model):
        yield


def _read(
    model: nn.Module, general_texts: Any, tokenizer: Any, samples: int, max_length: int, batch_size: int
) -> Iterator[Batch]:
    check_decoder_only(model, "the anchor")
    try:
        batches = calibration_batches(
            model, general_texts, tokenizer=tokenizer, samples=samples, max_length=max_length, batch_size=batch_size
        )
    except ValueError as error:
        raise ValueError(f"The general texts of the anchor can't be read. {error}") from error
    for batch in batches:
        if "input_ids" not in batch:
            raise ValueError(f"The general texts of the anchor have {sorted(batch)}, and no 'input_ids'.")
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        rows = [ids[kept][:max_length] for ids, kept in zip(batch["input_ids"], mask, strict=True) if kept.sum() > 1]
        if rows:  # padded on the right, as in training: on the left absolute positions would be others
            yield _padded(rows)


def _padded(rows: list[Tensor]) -> Batch:
    """Token ids of different lengths as a batch, padded on the right."""
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return {"input_ids": pad(rows), "attention_mask": pad([torch.ones_like(row) for row in rows])}


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _unpadded(batch: Batch, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row of a batch its tokens [length] and its `values` [length, ...], without padding."""
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"].bool(), values, strict=True):
        yield ids[mask], row[mask.to(row.device)]


def _smallest_dtype(vocabulary: int) -> torch.dtype:
    return torch.uint16 if vocabulary <= 2**16 else torch.int32


def _answered(ids: Tensor, tokens: Tensor, log_probs: Tensor, following: Tensor, dtype: torch.dtype) -> AnsweredText:
    return AnsweredText(ids.int().cpu(), tokens.to(dtype).cpu(), log_probs.half().cpu(), following.half().cpu())
