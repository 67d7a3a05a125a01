"""Quantizes the frozen blocks one after the other, each on the inputs that the quantized ones before it really give.

Blocks that are not quantized (the adapted ones, before any training) run as they are. Nothing of the model changes:
each block is quantized in a copy, of which only the 4-bit layers are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, repeat

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ...evaluation_mode import evaluation_mode
from ...selection import Block
from ...selection.calibration import Batch
from ..origin import linear_weight
from ..settings import QuantizationSettings
from .absmax_search import search_absmax
from .block_stream import BlockStream, linears_by_input
from .grid import GROUP_SIZE, Grid, GridWeight, StoredAbsmax, get_grid, largest_absmax, pack_linear, store_absmax
from .rounding import (
    DampedMoment,
    asymmetric_target,
    descend_by_coordinates,
    round_to_nearest,
    round_with_error_feedback,
)


@dataclass(frozen=True)
class CalibrationMethod:
    """How a weight is rounded, given the inputs of its layer.

    Args:
        search_absmax: whether the scales are searched, not just the largest magnitudes.
        error_feedback: whether later columns make up for the error of earlier ones (GPTQ).
        sweeps: visits of coordinate descent to each column afterwards.
        damping: share of the mean squared input that is added to each column's.
        asymmetric: whether the rounded layer, on the inputs that it gets from quantized layers, should give what the
            original gives on those that it gets from original ones (GPTAQ). It then makes up for what was rounded
            before it, too. Else both are compared on the same inputs.
    """

    search_absmax: bool = True
    error_feedback: bool = True
    sweeps: int = 0
    damping: float = 0.1
    asymmetric: bool = False


CALIBRATION_METHODS: dict[str, CalibrationMethod] = {
    "absmax": CalibrationMethod(error_feedback=False),
    "gptq": CalibrationMethod(search_absmax=False),
    "descent": CalibrationMethod(sweeps=2),
    "asymmetric": CalibrationMethod(sweeps=2, asymmetric=True),
}
"""The methods by name."""

BEST_METHOD = "asymmetric"
"""What "auto" means."""


@dataclass
class CalibratedLinears:
    """What calibrated quantization made.

    Args:
        layers: dotted name of each linear -> the `Linear4bit` to put in its place.
        error: dotted name -> what part of the mean square of the layer's output the rounding changes, on the
            calibration inputs; for an asymmetric method, of the output that it aims at.
        plain: dotted name -> why it can't be calibrated. These are not in `layers`; round them plainly.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)


def resolve_calibration_method(name: str) -> CalibrationMethod:
    """The method of a name; "auto" is `BEST_METHOD`.

    Raises:
        ValueError: if there is no such method.
    """
    method = CALIBRATION_METHODS.get(BEST_METHOD if name == "auto" else name)
    if method is None:
        raise ValueError(
            f"quantization_calibration is {name!r}; allowed: None (plain rounding), 'auto' or one of "
            f"{sorted(CALIBRATION_METHODS)}"
        )
    return method


def quantize_calibrated(
    model: nn.Module,
    blocks: Sequence[Block],
    linears: Mapping[str, nn.Module],
    settings: QuantizationSettings,
    batches: Sequence[Batch],
    method: CalibrationMethod,
) -> CalibratedLinears:
    """4-bit layers for linears of the frozen blocks, rounded so that the blocks' outputs on `batches` change little.

    Args:
        model: the model, on its device, in its own dtype. It is not changed.
        blocks: all its blocks, as `find_blocks` gives them.
        linears: dotted name -> `nn.Linear` or `Conv1D`, all within `blocks`: those to quantize.
        settings: 4 bits, "nf4" or "fp4", nested absmax or not.
        batches: keyword arguments for `model.forward`, as `calibration_batches` makes them. 16k tokens and more of
            mixed text are recommended: text of one kind alone helps only that kind.
        method: how to round.

    Raises:
        ValueError: if `settings` is not about 4 bits by bitsandbytes, there are no batches, a weight is offloaded, or
            a block can't be run by itself.
    """
    if settings.bits != 4 or settings.backend != "bitsandbytes":
        raise ValueError(
            "calibrated quantization writes 4-bit layers of bitsandbytes, and the settings ask for "
            f"{settings.describe()}"
        )
    if not batches:
        raise ValueError("calibrated quantization needs calibration batches, and there are none")
    offloaded = [name for name, linear in linears.items() if linear.get_parameter("weight").is_meta]
    if offloaded:
        raise ValueError(
            f"the weights of {len(offloaded)} linears are not in memory, the first is {offloaded[0]}: they are "
            "offloaded; calibrated quantization needs all of them. Set quantization_calibration=None."
        )
    result = CalibratedLinears()
    wanted = _calibratable(linears, result)
    with evaluation_mode(model), torch.no_grad():
        for stack in _stacks(blocks):
            _quantize_stack(model, stack, wanted, settings, batches, method, result)
    for name, layer in result.layers.items():
        layer.train(linears[name].training)
    result.plain.update(
        {name: "it did not run on the calibration text" for name in wanted if name not in result.layers}
    )
    return result


def _calibratable(linears: Mapping[str, nn.Module], result: CalibratedLinears) -> dict[str, nn.Module]:
    wanted: dict[str, nn.Module] = {}
    for name, linear in linears.items():
        in_features = linear_weight(linear).shape[1]
        if in_features % GROUP_SIZE:
            result.plain[name] = f"in_features {in_features} is no multiple of {GROUP_SIZE}: groups cross rows"
        else:
            wanted[name] = linear
    return wanted


