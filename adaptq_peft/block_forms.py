"""Brings the linears of the blocks into the form that an adapter needs: original where it adapts, else quantized."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn
from tqdm.auto import tqdm

from .layer import AdaptQLayer, wrap_layer
from .low_rank import rounding_repair
from .module_names import base_name, is_inside_a_wrapper
from .quantization import (
    LeaveReasons,
    OriginalWeights,
    QuantizationSettings,
    check_backend,
    dequantize_linear,
    empty_quantized,
    fused_experts,
    is_linear,
    is_quantized,
    linear_weight,
    origin_of,
    quantize_linear,
)
from .quantization.calibrated import CalibratedLinears
from .quantization.precision_plan import PRECISIONS, PrecisionPlan
from .selection import Block


@dataclass
class QuantizationReport:
    """What happened to the linears and the fused expert weights of the blocks.

    Args:
        swapped: dotted names of the linears that were quantized.
        restored: dotted names of the linears that were quantized already and got their original weights back.
        left: dotted name of each linear or fused expert weight of a frozen block that was not quantized -> why.
            None of them gets a correction.
        corrected: dotted names of the linears that got a low-rank correction.
        plain: dotted name of each linear that was rounded plainly although calibration was asked for -> why.
        precision: with quantization "auto", the plan of the adapter that was made last; what it leaves in the original
            precision is not in `left`.
    """

    swapped: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    precision: PrecisionPlan | None = None
    corrected: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wishes:
    """What a new adapter wants the blocks to look like.

    Args:
        adapter_name: its name.
        adapted: indices of the blocks that it adapts.
        settings: how the linears of all other blocks are quantized; `None`: they are not.
        precision: a plan that says it for each linear instead of `settings`, which are those of its 4-bit ones.
        original_weights: as in `AdaptQConfig`.
        revision: of the base model's checkpoint.
        is_excluded: whether the user excluded the layer with a dotted name.
        calibrate: makes calibrated layers for linears by their dotted names; `None`: plain rounding.
        load_codes: puts the codes of a shared base into a quantized linear, given with its dotted name in the base
            model; `None`: they are made here.
        codes_in_file: whether the codes of frozen blocks are loaded later, with the adapter's file. Default `False`.
        corrected_rank: rank of the low-rank corrections on linears of frozen blocks. Default 0: there are none.
        is_corrected: whether such a linear, given with its dotted name, gets one. Default: each does.
        repairs: whether corrections repair the quantization from the start. Default `False`.
    """

    adapter_name: str
    adapted: Collection[int]
    settings: QuantizationSettings | None
    original_weights: str
    revision: str | None
    is_excluded: Callable[[str], bool]
    precision: PrecisionPlan | None = None
    calibrate: Callable[[dict[str, nn.Module]], CalibratedLinears] | None = None
    load_codes: Callable[[str, nn.Module], None] | None = None
    codes_in_file: bool = False
    corrected_rank: int = 0
    is_corrected: Callable[[str, nn.Module], bool] = lambda name, linear: True
    repairs: bool = False


class BlockForms:
    """The linears of all blocks in the form that a new adapter wants, built beside the model.

    A linear that the adapters on the model want in the same form is a plain or a quantized layer. One that they want
    in different forms becomes an `AdaptQLayer` that holds both and runs the one of the active adapter.

    Building is what can fail, so the model is not touched before `apply`, and `undo` takes that back.

    Args:
        model: the base model, with or without other adapters.
        blocks: its blocks.
        wishes: what the new adapter wants.
        others: names of the adapters that are on the model already.

    Attributes:
        report: what was done.
        repairs: dotted name of a linear -> the A and B of `rounding_repair` that its correction starts from.
        kept: dotted name of each linear that was quantized before and keeps its rounding, as it is or dequantized ->
            the quantized layer.

    Raises:
        ValueError: if a linear can't be quantized, or its original weights are needed and can't be had.
    """

    def __init__(self, model: nn.Module, blocks: list[Block], wishes: Wishes, others: list[str]) -> None:
        self.report = QuantizationReport(precision=wishes.precision)
        self.repairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.kept: dict[str, nn.Module] = {}
        self._model = model
        self._wishes = wishes
        self._others = others
        self._originals = OriginalWeights(model, wishes.original_weights, wishes.revision)
        self._replacements: dict[str, nn.Module] = {}
        self._replaced: dict[str, nn.Module] = {}
        self._quantized_copies: list[tuple[AdaptQLayer, nn.Module]] = []
        reasons = None
        if wishes.settings is not None:
            check_backend(wishes.settings)
        if wishes.settings is not None or wishes.corrected_rank:
            reasons = LeaveReasons(model, wishes.settings, wishes.is_excluded)
        for block in tqdm(blocks, desc="Preparing blocks", unit="block", delay=2):
            self._build(block, reasons)
        if wishes.calibrate:
            for name, quantized in self.kept.items():
                if not origin_of(quantized).calibrated and name not in self.report.restored:
                    self.report.plain[name] = "it was quantized already"
            if self.report.swapped:
                self._calibrate(wishes.calibrate)

    @property
    def has_new_codes(self) -> bool:
        """Whether linears were quantized that were not before."""
        new = [layer for layer, quantized in self._quantized_copies if layer.adaptq_frozen is not quantized]
        return bool(self.report.swapped or new)

    def apply(self) -> None:
        """Put the layers into the model."""
        for name, module in self._replacements.items():
            self._replaced[name] = self._model.get_submodule(name)
            self._model.set_submodule(name, module)
        for layer, quantized in self._quantized_copies:
            layer.add_quantized(quantized, [self._wishes.adapter_name])

    def undo(self) -> None:
        """Take `apply` back. Layers that were wrapped since then must be unwrapped first."""
        for layer, _ in self._quantized_copies:
            layer.forget_quantized(self._wishes.adapter_name)
        for name, module in self._replaced.items():
            self._model.set_submodule(name, module)

    def _build(self, block: Block, reasons: LeaveReasons | None) -> None:
        frozen = reasons is not None and block.index not in self._wishes.adapted
        if reasons is not None:
            reasons.look_into(block)
        if frozen:
            self.report.left.update(fused_experts(block))
        for name, module in linears_of(block):
            linear = module.base_layer if isinstance(module, AdaptQLayer) else module
            reason = None if reasons is None else reasons.of(base_name(name), linear)
            if frozen and reason:
                self.report.left[base_name(name)] = reason
            corrected = frozen and not reason and self._is_corrected(name, linear)
            if corrected:
                self.report.corrected.append(name)
            if frozen and not reason and self._settings_of(name) is not None:
                forms = self._want_quantized(name, module)
                if corrected and self._wishes.repairs and not self._gets_codes_later(name):
                    self._repair(name, *forms)
            elif is_quantized(linear):
                self._want_original(name, module)
            elif self._wishes.original_weights == "dequantized" and not self._others and not reason:
                self._replacements[name] = dequantize_linear(self._quantize(name, module))

    def _settings_of(self, name: str) -> QuantizationSettings | None:
        plan = self._wishes.precision
        return self._wishes.settings if plan is None else PRECISIONS[plan.precision[base_name(name)]]

    def _gets_codes_later(self, name: str) -> bool:
        """Whether the codes of a linear that is quantized now come from calibration or the adapter's file."""
        settings = cast(QuantizationSettings, self._settings_of(name))
        calibrated = self._wishes.calibrate is not None and settings.bits == 4
        return calibrated or (self._wishes.codes_in_file and settings.is_saved)

    def _is_corrected(self, name: str, linear: nn.Module) -> bool:
        return self._wishes.corrected_rank > 0 and self._wishes.is_corrected(name, linear)

    def _want_quantized(self, name: str, module: nn.Module) -> tuple[nn.Module, nn.Module | None]:
        """The quantized linear, and the original one if it is at hand."""
        linear = module.base_layer if isinstance(module, AdaptQLayer) else module
        if is_quantized(linear):
            return self._with_shared_codes(name, linear), None
        if isinstance(module, AdaptQLayer):
            quantized = module.adaptq_frozen or self._build_quantized(name, linear)
            self._quantized_copies.append((module, quantized))
            return quantized, linear
        quantized = self._build_quantized(name, linear)
        self.report.swapped.append(name)
        only = not self._others
        self._replacements[name] = quantized if only else _both(linear, quantized, [self._wishes.adapter_name])
        return quantized, linear

    def _with_shared_codes(self, name: str, quantized: nn.Module) -> nn.Module:
        """A linear that is quantized already, as it is; in a model that arrived so, with the shared base's codes."""
        if self._wishes.load_codes is None or self._others:  # the others have their codes from the same base
            self.kept[name] = quantized
            return quantized
        self._replacements[name] = copy.deepcopy(quantized)
        self._wishes.load_codes(base_name(name), self._replacements[name])
        return self._replacements[name]

    def _calibrate(self, calibrate: Callable[[dict[str, nn.Module]], CalibratedLinears]) -> None:
        """Replace the layers without codes by calibrated ones, and where that can't be, by plainly rounded ones."""
        in_4_bits = [name for name in self.report.swapped if cast(Any, self._settings_of(name)).bits == 4]
        originals = {name: self._model.get_submodule(name) for name in in_4_bits}
        result = calibrate(originals)
        for name, original in originals.items():
            layer = result.layers.get(name)
            if layer is not None:
                origin = origin_of(self._replacements[name])
                layer.adaptq_origin = replace(origin, calibrated=True)  # type: ignore[assignment]
            self._replacements[name] = layer or self._quantize(name, original)
            if name in self.report.corrected and self._wishes.repairs:
                self._repair(name, self._replacements[name], original)
        self.report.plain.update(result.plain)

    def _repair(self, name: str, quantized: nn.Module, original: nn.Module | None) -> None:
        found = original or self._originals.restore(name, quantized)
        with align_module_device(found):
            weight, rounded = linear_weight(found), linear_weight(dequantize_linear(quantized))
            self.repairs[name] = rounding_repair(weight, rounded, self._wishes.corrected_rank)

    def _want_original(self, name: str, module: nn.Module) -> None:
        quantized = module.base_layer if isinstance(module, AdaptQLayer) else module
        original = self._originals.restore(name, quantized)
        if self._wishes.original_weights == "dequantized":
            self.kept[name] = quantized
        self.report.restored.append(name)
        layer = _both(original, quantized, self._others) if self._others else original
        if isinstance(module, AdaptQLayer) and isinstance(layer, AdaptQLayer):
            layer.take_adapters_of(module)
        self._replacements[name] = layer

    def _build_quantized(self, name: str, linear: nn.Module) -> nn.Module:
        """The quantized linear for a frozen block; without codes, where they are not those of plain rounding."""
        load_codes = self._wishes.load_codes
        if load_codes is None and not self._gets_codes_later(name):
            return self._quantize(name, linear)
        quantized = self._quantize(name, linear, empty_quantized)
        if load_codes is not None:
            load_codes(base_name(name), quantized)
        return quantized

    def _quantize(
        self,
        name: str,
        linear: nn.Module,
        build: Callable[[nn.Module, QuantizationSettings], nn.Module] | None = None,
    ) -> nn.Module:
        settings = cast(QuantizationSettings, self._settings_of(name))
        try:
            with align_module_device(linear):  # one that accelerate has offloaded stays on its device then
                quantized = (build or quantize_linear)(linear, settings)
        except Exception as error:
            raise ValueError(f"quantizing {name} failed: {error}") from error
        if self._wishes.original_weights == "keep" and not has_offloaded_params(linear):
            quantized.adaptq_origin = replace(origin_of(quantized), kept=linear)  # type: ignore[assignment]
        return quantized


