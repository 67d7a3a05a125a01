"""Tunes what costs no bits, so that the quantized model predicts what the original predicts.

Rounding leaves each block a little wrong, and the errors add up over the depth. Two kinds of numbers can make up for
part of it without a bit more: the scale of each output row of a 4-bit layer, which is a factor on its absmax values,
and the norms' weights, which stay in 16 bits anyway. They are trained by knowledge distillation (Hinton et al. 2015,
arXiv:1503.02531): KL(original || quantized) over the next token, on the calibration text. The codes do not change.
Scales of quantized weights are learned in FLUTE, too (arXiv:2407.10960).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from ...evaluation_mode import evaluation_mode
from .block_stream import Batch
from .grid import rescale_rows
from .text import can_write_text


@dataclass(frozen=True)
class DistillationSettings:
    """How the scales and norms are trained.

    Args:
        learning_rate: of Adam, relative to the size of what is trained; cosine decay to zero.
        epochs: passes over the calibration batches.
        positions: predictions compared in each sample, drawn anew for each batch: the head is expensive.
        seed: seed of the draws.
    """

    learning_rate: float = 2e-3
    epochs: int = 1
    positions: int = 128
    seed: int = 0


def distill(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    vectors: Sequence[str],
    batches: Sequence[Batch],
    settings: DistillationSettings,
) -> dict[str, Tensor]:
    """Train the row scales of 4-bit layers, which are changed in place, and some of the model's vectors.

    Args:
        model: the original, which returns `logits` [samples, tokens, vocabulary]. It is as before afterwards.
        layers: dotted name -> the `Linear4bit` that will replace it. Their absmax values are changed.
        vectors: dotted names of parameters of the model with one dimension (norms of the frozen blocks).
        batches: keyword arguments for `model.forward`.
        settings: how.

    Returns:
        The new value of each of `vectors`, in its own dtype.

    Raises:
        ValueError: if the model is not a causal language model.
    """
    if not can_write_text(model):
        raise ValueError(
            f"distillation compares predictions of the next token, and {type(model).__name__} is not a causal "
            "language model; use quantization_calibration='descent'"
        )
    rows = {name: _zero_rows(layer) for name, layer in layers.items()}
    originals = {name: model.get_parameter(name).detach() for name in vectors}
    shifts = {name: torch.zeros_like(original, dtype=torch.float32) for name, original in originals.items()}
    student = _Student(model, layers, rows, originals, shifts)
    with evaluation_mode(model), _all_frozen(model):
        _train(model, student, batches, settings)
    for name, layer in layers.items():
        rescale_rows(layer, 1 + rows[name].detach())
    return student.vectors()


def _zero_rows(layer: nn.Module) -> Tensor:
    """A zero for each output row of a `Linear4bit`, float32 [out]."""
    weight: Any = layer.weight
    return torch.zeros(weight.quant_state.shape[0], device=weight.device)


@dataclass
class _Student:
    """The model with 4-bit layers in place, row scales as hooks on them, and tuned vectors."""

    model: nn.Module
    layers: Mapping[str, nn.Module]
    rows: dict[str, Tensor]
    originals: dict[str, Tensor]
    shifts: dict[str, Tensor]

    def trained(self) -> list[Tensor]:
        return [tensor.requires_grad_() for tensor in (*self.rows.values(), *self.shifts.values())]

    def vectors(self) -> dict[str, Tensor]:
        """The tuned vectors: w + mean(abs(w)) * shift, so that one learning rate suits all."""
        return {name: self._shifted(name).detach() for name in self.originals}

    def _shifted(self, name: str) -> Tensor:
        original = self.originals[name]
        size = original.float().abs().mean()
        return (original.float() + size * self.shifts[name]).to(original.dtype)

    def logits(self, inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
        tuned = {name: self._shifted(name) for name in self.originals}
        with self._in_place():
            output = functional_call(self.model, tuned, (), dict(inputs))
        return _logits(output, positions)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        with ExitStack() as undo:
            for name, layer in self.layers.items():
                undo.callback(self.model.set_submodule, name, self.model.get_submodule(name))
                self.model.set_submodule(name, layer)
                undo.callback(layer.register_forward_hook(_scale_output(self.rows[name])).remove)
            yield


def _train(model: nn.Module, student: _Student, batches: Sequence[Batch], settings: DistillationSettings) -> None:
    generator = torch.Generator().manual_seed(settings.seed)
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(student.trained(), lr=settings.learning_rate, betas=(0.9, 0.95))
    steps = settings.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    order = [i for _ in range(settings.epochs) for i in torch.randperm(len(batches), generator=generator).tolist()]
    for index in tqdm(order, desc="Distilling scales", unit="batch", delay=2):
        batch = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batches[index].items()}
        loss = _divergence(model, student, batch, settings.positions, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _divergence(
    model: nn.Module, student: _Student, batch: Batch, positions: int, generator: torch.Generator
) -> Tensor:
    """Mean KL(original || quantized) in nats over drawn positions of a batch, padding not counted."""
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    length = batch["input_ids"].shape[1]
    chosen = torch.randperm(length, generator=generator)[:positions].sort().values.to(batch["input_ids"].device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        extra["logits_to_keep"] = chosen
    inputs = {**extra, **batch}
    with torch.no_grad():
        expected = _logits(model(**inputs), chosen).float().log_softmax(dim=-1)
    found = student.logits(inputs, chosen).float().log_softmax(dim=-1)
    divergence = (expected.exp() * (expected - found)).sum(dim=-1)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, chosen]
    return (divergence * mask).sum() / mask.sum().clamp_min(1)


def _logits(output: Any, positions: Tensor) -> Tensor:
    """The logits at `positions`, [samples, positions, vocabulary], whether or not the model computed all."""
    logits: Tensor = output.logits
    return logits if logits.shape[1] == len(positions) else logits[:, positions]


def _scale_output(row: Tensor) -> Any:
    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (1 + row).to(output.dtype)

    return scale


@contextmanager
def _all_frozen(model: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
