"""Turns calibration data, in whichever form it comes, into batches that a model's forward takes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate

from .blocks import is_encoder_decoder
from .samples import draw_samples
from .written_text import SELF_WRITTEN_LENGTH, write_calibration_samples

Batch = dict[str, Any]

_TEXT_KEYS = ("input_ids", "messages", "text")
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def calibration_batches(
    model: nn.Module, data: Any, *, tokenizer: Any = None, samples: int, max_length: int, batch_size: int
) -> list[Batch]:
    """Batches of keyword arguments for `model.forward`, on the CPU, at most `samples` samples in all.

    From a sequence with more than `samples` entries evenly spaced ones are taken; from an iterator the first ones.
    Token sequences are sorted by length and padded on the right, so that a batch holds little padding. Other inputs of
    the model that a sample holds (pixel values, token types, what the decoder reads) come along; labels of a model
    without a decoder of its own do not.

    Args:
        model: the model the batches are for; its `name_or_path` names the tokenizer if none is given.
        data: `list[str]`, `list[dict]` with "input_ids", "messages" or "text" (or tensors of any other name, which are
            stacked), a `datasets.Dataset`, any iterable of these, a `DataLoader` of batches, the path of a .txt
            (a sample a line), .json or .jsonl file, or `None`: the model writes its own text.
        tokenizer: tokenizer for texts and messages.
        samples: how many samples at most.
        max_length: tokens a sample is cut to, unless it holds an image or the like; never more than the model has
            positions.
        batch_size: samples a batch (a `DataLoader` keeps its own).

    Raises:
        ValueError: if there are no samples, a sample has no tokens, or its form is unknown.
        FileNotFoundError: if a path names no file.
    """
    max_length = min(max_length, position_limit(model) or max_length)
    if isinstance(data, DataLoader):
        batches = list(_take_from_loader(data, samples))
    else:
        if data is None:
            drawn: list[Any] = write_calibration_samples(model, samples, min(max_length, SELF_WRITTEN_LENGTH))
        else:
            drawn = draw_samples(data, samples)
        encoded = [_encode(sample, index, model, tokenizer, max_length) for index, sample in enumerate(drawn)]
        encoded.sort(key=lambda sample: (sorted(sample), len(sample["input_ids"]) if "input_ids" in sample else 0))
        alike = [list(group) for _, group in groupby(encoded, key=sorted)]  # with an image apart from without
        batches = [_collate(group[i : i + batch_size]) for group in alike for i in range(0, len(group), batch_size)]
    if not batches:
        raise ValueError(
            f"The calibration data ({type(data).__name__}) holds no samples. Give at least one text; 50 to 100 are "
            "usual. With None the model writes its own."
        )
    return batches


def position_limit(model: nn.Module) -> int | None:
    """How many positions a model has, from its config; `None` if that does not say."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    padding = next((m.padding_idx for m in tables if isinstance(m, nn.Embedding)), None)
    return limit if padding is None else limit - padding - 1  # RoBERTa's positions start after that of padding


def batch_sample_count(batch: Batch) -> int:
    """Number of samples in a batch: the first dimension of its `input_ids`, or of its first tensor that has one.

    Raises:
        ValueError: if it holds no such tensor.
    """
    tensors = [batch.get("input_ids"), *batch.values()]
    sizes = [value.shape[0] for value in tensors if isinstance(value, torch.Tensor) and value.ndim > 0]
    if not sizes:
        kinds = {key: type(value).__name__ for key, value in batch.items()}
        raise ValueError(
            f"a batch of the calibration DataLoader holds {kinds}; allowed: tensors of samples, as model(**batch) "
            "takes them. Give texts as a list or a Dataset, or a collate_fn that tokenizes them."
        )
    return sizes[0]


def batch_token_count(batch: Batch) -> int:
    """Tokens of a batch, padding not counted; 0 for one of images or sounds."""
    for name in ("attention_mask", "decoder_attention_mask"):
        if batch.get(name) is not None:
            return int(batch[name].sum())
    return batch["input_ids"].numel() if "input_ids" in batch else 0


def token_masks(batch: Mapping[str, Any], in_decoder: bool) -> list[torch.Tensor]:
    """Masks [samples, tokens] of the tokens that a stack may read: first that of its own, then of the other's."""
    names = ["attention_mask", "decoder_attention_mask"]
    masks = [batch.get(name) for name in (reversed(names) if in_decoder else names)]
    return [mask for mask in masks if isinstance(mask, torch.Tensor) and mask.ndim == 2]


def mask_of(masks: Sequence[torch.Tensor], shape: torch.Size) -> torch.Tensor | None:
    """The first mask that is about tokens in this shape, [samples, tokens]."""
    return next((mask for mask in masks if mask.shape == shape), None)


