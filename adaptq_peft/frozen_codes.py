"""Where the codes of the frozen blocks come from: plain rounding, calibration, or a base that adapters share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from torch import nn

from .artifacts.quantized_base import QuantizedBase, QuantizedBaseReference
from .artifacts.quantized_blocks import saves_quantized
from .block_forms import BlockForms
from .config import AdaptQConfig
from .plan import AdapterPlan
from .quantization import origin_of, resolve_quantization, settings_of
from .quantization.calibrated import (
    CalibratedLinears,
    mixed_calibration_batches,
    quantize_calibrated,
    resolve_calibration_method,
)


def calibration(
    model: nn.Module, config: AdaptQConfig, plan: AdapterPlan
) -> Callable[[dict[str, nn.Module]], CalibratedLinears] | None:
    """Calibrated rounding for a new adapter; a saved one brings its codes along."""
    name, settings = config.quantization_calibration, resolve_quantization(plan.quantization)
    if name is None or settings is None or config.is_saved:
        return None
    given = config.calibration

    def calibrate(linears: dict[str, nn.Module]) -> CalibratedLinears:
        method = resolve_calibration_method(name)
        batches = mixed_calibration_batches(model, given.data, given.general_data, tokenizer=given.tokenizer)
        return quantize_calibrated(model, plan.blocks, linears, settings, batches, method)

    return calibrate


def open_quantized_base(
    model: nn.Module, config: AdaptQConfig, plan: AdapterPlan, others: Mapping[str, AdaptQConfig]
) -> QuantizedBase | None:
    """The shared base that the config refers to, checked against the model and the adapters that are on it."""
    settings = resolve_quantization(plan.quantization)
    base = None
    if config.quantized_base is not None and settings is not None:
        base = QuantizedBase(cast(QuantizedBaseReference, config.quantized_base))
        base.check(model, plan.blocks, settings)
    own = _Codes(None if base is None else base.reference, config.quantization_calibration is not None)
    for name, other in others.items():
        theirs = _Codes(cast(Any, other.quantized_base), other.quantization_calibration is not None)
        if settings is not None and other.quantization != "none" and theirs != own:
            raise ValueError(
                f"The new adapter has its frozen blocks' codes from {own}, and adapter {name!r} on this model from "
                f"{theirs}. Give both the same quantized_base, or put the new one on a base model of its own."
            )
    return base


class _Codes(NamedTuple):
    """Where the codes of an adapter's frozen blocks come from."""

    base: QuantizedBaseReference | None
    calibrated: bool

    def __str__(self) -> str:
        if self.base is not None:
            return f"the quantized base {self.base.name_or_path!r}"
        return "calibration" if self.calibrated else "plain rounding"


def check_calibrated_before(config: AdaptQConfig, others: Mapping[str, AdaptQConfig], forms: BlockForms) -> None:
    """Calibration needs the original model, which may have arrived in 4 bits, or other adapters have changed."""
    is_new = not config.is_saved and config.quantization_calibration is not None
    if is_new and forms.kept and not any(map(_has_codes_of_an_adapter, forms.kept.values())):
        raise ValueError(
            f"quantization_calibration is {config.quantization_calibration!r}, and {len(forms.kept)} linears of this "
            f"model, the first is {next(iter(forms.kept))}, have plainly rounded codes already, which can't be "
            "calibrated. Load the model in 16 bits, or take what unload() returns; or give a quantized_base, or leave "
            "quantization_calibration out."
        )
    if is_new and others and forms.has_new_codes:
        raise ValueError(
            f"The new adapter freezes blocks that adapters {list(others)} on this model do not freeze, and they can't "
            "be calibrated beside them. Give all of them one quantized_base (adaptq quantize-base makes it), or put "
            "the new one on a base model of its own."
        )


def check_kept_codes(config: AdaptQConfig, forms: BlockForms) -> None:
    """A load rounds plainly what the adapter's file does not hold, and a deleted adapter may have left other codes."""
    has_codes = saves_quantized(config) or config.quantized_base is not None
    calibrated = [name for name, quantized in forms.kept.items() if _has_codes_of_an_adapter(quantized)]
    lost = [name for name in calibrated if name in forms.report.restored or not has_codes]
    if lost:
        raise ValueError(
            f"{len(lost)} linears of this model, the first is {lost[0]}, have calibrated codes of an adapter before, "
            "and the new adapter would get plain rounding there when it is loaded again. Put it on a base model of "
            "its own, or on the one that unload() returns."
        )


def _has_codes_of_an_adapter(quantized: nn.Module) -> bool:
    """Whether codes were chosen for an adapter; others come with the base."""
    return origin_of(quantized).calibrated and not settings_of(quantized).comes_with_base