def quantize_blocks(
    model: nn.Module,
    blocks: list[Block],
    settings: QuantizationSettings | None,
    is_excluded: Callable[[str], bool] = lambda name: False,
) -> QuantizationReport:
    """Quantize the linears of blocks in place, without any adapter."""
    forms = BlockForms(model, blocks, Wishes("", (), settings, "checkpoint", None, is_excluded), [])
    forms.apply()
    return forms.report


def _both(original: nn.Module, quantized: nn.Module, adapters: list[str]) -> AdaptQLayer:
    layer = wrap_layer(original)
    layer.add_quantized(quantized, adapters)
    return layer


def linears_of(block: Block) -> list[tuple[str, nn.Module]]:
    """Each linear of a block by its dotted name: plain, quantized, or the layer that wraps it."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in block.module.named_modules():
        linear = module.base_layer if isinstance(module, AdaptQLayer) else module
        if is_linear(linear) and not is_inside_a_wrapper(path):
            found.append((f"{block.name}.{path}", module))
    return found


def linears_with_reasons(
    model: nn.Module,
    blocks: Iterable[Block],
    settings: QuantizationSettings | None,
    is_excluded: Callable[[str], bool],
) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Each linear of blocks: its dotted name in the base model, itself, and why it is not quantized (`None`: it is).

    Args:
        model, settings, is_excluded: as for `LeaveReasons`.
        blocks: those that are looked into.
    """
    reasons = LeaveReasons(model, settings, is_excluded)
    for block in blocks:
        reasons.look_into(block)
        for name, module in linears_of(block):
            linear = module.base_layer if isinstance(module, AdaptQLayer) else module
            yield base_name(name), linear, reasons.of(base_name(name), linear)