def real_tokens(values: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """[samples, tokens, features] to [real tokens, features]; all of them if no mask is about these tokens."""
    mask = mask_of(masks, values.shape[:-1])
    return values.flatten(0, -2) if mask is None else values[mask.to(values.device).bool()]


def _encode(sample: Any, index: int, model: nn.Module, tokenizer: Any, max_length: int) -> Batch:
    """One sample as a dict of lists of token ids, or of tensors for a sample that is not text."""
    if isinstance(sample, str):
        sample = {"text": sample}
    if not isinstance(sample, Mapping):
        raise ValueError(
            f"calibration sample {index} is a {type(sample).__name__}; allowed: a str, or a dict with one of "
            f"{list(_TEXT_KEYS)}"
        )
    sample = {key: value for key, value in sample.items() if value is not None}  # as Datasets fill columns up
    if "input_ids" in sample:
        _check_one_sample(sample["input_ids"], index)
        sample = _without_padding(sample)
        tokens = torch.as_tensor(sample["input_ids"]).flatten().tolist()
    elif "messages" in sample:
        chat = (tokenizer or _load_tokenizer(model)).apply_chat_template(sample["messages"], return_dict=True)
        tokens = chat["input_ids"]
    elif "text" in sample:
        tokens = (tokenizer or _load_tokenizer(model))(
            sample["text"], truncation=True, max_length=max_length
        ).input_ids
    else:
        tensors = {key: torch.as_tensor(value) for key, value in sample.items() if not isinstance(value, str)}
        named = set(inspect.signature(model.forward).parameters) - {"labels", "args", "kwargs"}
        if not named & tensors.keys():
            raise ValueError(
                f"calibration sample {index} has keys {sorted(sample)}; it needs one of {list(_TEXT_KEYS)}"
            )
        return tensors
    if not tokens:
        raise ValueError(f"calibration sample {index} has no tokens: {str(sample)[:80]!r}. Remove empty samples.")
    others = _other_inputs(sample, tokens, model)
    if not any(value.is_floating_point() and value.ndim > 1 for value in others.values()):
        tokens = tokens[:max_length]
        others = {key: value[:max_length] if value.ndim == 1 else value for key, value in others.items()}
    return {"input_ids": tokens, **others}  # an image or the like has tokens for its parts: none may be missing


def _check_one_sample(input_ids: Any, index: int) -> None:
    shape = tuple(torch.as_tensor(input_ids).shape)
    if math.prod(shape[:-1]) > 1:
        raise ValueError(
            f"calibration sample {index} has input_ids of shape {shape}, which are several samples; allowed: one "
            "sample an entry, or a DataLoader, which yields batches"
        )


def _without_padding(sample: dict[str, Any]) -> dict[str, Any]:
    """A tokenized sample without the positions that its attention mask leaves out, also in other inputs as long."""
    if "attention_mask" not in sample:
        return sample
    mask = torch.as_tensor(sample["attention_mask"]).flatten().bool()
    tokens = torch.as_tensor(sample["input_ids"]).flatten()
    if len(mask) != len(tokens):
        raise ValueError(
            f"a sample has {len(tokens)} input_ids and an attention_mask of {len(mask)}; give one a token"
        )
    unpadded = {"input_ids": tokens[mask]}
    for key, value in sample.items():
        if key == "labels" or key.startswith("decoder_") or isinstance(value, str):
            continue  # what a decoder reads has a length of its own
        tensor = torch.as_tensor(value)
        if tensor.ndim == 1 and len(tensor) == len(mask):
            unpadded[key] = tensor[mask]
    return {**sample, **unpadded}


def _other_inputs(sample: Mapping[str, Any], tokens: list[int], model: nn.Module) -> Batch:
    """What a sample holds besides its tokens for `model.forward`, as tensors."""
    accepted = set(inspect.signature(model.forward).parameters) - {"input_ids", "inputs_embeds", "attention_mask"}
    has_decoder = is_encoder_decoder(model)
    if not has_decoder:
        accepted.discard("labels")
    found = {key: value for key, value in sample.items() if key in accepted}
    if has_decoder and "labels" in accepted and not {"labels", *_DECODER_INPUTS} & found.keys():
        found["labels"] = tokens  # the decoder has to read something; this is what Bart does on its own
    tensors = {key: torch.as_tensor(value) for key, value in found.items() if not isinstance(value, str)}
    for key in ("labels", "decoder_input_ids"):
        if key in tensors and "decoder_attention_mask" in accepted:
            tensors.setdefault("decoder_attention_mask", (tensors[key] != -100).long())  # what the loss leaves out
    return tensors


def _load_tokenizer(model: nn.Module) -> Any:
    from transformers import AutoTokenizer

    name = getattr(model, "name_or_path", None)
    try:
        if not name:
            raise OSError("the model has no name_or_path")
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"calibration data is text, and no tokenizer could be loaded for {type(model).__name__} ({name!r}: "
            f"{error}). Pass calibration_tokenizer, or samples with 'input_ids'."
        ) from error


def _collate(samples: list[Batch]) -> Batch:
    if "input_ids" not in samples[0]:
        return default_collate(samples)
    tokens = [torch.tensor(sample["input_ids"]) for sample in samples]
    batch = {"input_ids": _pad(tokens, 0), "attention_mask": _pad([torch.ones_like(row) for row in tokens], 0)}
    for key in samples[0].keys() - batch.keys():
        rows = [sample[key] for sample in samples]
        if rows[0].ndim != 1 and len({row.shape for row in rows}) > 1:
            raise ValueError(
                f"calibration samples hold {key!r} of different shapes: "
                f"{[tuple(row.shape) for row in rows[:3]]}. Give a DataLoader whose collate_fn makes "
                "batches as the model takes them."
            )
        batch[key] = _pad(rows, -100 if key == "labels" else 0)
    return batch


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    """Stacks rows, one-dimensional ones of different lengths padded on the right."""
    if rows[0].ndim == 1:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    return torch.stack(rows)


def _take_from_loader(loader: DataLoader, samples: int) -> Iterator[Batch]:
    taken = 0
    for batch in loader:
        if taken >= samples:
            return
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"the calibration DataLoader yields a {type(batch).__name__}; each batch must be a dict of tensors, "
                "as model(**batch) takes it"
            )
        count = batch_sample_count(dict(batch))
        rows = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim > 0}
        # Patches of images are not to be told apart by sample: such a batch is taken whole.
        size = min(count, samples - taken) if all(len(value) == count for value in rows.values()) else count
        taken += size
        yield {key: value[:size] if key in rows and size < count else value for key, value in batch.items()}
