"""Where `quantization` is "auto": how many bits each linear of the frozen blocks gets. And what blocks suffer most."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate.utils import align_module_device
from torch import nn

from .block_forms import linears_of, linears_with_reasons
from .config import AdaptQConfig
from .layer import AdaptQLayer
from .module_names import base_name
from .offloading import input_device
from .quantization import (
    QuantizationSettings,
    is_quantized,
    linear_weight,
    origin_of,
    quantize_linear,
    resolve_quantization,
)
from .quantization.calibrated import (
    mixed_calibration_batches,
    quantize_calibrated,
    resolve_calibration_method,
)
from .quantization.precision_plan import PRECISIONS, LinearSize, PrecisionPlan, allocate_precision
from .quantization.sensitivity import SEQUENCE_LENGTH, SEQUENCES, Sensitivity, measure_sensitivity
from .selection import Block
from .selection.written_text import can_write_text
from .targets import is_excluded


def choose_precision(
    model: nn.Module, blocks: Sequence[Block], adapted: Collection[int], config: AdaptQConfig
) -> PrecisionPlan:
    """The precision of each linear of the frozen blocks that can be quantized: the config's, else measured here.

    Args:
        model: the base model; the original one without adapters, if the config has no `precision`.
        blocks: all its blocks.
        adapted: indices of the adapted ones.
        config: the adapter's config, whose `quantization` is "auto"; not changed.

    Raises:
        ValueError: if `precision` does not fit the model, the budget is too small, or nothing can be measured.
    """
    linears = quantizable_linears(model, [block for block in blocks if block.index not in adapted], config)
    if config.precision is not None:
        return _given_plan(config.precision, linears, {name for block in blocks for name, _ in linears_of(block)})
    sensitivity: Sensitivity = {}
    if linears:
        _check_measurable(model, linears, "The precision plan")
        candidates = _candidates(model, blocks, linears, config)
        sensitivity = measure_sensitivity(model, candidates, sensitivity_batches(model, config))
    return allocate_precision(sensitivity, _sizes(linears), config.weight_budget or 0)


def assume_precision(model: nn.Module, frozen: Sequence[Block], config: AdaptQConfig) -> PrecisionPlan:
    """A plan of the budget's size for a model without weights, as if a bit less cost each weight the same.

    Args:
        model: the model, which may be on the meta device.
        frozen: its frozen blocks.
        config: the adapter's config, with a `weight_budget`.

    Raises:
        ValueError: if the budget is too small.
    """
    sizes = _sizes(quantizable_linears(model, frozen, config))
    rises = {name: {"nf4": 1.0 * size.num_weights, "int8": 4.0**-4 * size.num_weights} for name, size in sizes.items()}
    return replace(allocate_precision(rises, sizes, config.weight_budget or 0), predicted_rise=None)


def measure_block_sensitivity(model: nn.Module, blocks: Sequence[Block], config: AdaptQConfig) -> list[float]:
    """For each block the predicted rise of the loss, in nats a token, if its linears are rounded: the sum over them.

    They are rounded plainly, as `config.quantization` says: to NF4 for "auto" and "none".

    Raises:
        ValueError: if the model has no weights, adapters, or quantized linears.
    """
    settings = resolve_quantization(config.quantization) or PRECISIONS["nf4"]
    linears = quantizable_linears(model, blocks, config, settings)
    _check_measurable(model, linears, "The sensitivity of the blocks")
    candidates = {name: {"rounded": _rounded(name, linear, settings)} for name, linear in linears.items()}
    rises = measure_sensitivity(model, candidates, sensitivity_batches(model, config))
    starts = [f"{base_name(block.name)}." for block in blocks]
    return [sum(rises[name]["rounded"] for name in rises if base_name(name).startswith(start)) for start in starts]


def sensitivity_batches(model: nn.Module, config: AdaptQConfig) -> list[dict[str, Any]]:
    """General text: the config's, and what the model writes itself; the domain's, if there is neither."""
    given = config.calibration
    general = given.general_data
    if general is None and not can_write_text(model):
        general = given.data
    return mixed_calibration_batches(
        model,
        general,
        tokenizer=given.tokenizer,
        tokens=SEQUENCES * SEQUENCE_LENGTH,
        max_length=SEQUENCE_LENGTH,
        batch_size=1,
    )


def quantizable_linears(
    model: nn.Module,
    blocks: Sequence[Block],
    config: AdaptQConfig,
    settings: QuantizationSettings | None = PRECISIONS["nf4"],
) -> dict[str, nn.Module]:
    """The linears of blocks that nothing speaks against quantizing so, by their dotted names in the base model."""
    found = linears_with_reasons(model, blocks, settings, lambda name: is_excluded(name, config))
    return {name: linear for name, linear, reason in found if not reason}


def _given_plan(given: Mapping[str, str], linears: Mapping[str, nn.Module], known: Collection[str]) -> PrecisionPlan:
    """The plan of a config, without the blocks that are adapted here: it may be about all blocks of the model."""
    missing = [name for name in linears if name not in given]
    unknown = sorted(given.keys() - {base_name(name) for name in known})
    if missing or unknown:
        raise ValueError(
            f"precision has no entry for {len(missing)} linears of the frozen blocks (first {missing[:3]}), "
            f"and names {len(unknown)} that this model's blocks do not have ({unknown[:3]}). Give one for each "
            "linear, or leave precision out and give a weight_budget."
        )
    sizes, precision = _sizes(linears), {name: given[name] for name in linears}
    return PrecisionPlan(
        precision=precision,
        stored_bytes=sum(sizes[name].stored_bytes(PRECISIONS[form]) for name, form in precision.items()),
        num_weights=sum(size.num_weights for size in sizes.values()),
    )


def _sizes(linears: Mapping[str, nn.Module]) -> dict[str, LinearSize]:
    return {name: _size(linear) for name, linear in linears.items()}


def _size(linear: Any) -> LinearSize:
    if is_quantized(linear):
        return LinearSize(linear.out_features, linear.in_features, origin_of(linear).dtype.itemsize)
    out_features, in_features = linear_weight(linear).shape
    return LinearSize(out_features, in_features, linear.weight.element_size())


def _check_measurable(model: nn.Module, linears: Mapping[str, nn.Module], what: str) -> None:
    reason = None
    if input_device(model).type == "meta":
        reason = "is on the meta device and has no weights (as with adaptq profile --stream, which can't do this)"
    elif any(isinstance(module, AdaptQLayer) for module in model.modules()):
        reason = "has adapters already"
    elif any(is_quantized(linear) for linear in linears.values()):
        reason = "has quantized linears already"
    if reason:
        raise ValueError(
            f"{what} is measured on the original model, and this {type(model).__name__} {reason}. Give the adapter "
            "what was measured before: layers_to_transform or a profile with sensitivities for the blocks, and "
            "precision, as the config of an adapter that was made has it, for the linears."
        )


def _candidates(
    model: nn.Module, blocks: Sequence[Block], linears: Mapping[str, nn.Module], config: AdaptQConfig
) -> dict[str, dict[str, nn.Module]]:
    """Each linear in each precision but the original one; the 4-bit one calibrated if the config says so."""
    calibrated = {} if config.quantization_calibration is None else _calibrated(model, blocks, linears, config)
    return {
        name: {
            key: calibrated[name] if key == "nf4" and name in calibrated else _rounded(name, linear, settings)
            for key, settings in PRECISIONS.items()
            if settings is not None
        }
        for name, linear in linears.items()
    }


def _calibrated(
    model: nn.Module, blocks: Sequence[Block], linears: Mapping[str, nn.Module], config: AdaptQConfig
) -> dict[str, nn.Module]:
    """4-bit layers of the linears that can be calibrated."""
    given = config.calibration
    # Each candidate is measured among original layers: there is nothing to make up for.
    method = replace(resolve_calibration_method(config.quantization_calibration), asymmetric=False)  # type: ignore[arg-type]
    batches = mixed_calibration_batches(model, given.data, given.general_data, tokenizer=given.tokenizer)
    return quantize_calibrated(model, blocks, linears, PRECISIONS["nf4"], batches, method).layers  # type: ignore[arg-type]


def _rounded(name: str, linear: nn.Module, settings: QuantizationSettings | None) -> nn.Module:
    try:
        with align_module_device(linear):
            return quantize_linear(linear, settings)  # type: ignore[arg-type]
    except Exception as error:
        raise ValueError(f"quantizing {name} failed: {error}") from error
