"""Algorithm 1: how strongly each block responds to the domain data."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..evaluation_mode import evaluation_mode
from ..offloading import input_device
from .blocks import Block, find_blocks, hidden_states_of
from .calibration import Batch, batch_sample_count, batch_token_count, calibration_batches, mask_of, token_masks
from .streaming import streamed_model

RECOMMENDED_SAMPLES = 50


@dataclass(frozen=True)
class ActivationProfile:
    """Activation statistics of the L blocks of a model, each averaged over samples.

    Args:
        magnitude: a_l, the mean over samples of mean(abs(H_l)), H_l the output of block l; L floats.
        update: mean of norm(H_l - H_(l-1)) / norm(H_(l-1)) over tokens, then over samples; L floats.
        num_samples: samples profiled.
        num_tokens: tokens profiled, padding not counted.
        general_magnitude: a_l on general data; `None` if no general data was given.
        sensitivity: predicted rise of the general loss if the block's linears are quantized, in nats a token, L
            floats; `None` if no strategy asked for it.
    """

    magnitude: list[float]
    update: list[float]
    num_samples: int
    num_tokens: int
    general_magnitude: list[float] | None = None
    sensitivity: list[float] | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; `AdaptQConfig(profile=path)` reads it."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ActivationProfile:
        """Read what `save` or `adaptq profile` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it does not hold a profile.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{str(path)!r} does not hold an activation profile ({error}); give a file that `adaptq profile` or "
                "ActivationProfile.save wrote"
            ) from error


def profile_activations(
    model: nn.Module | str | os.PathLike[str],
    data: Any = None,
    *,
    general_data: Any = None,
    tokenizer: Any = None,
    samples: int = 100,
    max_length: int = 512,
    batch_size: int = 8,
    layers_pattern: str | list[str] | None = None,
) -> ActivationProfile:
    """Profile the blocks of a model on calibration data (Algorithm 1 of the paper).

    Forward passes only, stopped when all blocks have run; running sums in float32; no activation is kept. Padding
    tokens do not count. Hooks, training mode and flags of the model are as before afterwards, also after an error.

    Args:
        model: a model with transformer blocks, on its device; or folder or Hub repository of a checkpoint in
            safetensors files, which is profiled without loading its blocks: a layer is in memory only while it runs,
            and each batch reads all blocks from the disk once. The profile is the same.
        data: calibration data of the domain, in any form that `AdaptQConfig.calibration_data` takes. Default `None`:
            the model writes its own text, with a warning.
        general_data: general text in the same forms, for strategies that compare. Default `None`.
        tokenizer: tokenizer for texts. Default `None`: that of the model's `name_or_path`.
        samples: samples used at most. Default 100; fewer than 50 gives a warning.
        max_length: tokens a sample is cut to, unless it holds an image or the like. Default 512.
        batch_size: samples in a forward pass. Default 8.
        layers_pattern: name of the list of blocks, where it can't be found.

    Raises:
        ValueError: if no blocks are found, the model is on the meta device, the data is empty or in an unknown form,
            activations are not finite, or a checkpoint is to write its own text.
    """
    if isinstance(model, (str, os.PathLike)):
        if data is None:
            raise ValueError(
                "no calibration data: to write its own text, a model on disk would be read once for each token. Pass "
                "calibration data, or load the model"
            )
        with streamed_model(model, layers_pattern=layers_pattern) as streamed:
            return profile_activations(
                streamed,
                data,
                general_data=general_data,
                tokenizer=tokenizer,
                samples=samples,
                max_length=max_length,
                batch_size=batch_size,
                layers_pattern=layers_pattern,
            )
    blocks = find_blocks(model, layers_pattern)
    if input_device(model).type == "meta":
        raise ValueError(
            f"{type(model).__name__} is on the meta device and has no weights to profile. Load them first, or give "
            "layers_to_transform or a profile made before."
        )
    if data is None:
        warnings.warn(
            "No calibration data: the model writes its own text to profile. Domain data selects better; pass "
            "calibration_data.",
            stacklevel=2,
        )
    options = {"tokenizer": tokenizer, "samples": samples, "max_length": max_length, "batch_size": batch_size}
    sums = _profile_batches(model, blocks, calibration_batches(model, data, **options))
    if sums.num_samples < RECOMMENDED_SAMPLES:
        warnings.warn(
            f"Profiled {sums.num_samples} calibration samples; the paper's limit is {RECOMMENDED_SAMPLES}. The "
            "selection may change with the sample.",
            stacklevel=2,
        )
    general = None
    if general_data is not None:
        general = _profile_batches(model, blocks, calibration_batches(model, general_data, **options))
    return ActivationProfile(
        magnitude=sums.mean_magnitude(),
        update=sums.mean_update(),
        num_samples=sums.num_samples,
        num_tokens=sums.num_tokens,
        general_magnitude=general.mean_magnitude() if general else None,
    )


