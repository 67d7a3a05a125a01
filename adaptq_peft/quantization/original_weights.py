"""Gives a quantized linear its original weights back."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..module_names import base_name
from .arrival import dtype_now, loaded_dtype
from .backends import dequantize_linear, origin_of, quantize_linear, settings_of
from .checkpoint_weights import CheckpointWeights, OriginalWeightsUnavailable
from .origin import linear_from_tensors

#: Values of `AdaptQConfig.original_weights` beside the name of a checkpoint.
ORIGINAL_WEIGHTS = ("checkpoint", "keep", "dequantized")

#: Quantizing the right weights again gives the same bytes; on another device a few ties may round the other way.
MAX_DIFFERING_BYTES = 0.01
#: What rounding to 4 bits may change of a weight, relative, where the codes can't be compared: they were calibrated,
#: or read from a file. Plain rounding changes 0.1, and about twice as much with each bit less.
MAX_ROUNDING_ERROR = 0.25


def names_checkpoint(source: object) -> bool:
    """Whether a value of `AdaptQConfig.original_weights` is a folder, or looks like the name of a Hub repository."""
    if not isinstance(source, str) or source in ORIGINAL_WEIGHTS:
        return False
    return os.path.isdir(source) or "/" in source


def named_checkpoint(sources: Iterable[str]) -> str:
    """The first of the values of `AdaptQConfig.original_weights` that names a checkpoint, else "checkpoint"."""
    return next((source for source in sources if names_checkpoint(source)), "checkpoint")


class OriginalWeights:
    """Where the original weights of quantized linears come from.

    Those that were kept when they were quantized come first, then the safetensors checkpoint of the model.

    Args:
        model: the transformers model.
        source: one of `ORIGINAL_WEIGHTS`, or the folder or Hub repository of a checkpoint to take instead of the
            model's own. "dequantized" takes neither: the rounded weights become the originals.
        revision: of the model's own checkpoint on the Hub; `None`: the one that the model's config names, else the
            default branch.
    """

    def __init__(self, model: nn.Module, source: str, revision: str | None = None) -> None:
        self._source = source
        path = source if names_checkpoint(source) else None
        self._checkpoint = CheckpointWeights(model, path, revision=None if path else revision)

    def restore(self, name: str, quantized: nn.Module) -> nn.Module:
        """A plain, frozen layer with the original weights of a quantized one, on its device and in its original dtype.

        Args:
            name: dotted name of the layer in the model.
            quantized: a quantized linear; stays as it is.

        Raises:
            OriginalWeightsUnavailable: if they were not kept, and the checkpoint can't be read.
            ValueError: if the weights of the checkpoint are not those that were quantized.
        """
        if self._source == "dequantized":
            return dequantize_linear(quantized)
        kept = origin_of(quantized).kept
        if kept is not None:
            return kept.to(_device(quantized)).train(quantized.training).requires_grad_(False)
        return self._from_checkpoint(base_name(name), quantized)

    def _from_checkpoint(self, name: str, quantized: nn.Module) -> nn.Module:
        origin, source = origin_of(quantized), cast(Any, quantized)
        try:
            weight = self._checkpoint.read(f"{name}.weight").to(_device(quantized), origin.dtype)
            bias = source.bias
            if bias is not None and not isinstance(bias, nn.Parameter):  # GPTQ has it in float16, whatever it was in
                bias = self._checkpoint.read(f"{name}.bias").to(_device(quantized))
        except OriginalWeightsUnavailable as error:
            raise OriginalWeightsUnavailable(
                f'{error} Without them: AdaptQConfig(original_weights="keep") on the adapter that quantizes keeps '
                'them, "dequantized" trains on the rounded weights, and a folder or Hub repository names the 16-bit '
                "checkpoint of a model that was loaded from a quantized one."
            ) from error
        linear = linear_from_tensors(origin.linear_class, weight, bias)
        shape = weight.t().shape if origin.linear_class is Conv1D else weight.shape
        if shape != (source.out_features, source.in_features) or not _quantizes_to(linear, quantized):
            raise ValueError(
                f"{name}.weight in the checkpoint is not what {name} of this model was quantized from. Load the model "
                "from its own checkpoint, or name in original_weights the 16-bit one that it was made from, or use "
                'AdaptQConfig(original_weights="dequantized") to train on the rounded weights.'
            )
        return linear.train(quantized.training)


def follow_cast(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Restored linears in the dtype that `model.to(...)` has cast their model to since it was loaded.

    Args:
        model: the model, as it is now.
        linears: plain linears by name; those in another dtype than the model was loaded in stay as they are.
    """
    before, now = loaded_dtype(model), dtype_now(model)
    if before is None or now is None or before == now:
        return linears
    return {name: _cast(linear, before, now) for name, linear in linears.items()}


def _cast(linear: Any, before: torch.dtype, now: torch.dtype) -> nn.Module:
    """A copy: the linear may be one that an adapter keeps."""
    if linear.weight.dtype != before:
        return linear  # type: ignore[no-any-return]
    return linear_from_tensors(type(linear), linear.weight.detach().to(now), linear.bias).train(linear.training)


def _device(quantized: Any) -> torch.device:
    return quantized.weight.device


def _quantizes_to(linear: nn.Module, quantized: nn.Module) -> bool:
    settings = settings_of(quantized)
    if not origin_of(quantized).is_sample_of(cast(Any, linear).weight):
        return False
    if origin_of(quantized).calibrated:  # other codes than those of plain rounding
        plain = cast(Any, dequantize_linear(quantized)).weight.float()
        original = cast(Any, linear).weight.float()
        # Other weights of the same size would differ by 1.4.
        allowed = min(MAX_ROUNDING_ERROR * 2 ** (4 - settings.bits), 0.75)
        return bool((plain - original).norm() <= allowed * original.norm())
    again: Any = quantize_linear(linear, settings).weight
    before: Any = quantized.weight
    differing = again.data.view(torch.uint8) != before.data.view(torch.uint8)
    return int(differing.count_nonzero()) <= MAX_DIFFERING_BYTES * differing.numel()