def _stacks(blocks: Iterable[Block]) -> list[list[Block]]:
    """Runs of blocks that feed each other: an encoder's and a decoder's are two."""
    return [list(stack) for _, stack in groupby(blocks, key=lambda block: block.name.rpartition(".")[0])]


def _quantize_stack(
    model: nn.Module,
    stack: Sequence[Block],
    wanted: Mapping[str, nn.Module],
    settings: QuantizationSettings,
    batches: Sequence[Batch],
    method: CalibrationMethod,
    result: CalibratedLinears,
) -> None:
    names = {block.name: [name for name in wanted if name.startswith(f"{block.name}.")] for block in stack}
    touched = [index for index, block in enumerate(stack) if names[block.name]]
    if not touched:
        return
    stream = BlockStream.open(model, stack[touched[0] : touched[-1] + 1], batches)
    original = stream.fork() if method.asymmetric else None
    for block in tqdm(stack[touched[0] : touched[-1] + 1], desc="Calibrating blocks", unit="block", delay=2):
        if names[block.name]:
            quantized = _quantize_block(stream, original, block, names[block.name], settings, method, result)
            stream.advance(block, quantized)
        else:
            stream.advance(block)
        if original is not None:
            original.advance(block)


def _quantize_block(
    stream: BlockStream,
    original_stream: BlockStream | None,
    block: Block,
    names: Sequence[str],
    settings: QuantizationSettings,
    method: CalibrationMethod,
    result: CalibratedLinears,
) -> nn.Module:
    """Quantize the linears of a block in the order in which they run; returns a copy that computes as quantized."""
    quantized = copy.deepcopy(block.module)
    start = f"{block.name}."
    for group in linears_by_input(stream, block, quantized, [name.removeprefix(start) for name in names]):
        originals = None
        if original_stream is not None:
            originals = original_stream.inputs_of(block, block.module, block.module.get_submodule(group[0]))
        inputs = stream.inputs_of(block, quantized, quantized.get_submodule(group[0]))
        moment, cross = input_moments(inputs, originals, stream.token_counts())
        damped = DampedMoment(moment, method.damping)
        for name in group:
            linear, original = quantized.get_submodule(name), block.module.get_submodule(name)
            weight = linear_weight(original).float().contiguous()
            if cross is not None:
                weight = asymmetric_target(weight, damped, cross - moment)
            rounded = quantize_weight(weight, damped, settings, method, linear_weight(original).dtype)
            values = rounded.values(settings)
            result.layers[start + name] = pack_linear(rounded, original, settings)
            result.error[start + name] = relative_error(weight, values, moment)
            linear.weight.data = values.t().contiguous() if isinstance(linear, Conv1D) else values
    return quantized


def input_moments(
    inputs: Iterable[Tensor], originals: Iterable[Tensor] | None, tokens: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """The means of x x^T and of y x^T over all tokens of all batches, float32 [in, in] each.

    Args:
        inputs: x of each batch, [tokens, in].
        originals: y of each batch, what the layer gets in place of x in the original model; `None`: there is no second
            mean. Nor is there for a layer that does not see every token (an expert): the original may route others.
        tokens: how many tokens each batch has.
    """
    moment, cross, count, paired = None, None, 0, originals is not None
    others: Iterable[Tensor | None] = repeat(None) if originals is None else originals
    for batch, original, expected in zip(inputs, others, tokens, strict=False):
        if len(batch):
            moment = _add(moment, batch.float().t() @ batch.float())
            count += len(batch)
        paired = paired and original is not None and len(batch) == len(original) == expected
        if paired and original is not None:
            cross = _add(cross, original.float().t() @ batch.float())
    if moment is None:
        raise ValueError("the layer did not run on any calibration batch")
    return moment / count, cross / count if paired and cross is not None else None


def _add(total: Tensor | None, product: Tensor) -> Tensor:
    return product if total is None else total.add_(product)


def quantize_weight(
    weight: Tensor, moment: DampedMoment, settings: QuantizationSettings, method: CalibrationMethod, dtype: torch.dtype
) -> GridWeight:
    """Round one weight by a method.

    Args:
        weight: [out, in], float32, `in` a multiple of 64.
        moment: mean of x x^T over the layer's inputs, damped as the method says.
        settings: the 4-bit type and the nesting of absmax.
        method: how.
        dtype: dtype in which the weight will be read back.
    """
    grid = get_grid(settings.quant_type, weight.device)
    importance = moment.uncorrectable if method.error_feedback else moment.matrix.diagonal()
    absmax = search_absmax(weight, importance, grid) if method.search_absmax else largest_absmax(weight)
    scales = store_absmax(absmax, settings.nested_absmax)
    return GridWeight(_round(weight, scales, moment, grid, method), scales, dtype)


def _round(
    weight: Tensor, scales: StoredAbsmax, moment: DampedMoment, grid: Grid, method: CalibrationMethod
) -> Tensor:
    absmax = torch.where(scales.absmax == 0, torch.finfo(torch.float32).tiny, scales.absmax)
    if method.error_feedback:
        indices = round_with_error_feedback(weight, absmax, moment, grid)
    else:
        indices = round_to_nearest(weight, absmax, grid)
    if method.sweeps:
        indices = descend_by_coordinates(weight, indices, absmax, moment.matrix, grid, method.sweeps)
    return indices


def relative_error(weight: Tensor, values: Tensor, moment: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = W - Q: what part of the output's mean square the rounding changes."""
    error = weight - values.float()
    power = ((weight @ moment) * weight).sum()
    return float(((error @ moment) * error).sum() / power.clamp_min(torch.finfo(torch.float32).tiny))