class _StopForward(Exception):
    """Ends a forward pass when all blocks have run."""


class _RunningSums:
    """Sums over samples of the statistics of each block, fed by forward hooks."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.magnitude: list[torch.Tensor | float] = [0.0] * len(blocks)
        self.update: list[torch.Tensor | float] = [0.0] * len(blocks)
        self.num_samples = 0
        self.num_tokens = 0
        self._batch: Batch = {}
        self._not_run: set[int] = set()

    def begin(self, batch: Batch) -> None:
        """Take note of the batch that the next forward pass runs on."""
        self._batch = batch
        for mask in token_masks(batch, in_decoder=False):
            empty = (mask.sum(dim=-1) == 0).nonzero().flatten().tolist()
            if empty:
                raise ValueError(
                    f"calibration sample {self.num_samples + empty[0]} has no tokens: its attention mask is all zero. "
                    "Remove empty samples."
                )
        self._not_run = set(range(len(self.blocks)))
        self.num_samples += batch_sample_count(batch)
        self.num_tokens += batch_token_count(batch)

    def add(self, index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add block `index`, with input `before` and output `after`, both [samples, tokens, features].

        Raises _StopForward when all blocks have run.
        """
        if before.shape != after.shape:
            raise ValueError(
                f"block {index} ({self.blocks[index].name}) turns hidden states of shape {tuple(before.shape)} into "
                f"{tuple(after.shape)}; only blocks that keep the shape can be profiled. Give layers_to_transform."
            )
        magnitude = torch.linalg.vector_norm(after, ord=1, dim=-1, dtype=torch.float32) / after.shape[-1]
        change = torch.linalg.vector_norm(after - before, dim=-1, dtype=torch.float32)
        update = change / torch.linalg.vector_norm(before, dim=-1, dtype=torch.float32).clamp_min(1e-12)
        masks = token_masks(self._batch, self.blocks[index].in_decoder)
        self.magnitude[index] += _sample_means(magnitude, masks).sum()
        self.update[index] += _sample_means(update, masks).sum()
        self._not_run.discard(index)
        if not self._not_run:  # towers of a model run in another order than they are listed in
            raise _StopForward

    def first_not_run(self) -> str:
        """Name of the first block that has not run on this batch."""
        return self.blocks[min(self._not_run)].name

    def mean_magnitude(self) -> list[float]:
        """a_l for each block. Raises ValueError, naming the first block whose activations are not finite."""
        means = [float(total) / self.num_samples for total in self.magnitude]
        for block, mean in zip(self.blocks, means, strict=True):
            if not torch.isfinite(torch.tensor(mean)):
                raise ValueError(
                    f"block {block.index} ({block.name}) has activations that are not finite on the calibration data. "
                    "Load the model in bfloat16 or float32, or look for a broken weight in it."
                )
        return means

    def mean_update(self) -> list[float]:
        """The relative change of each block, averaged over samples."""
        return [float(total) / self.num_samples for total in self.update]


def _profile_batches(model: nn.Module, blocks: list[Block], batches: list[Batch]) -> _RunningSums:
    device = input_device(model)
    sums = _RunningSums(blocks)
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    progress = tqdm(batches, desc="Profiling activations", unit="batch", delay=2)
    with evaluation_mode(model), _hooks(blocks, sums), torch.no_grad():
        for batch in progress:
            on_device = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
            sums.begin(on_device)
            try:
                model(**{**extra, **on_device})
            except _StopForward:
                continue
            raise ValueError(
                f"the block {sums.first_not_run()} did not run in a forward pass of {type(model).__name__}; check "
                "layers_pattern, and that the calibration data has an input for each part of the model"
            )
    return sums


@contextmanager
def _hooks(blocks: list[Block], sums: _RunningSums) -> Iterator[None]:
    handles = []
    try:
        for block in blocks:
            handles.append(block.module.register_forward_hook(_recorder(block.index, sums), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorder(index: int, sums: _RunningSums) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        sums.add(index, hidden_states_of(args or kwargs), hidden_states_of(output))

    return record


def _sample_means(values: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
    """Mean over the real tokens of each sample: [samples, tokens] to [samples].

    Some models have tokens first (XLNet), or several streams of hidden states before the samples (Gemma 3n).
    """
    shapes = {mask.shape for mask in masks}
    if values.shape[1:] in shapes:
        values = values.mean(dim=0)
    elif values.ndim == 2 and values.shape not in shapes and values.t().shape in shapes:
        values = values.t()
    mask = mask_of(masks, values.shape)
    if mask is None:
        return values.flatten(1).mean(dim=1)
    weights = mask.to(values)
    return (values * weights).sum(dim=1) / weights.sum(dim=1)
