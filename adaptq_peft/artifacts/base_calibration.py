"""Quantizes the blocks of a base model once, calibrated on text, for the adapters that will share it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import BitsAndBytesConfig

from ..block_forms import linears_of, linears_with_reasons
from ..fingerprint import fingerprint_base, sample_weights
from ..layer import AdaptQLayer
from ..quantization import (
    QuantizationSettings,
    check_backend,
    is_quantized,
    quantize_linear,
    resolve_quantization,
)
from ..quantization.calibrated import (
    CalibratedLinears,
    mixed_calibration_batches,
    quantize_calibrated,
    resolve_calibration_method,
)
from ..quantization.calibrated.text import CALIBRATION_TOKENS
from ..selection import Block, find_blocks
from ..selection.calibration import batch_token_count
from ..selection.written_text import can_write_text
from .quantized_base import BaseDescription, QuantizedBase, QuantizedBaseReference, write_quantized_base

SHARED_METHOD = "descent"
"""What "auto" means for codes that adapters with different frozen blocks share."""


def quantize_base(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    blocks: Sequence[int] | None = None,
    quantization: str | BitsAndBytesConfig = "nf4",
    calibration: str = "auto",
    data: Any = None,
    general_data: Any = None,
    tokenizer: Any = None,
    tokens: int = CALIBRATION_TOKENS,
    layers_pattern: str | list[str] | None = None,
) -> QuantizedBase:
    """Calibrate the 4-bit codes of a model's blocks and write them, for `AdaptQConfig(quantized_base=folder)`.

    Each block is calibrated on the inputs that the quantized blocks before it give. The model is not changed.

    Args:
        model: the original model, not quantized and without adapters.
        folder: where `quantized_base.safetensors` is written.
        blocks: indices of the blocks, from 0. `None` (default): all, so that each adapter finds those it freezes.
        quantization: "nf4" (default), "fp4" or a `transformers.BitsAndBytesConfig` with 4 bits, as in `AdaptQConfig`.
        calibration: as `quantization_calibration` of `AdaptQConfig`. Default "auto", which is "descent" here:
            "asymmetric" makes up for what was rounded before: right only for adapters that freeze all `blocks`.
        data: texts of the domain, in any form that `AdaptQConfig.calibration_data` takes.
        general_data: general texts. Beside both kinds the model writes text itself.
        tokenizer: for texts. `None` (default): that of the model's `name_or_path`.
        tokens: tokens of text in all, about. Time grows with them.
        layers_pattern: name of the list of blocks, where it can't be found.

    Returns:
        The base, opened.

    Raises:
        ValueError: if the model is quantized, has adapters or is not whole in memory, an index is out of range, the
            quantization or calibration is none of those above, or there is nothing to quantize.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"{os.fspath(folder)!r} is a file; give a folder for the quantized base")
    settings = _settings(quantization)
    method_name = _method_name(calibration)
    method = resolve_calibration_method(method_name)
    found = find_blocks(model, layers_pattern)
    _check_original(model, found)
    linears, left = _linears(model, _chosen(found, blocks), settings)
    if not linears:
        raise ValueError(f"there is no linear to quantize in these blocks; left as they are: {left}")
    batches = mixed_calibration_batches(model, data, general_data, tokenizer=tokenizer, tokens=tokens)
    result = quantize_calibrated(model, found, linears, settings, batches, method)
    description = BaseDescription(
        quant_type=settings.quant_type,
        nested_absmax=settings.nested_absmax,
        calibration={
            "method": method_name,
            "text": _kinds_of_text(model, data, general_data),
            "tokens": sum(map(batch_token_count, batches)),
        },
        fingerprint=cast("dict[str, Any]", fingerprint_base(model, found, ())),  # not on the meta device
        weights=sample_weights(model, linears.keys()),
        plain=result.plain,
    )
    write_quantized_base(folder, _all_layers(linears, result, settings), description)
    return QuantizedBase(QuantizedBaseReference(os.fspath(folder)))


def _settings(quantization: str | BitsAndBytesConfig) -> QuantizationSettings:
    known = quantization in ("nf4", "fp4") or isinstance(quantization, BitsAndBytesConfig)
    settings = resolve_quantization(quantization) if known else None
    if settings is None or settings.bits != 4:
        raise ValueError(
            f"quantization is {quantization!r}; a quantized base holds 4-bit codes: 'nf4', 'fp4', or a "
            "BitsAndBytesConfig with load_in_4bit=True"
        )
    check_backend(settings)
    return settings


def _method_name(calibration: str | None) -> str:
    if calibration in (None, "none"):
        raise ValueError(
            f"calibration is {calibration!r}: plain rounding gives the same codes at each load, so there is nothing "
            "to store. Leave quantized_base out of AdaptQConfig, or choose a calibration: 'auto'."
        )
    return SHARED_METHOD if calibration == "auto" else cast(str, calibration)


def _check_original(model: nn.Module, blocks: Sequence[Block]) -> None:
    for block in blocks:
        for name, module in linears_of(block):
            if is_quantized(module) or isinstance(module, AdaptQLayer):
                raise ValueError(
                    f"{name} is quantized or has an adapter; quantize_base needs the original model, as "
                    "from_pretrained loads it without a quantization_config"
                )
            if module.get_parameter("weight").is_meta:
                raise ValueError(
                    f"the weight of {name} is not in memory: it is offloaded, or on the meta device; quantize_base "
                    "needs the whole model"
                )


def _chosen(blocks: Sequence[Block], indices: Sequence[int] | None) -> list[Block]:
    wanted = range(len(blocks)) if indices is None else indices
    bad = [index for index in wanted if not 0 <= index < len(blocks)]
    if bad:
        raise ValueError(f"blocks {bad} are not in the model, which has {len(blocks)}: 0 to {len(blocks) - 1}")
    return [block for block in blocks if block.index in wanted]


def _linears(
    model: nn.Module, chosen: Sequence[Block], settings: QuantizationSettings
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Those that an adapter would quantize, by dotted name, and the others with the reasons."""
    found = list(linears_with_reasons(model, chosen, settings, lambda name: False))
    left = {name: reason for name, _, reason in found if reason}
    return {name: linear for name, linear, reason in found if not reason}, left


def _all_layers(
    linears: dict[str, nn.Module], result: CalibratedLinears, settings: QuantizationSettings
) -> dict[str, nn.Module]:
    return {name: result.layers.get(name) or quantize_linear(linear, settings) for name, linear in linears.items()}


def _kinds_of_text(model: nn.Module, data: Any, general_data: Any) -> list[str]:
    given = [kind for kind in (data, general_data) if kind is not None]
    names = [Path(kind).name if isinstance(kind, (str, os.PathLike)) else "texts given in Python" for kind in given]
    return [*names, "written by the model"] if can_write_text(model) else names
