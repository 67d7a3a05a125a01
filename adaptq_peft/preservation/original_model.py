"""Runs a model with adapters as what it was before: its 16-bit original, or that with its linears quantized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..config import AdaptQConfig
from ..layer import AdaptQLayer
from ..module_names import base_name
from ..quantization import OriginalWeights, follow_cast, is_quantized, named_checkpoint, note_origins

#: Modules with a switch for their adapters.
_SWITCHED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
#: Ways of PEFT to start LoRA that subtract its product from the base's weights, or replace them; in any capitals.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base as it was quantized: PEFT's `disable_adapter()`, after which `requires_grad` is as before.

    Also for adapters in a model that is no `PeftModel` (transformers' `add_adapter`). A model without adapters stays
    as it is.

    Raises:
        ValueError: if adapters are merged: they would be unmerged, and stay so.
    """
    if any(isinstance(layer, BaseTunerLayer) and layer.merged for layer in model.modules()):
        raise ValueError(
            "adapters are merged into this model, so it can't be compared with its base; call "
            "`model.unmerge_adapter()` first"
        )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter() if isinstance(model, PeftModel) else _layers_disabled(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def unwrapped(model: nn.Module) -> Any:
    """The module inside `torch.compile` and `DistributedDataParallel`."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has adapters that can be switched off: made by PEFT, or by transformers' `add_adapter`."""
    return isinstance(model, PeftModel) or any(isinstance(module, _SWITCHED) for module in model.modules())


@contextmanager
def _layers_disabled(model: nn.Module) -> Iterator[None]:
    on = [module for module in model.modules() if isinstance(module, _SWITCHED) and not module.disable_adapters]
    for module in on:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in on:
            module.enable_adapters(True)


def check_base_is_kept(model: nn.Module) -> None:
    """Raise ValueError if an adapter changes the base's own weights: as it starts (PiSSA) or in training (`bias`)."""
    for name, config in getattr(model, "peft_config", {}).items():
        how = _change_of_the_base(model, config)
        if how is not None:
            raise ValueError(
                f"adapter {name!r} was made with {how}, which changes the base's weights, so this model without its "
                "adapter is not its base; ask the base before get_peft_model: BaseReference.of(model, ...) or "
                "PreservationCallback.from_base(model, ...)"
            )


def changes_base(model: nn.Module) -> bool:
    """Whether `check_base_is_kept` would raise."""
    configs = getattr(model, "peft_config", {}).values()
    return any(_change_of_the_base(model, config) is not None for config in configs)


def _change_of_the_base(model: nn.Module, config: PeftConfig) -> str | None:
    """The argument by which an adapter changes the weights of its base, if one does."""
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        return f"init_lora_weights={start!r}"
    if getattr(config, "kasa_config", None) is not None:
        return "kasa_config"
    return f"bias={getattr(config, 'bias', None)!r}" if trains_biases(model, config) else None


def trains_biases(model: nn.Module, config: PeftConfig) -> bool:
    """Whether an adapter trains biases of its base, by `bias` in PEFT's configs."""
    bias = getattr(config, "bias", "none")
    return isinstance(bias, str) and bias != "none" and any(n.endswith(".bias") for n, _ in model.named_parameters())


@contextmanager
def original_model(model: nn.Module) -> Iterator[None]:
    """The 16-bit original: adapters off, and original weights in place of quantized ones, exactly undone afterwards.

    They come from where `unload()` takes them: kept by the adapter (`original_weights="keep"`), else the checkpoint.
    All of them are in memory within the context.

    Raises:
        ValueError: if they can't be had; the message says what to do instead.
    """
    check_base_is_kept(model)
    quantized = {
        name: module
        for name, module in model.named_modules()
        if is_quantized(module) and not name.endswith(".adaptq_frozen")
    }
    originals = _restore(model, quantized)
    layers = [layer for layer in model.modules() if isinstance(layer, AdaptQLayer)]
    quantized_for = [layer.quantized_for for layer in layers]
    with adapters_disabled(model):
        try:
            for name, original in originals.items():
                model.set_submodule(name, original)
            for layer in layers:
                layer.quantized_for = {}
            yield
        finally:
            for name, module in quantized.items():
                model.set_submodule(name, module)
            for layer, adapters in zip(layers, quantized_for, strict=True):
                layer.quantized_for = adapters


def _restore(model: nn.Module, quantized: dict[str, nn.Module]) -> dict[str, nn.Module]:
    configs = [c for c in getattr(model, "peft_config", {}).values() if isinstance(c, AdaptQConfig)]
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    revision = next((config.revision for config in configs), None)
    originals = OriginalWeights(base, named_checkpoint(config.original_weights for config in configs), revision)
    try:
        if any(c.original_weights == "dequantized" and c.quantization != "none" for c in configs):
            raise ValueError('an adapter with original_weights="dequantized" has rounded all blocks.')
        note_origins(base)
        restored = {name: originals.restore(_checkpoint_name(name, model), each) for name, each in quantized.items()}
        return follow_cast(base, restored)
    except ValueError as error:
        raise ValueError(
            f"The original model, to compare with, can't be had from this one: {error} Make "
            "`base = BaseReference.of(model, ...)` before `get_peft_model` and pass it, or pass the original model as "
            "base=..."
        ) from error


def _checkpoint_name(name: str, model: nn.Module) -> str:
    """The dotted name in the base model's own checkpoint."""
    return base_name(name.removeprefix("base_model.model.") if isinstance(model, PeftModel) else name)
