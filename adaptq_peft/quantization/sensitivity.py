"""How much the loss rises when a linear is stored in fewer bits: predicted for all linears from a few backward passes.

Rounding one linear changes its outputs by d_t on token t. To second order the divergence of the model's predictions is

    KL(original || rounded) = 1/2 E[(sum_t g_t . d_t)^2],    g_t = gradient of log p(y | x) at the output on token t

with y drawn from the model's own predictions: the quadratic form of the Fisher information in the direction that the
rounding takes (Fisher-weighted errors as in SqueezeLLM, Kim et al. 2023, arXiv:2306.07629; the expectation over the
model's own labels as in Martens 2014, arXiv:1412.1193). On text that the model predicts as well as it can, KL is the
rise of the loss. No part of the form is approximated: neither the correlation of the inputs, which calibrated rounding
lives on, nor that of tokens. What is left out are higher orders, and the interaction of several rounded linears: rises
are added up.

The expectation is a mean over sequences, so its relative standard error is about sqrt(2 / sequences) for each linear.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..evaluation_mode import evaluation_mode
from ..offloading import input_device
from ..selection.calibration import Batch, real_tokens, token_masks

#: Sequences that are looked at: a relative standard error of about 0.14 for each linear, less for sums of several.
SEQUENCES = 96
#: Tokens in each.
SEQUENCE_LENGTH = 128

Sensitivity = dict[str, dict[str, float]]
"""Dotted name of a linear -> name of a precision -> predicted rise of the loss in nats a token."""


def measure_sensitivity(
    model: nn.Module,
    candidates: Mapping[str, Mapping[str, nn.Module]],
    batches: Sequence[Batch],
    seed: int = 0,
) -> Sensitivity:
    """Predict what each candidate would cost in the place of its linear, all others left as they are.

    One forward and one backward pass for each batch, without gradients of weights; candidates run beside the linears.
    The model is not changed: flags, gradients and training mode are as before afterwards.

    Args:
        model: the original model, on its device, with weights. Its output has `logits` [..., classes].
        candidates: dotted name of each linear -> name of a precision -> a layer for its place, on its device. It is
            put into evaluation mode: on a CPU int8 rounds its inputs only there. All are held at once: NF4 and int8
            take 1.52 bytes a weight together. To make them anew for each batch of one sequence would take three times
            as long (docs/experiment_log.md).
        batches: keyword arguments for `model.forward`. One sequence each gives the least noise for the tokens.
        seed: seed of the labels that are drawn from the model's predictions.

    Returns:
        For each linear and precision the rise of the loss in nats a prediction, never negative. A linear that did not
        run on the batches has 0.

    Raises:
        ValueError: if there are no batches, or the model's output has no logits or is not finite.
    """
    if not batches:
        raise ValueError("sensitivities need calibration batches, and there are none")
    for layers in candidates.values():
        for layer in layers.values():
            layer.eval()
    sums: Sensitivity = {name: dict.fromkeys(layers, 0.0) for name, layers in candidates.items()}
    predictions = 0
    device = input_device(model)
    generator = torch.Generator(device).manual_seed(seed)
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with evaluation_mode(model), _without_gradients_of_weights(model), torch.enable_grad():
        for batch in tqdm(batches, desc="Measuring sensitivities", unit="batch", delay=2):
            inputs = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
            products: dict[tuple[str, str], float] = {}
            with _products_with_gradients(model, candidates, products):
                logits = _logits(model, model(**{**options, **inputs}))
                log_likelihood, count = _draw_labels(logits, inputs, generator)
                log_likelihood.backward()
            for (name, precision), product in products.items():
                sums[name][precision] += product**2 / 2
            predictions += count
    return {name: {key: _finite(name, total / predictions) for key, total in of.items()} for name, of in sums.items()}


@contextmanager
def _products_with_gradients(
    model: nn.Module, candidates: Mapping[str, Mapping[str, nn.Module]], products: dict[tuple[str, str], float]
) -> Iterator[None]:
    """Within the context a backward pass adds to `products` sum_t g_t . d_t of each linear and precision."""
    handles = [
        model.get_submodule(name).register_forward_hook(_hook(name, layers, products))
        for name, layers in candidates.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    name: str, layers: Mapping[str, nn.Module], products: dict[tuple[str, str], float]
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        with torch.no_grad():
            changes = {precision: layer(*args).to(output.dtype).sub_(output) for precision, layer in layers.items()}
        if not output.requires_grad:  # nothing below it is differentiated
            output.requires_grad_(True)

        def multiply(gradient: Tensor) -> None:
            for precision, change in changes.items():
                product = torch.sum(gradient * change, dtype=torch.float32)
                products[name, precision] = products.get((name, precision), 0.0) + float(product)

        output.register_hook(multiply)
        return output

    return hook


@contextmanager
def _without_gradients_of_weights(model: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _logits(model: nn.Module, output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the output of {type(model).__name__} has no logits, so there is no loss whose rise could be predicted. "
            "Use a model with a head, or a quantization and a selection_strategy that need no sensitivities."
        )
    if logits.shape[-1] == 1:
        raise ValueError(
            f"{type(model).__name__} gives one logit, a score, so there are no predictions whose loss could rise. Use "
            "a quantization and a selection_strategy that need no sensitivities."
        )
    return logits


def _draw_labels(logits: Tensor, inputs: Mapping[str, Any], generator: torch.Generator) -> tuple[Tensor, int]:
    """The log likelihood of labels drawn from the predictions on real tokens, summed, and how many they are."""
    rows = (real_tokens(logits, token_masks(inputs, in_decoder=True)) if logits.ndim > 2 else logits).float()
    if not torch.isfinite(rows).all():
        raise ValueError(
            "the model's predictions on the calibration text are not finite. Load it in bfloat16 or float32, or look "
            "for a broken weight in it."
        )
    log_probabilities = rows.log_softmax(dim=-1)
    labels = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
    return log_probabilities.gather(1, labels).sum(), len(rows)


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(
            f"the sensitivity of {name} is {value}: gradients overflow in the model's dtype. Load it in bfloat16 or "
            "float32."
        )
    return value
