"""`AdaptQTuner`: makes an adapter (Algorithms 1 and 2 of the paper) and manages it on a model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .checkpoint import check_adapter_tensors
from .config import AdaptQConfig
from .fingerprint import check_base, fingerprint_base
from .layer import AdaptQLayer, create_layer
from .quantization import (
    QuantizationReport,
    QuantizedSwap,
    dequantize_frozen,
    is_quantized,
    keep_gradients_on_cpu,
    resolve_quantization,
)
from .selection import (
    ActivationProfile,
    Block,
    SelectionRequest,
    find_blocks,
    profile_activations,
    select_blocks,
    strategy_needs_general_profile,
    strategy_needs_profile,
)
from .targets import find_targets, is_excluded


@dataclass(frozen=True)
class _Plan:
    """What an adapter will be, resolved before the model is touched."""

    blocks: list[Block]
    adapted: list[int]
    profile: ActivationProfile | None
    targets: list[str]
    fingerprint: dict[str, Any]

    @property
    def frozen(self) -> list[Block]:
        return [block for block in self.blocks if block.index not in self.adapted]


class AdaptQTuner(BaseTuner):
    """Trains K transformer blocks with full-rank deltas; the linears of all other blocks are stored in 4 bits.

    Made by `get_peft_model(model, AdaptQConfig(...))`. If that fails, the model is as it was before.

    Attributes:
        quantization_report: which linears were quantized, and which were left and why.
    """

    prefix = "adaptq_"
    tuner_layer_cls = AdaptQLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Plain attributes, so that they are there while BaseTuner.__init__ injects the adapter.
        object.__setattr__(self, "quantization_report", QuantizationReport())
        object.__setattr__(self, "_targets", [])
        object.__setattr__(self, "_block_names", [])
        object.__setattr__(self, "_input_grads_hook", None)
        super().__init__(*args, **kwargs)

    # ---- making an adapter -------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Profile, select, quantize and add deltas; called by `get_peft_model` and `add_adapter`."""
        config: AdaptQConfig = self.peft_config[adapter_name]
        with self._undo_on_error(model, adapter_name):
            plan = self._plan(model, adapter_name, config)
            swap = QuantizedSwap(
                model,
                [] if self._has_other_adapters(adapter_name) else plan.frozen,
                resolve_quantization(config.quantization),
                lambda name: is_excluded(name, config),
            )
            self._targets = plan.targets
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            swap.commit()
        self._finish(model, config, plan, swap.report)

    def _plan(self, model: nn.Module, adapter_name: str, config: AdaptQConfig) -> _Plan:
        blocks = _blocks_or_none(model, config)
        if not blocks:
            return _Plan([], [], None, find_targets(model, None, config), fingerprint_base(model, [], []))
        adapted, profile = self._select(model, blocks, config)
        targets = find_targets(model, [blocks[index] for index in adapted], config)
        self._check_other_adapters(adapter_name, config, adapted)
        fingerprint = fingerprint_base(model, blocks, adapted)
        if config.base_fingerprint is not None:
            check_base(config.base_fingerprint, fingerprint)
        return _Plan(blocks, adapted, profile, targets, fingerprint)

    def _select(
        self, model: nn.Module, blocks: list[Block], config: AdaptQConfig
    ) -> tuple[list[int], ActivationProfile | None]:
        """Algorithm 1: the indices of the adapted blocks, and the profile they were chosen by, if any."""
        if config.layers_to_transform is not None:
            return _check_indices(config.layers_to_transform, len(blocks)), config.profile
        count = config.num_adapted_blocks or max(1, math.floor(config.selection_ratio * len(blocks) + 1e-9))
        profile = config.profile
        if profile is None and strategy_needs_profile(config.selection_strategy):
            _check_indices([count - 1], len(blocks))  # before the long work, not after it
            profile = self._profile(model, config)
        if profile is not None and len(profile.magnitude) != len(blocks):
            raise ValueError(
                f"the profile is of a model with {len(profile.magnitude)} blocks, and {type(model).__name__} has "
                f"{len(blocks)}; profile this model"
            )
        request = SelectionRequest(num_blocks=len(blocks), profile=profile, seed=config.selection_seed)
        return select_blocks(config.selection_strategy, request, count), profile

    def _profile(self, model: nn.Module, config: AdaptQConfig) -> ActivationProfile:
        general = config.general_calibration_data if strategy_needs_general_profile(config.selection_strategy) else None
        with self._adapters_off():
            return profile_activations(
                model,
                config.calibration_data,
                general_data=general,
                tokenizer=config.calibration_tokenizer,
                samples=config.calibration_samples,
                max_length=config.calibration_max_length,
                batch_size=config.calibration_batch_size,
                layers_pattern=config.layers_pattern,
            )

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        layers = [m for m in self.model.modules() if isinstance(m, AdaptQLayer) and not m.disable_adapters]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def _has_other_adapters(self, adapter_name: str) -> bool:
        return any(name != adapter_name for name in self.peft_config)

    def _check_other_adapters(self, adapter_name: str, config: AdaptQConfig, adapted: list[int]) -> None:
        """A block that one adapter trains must not be one that another adapter stores in 4 bits."""
        for name, other in self.peft_config.items():
            if name == adapter_name:
                continue
            both_plain = config.quantization == "none" and other.quantization == "none"
            if both_plain or (adapted == other.layers_to_transform and config.quantization == other.quantization):
                continue
            raise ValueError(
                f"Adapter {adapter_name!r} adapts blocks {adapted} with quantization {config.quantization!r}, and "
                f"adapter {name!r} on this model adapts blocks {other.layers_to_transform} with "
                f"{other.quantization!r}. Adapters on one quantized model must share both: set layers_to_transform="
                f"{other.layers_to_transform}, or load the adapter on a base model of its own."
            )

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, AdaptQConfig)
        if isinstance(target, AdaptQLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = create_layer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:  # an additional adapter is not trainable by itself
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._targets

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config  # the targets are resolved in _plan

    def _finish(self, model: nn.Module, config: AdaptQConfig, plan: _Plan, report: QuantizationReport) -> None:
        config.layers_to_transform = plan.adapted or None
        config.profile = plan.profile
        config.base_fingerprint = plan.fingerprint
        self.quantization_report.swapped.update(report.swapped)
        self.quantization_report.left.update(report.left)
        self._block_names = [block.name for block in plan.blocks]
        for module in model.modules():
            keep_gradients_on_cpu(module)
        unasked = {name: why for name, why in report.left.items() if not why.startswith("named in")}
        if unasked:
            listed = "; ".join(f"{name}: {why}" for name, why in unasked.items())
            warnings.warn(f"{len(unasked)} linears of frozen blocks were not quantized. {listed}", stacklevel=2)

    @contextmanager
    def _undo_on_error(self, model: nn.Module, adapter_name: str) -> Iterator[None]:
        """On any error take the half-made adapter off the model again, so that the model is as it was."""
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            yield
        except BaseException:
            for name, module in list(model.named_modules()):
                if isinstance(module, AdaptQLayer):
                    module.adaptq_delta.pop(adapter_name) if adapter_name in module.adaptq_delta else None
                    module.scaling.pop(adapter_name, None)
                    if not module.adaptq_delta:
                        model.set_submodule(name, module.base_layer)
                elif isinstance(module, AuxiliaryTrainingWrapper) and not self._has_other_adapters(adapter_name):
                    model.set_submodule(name, module.original_module)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if self.peft_config[adapter_name].delta_dtype is None:  # else the user chose
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    # ---- loading -----------------------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        own = {
            f"{name}.{cls.prefix}delta.{parameter_name}": parameter
            for name, module in model.named_modules()
            if isinstance(module, AdaptQLayer) and adapter_name in module.adaptq_delta
            for parameter_name, parameter in module.adaptq_delta[adapter_name].named_parameters()
        }
        found = state_dict
        if not any(name.startswith("base_model.model.") for name in own):  # injected without a PeftModel around it
            found = {name.removeprefix("base_model.model."): tensor for name, tensor in state_dict.items()}
        check_adapter_tensors(own, found, others=set(model.state_dict()))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    # ---- merging and unloading ---------------------------------------------------------------------------------

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """As in other tuners; the frozen blocks become plain layers again, with their dequantized weights.

        A model that keeps packed 4-bit weights and has no quantization_config would save to a folder that can't be
        loaded.
        """
        swapped = self.quantization_report.swapped
        if swapped and not merge:
            warnings.warn(
                f"The original weights of {len(swapped)} quantized linears are gone: the unloaded model has the "
                "dequantized ones. Load the base model again where you need the originals.",
                stacklevel=3,
            )
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        self.disable_input_require_grads()
        dequantize_frozen(model, swapped)
        return model

    # ---- nothing below the lowest adapted block is differentiated ----------------------------------------------

    def _trained_from(self) -> int:
        """Index of the lowest block with a trainable parameter; 0 if there is none."""
        for index, name in enumerate(self._block_names):
            if any(parameter.requires_grad for parameter in self.model.get_submodule(name).parameters()):
                return index
        return 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._block_names and getattr(self.model, "_require_grads_hooks", None):
            self.enable_input_require_grads()  # PEFT or a trainer has called it on the base model
        return self.model(*args, **kwargs)

    def enable_input_require_grads(self) -> None:
        """Make the input of the lowest trained block require gradients, instead of the embeddings.

        That is what reentrant checkpointing needs. Were the embeddings to require gradients, every frozen block below
        would be differentiated for nothing.
        """
        if not self._block_names:
            self.model.enable_input_require_grads()
            return
        self.disable_input_require_grads()
        block = self.model.get_submodule(self._block_names[self._trained_from()])
        object.__setattr__(self, "_input_grads_hook", block.register_forward_pre_hook(_require_grad, with_kwargs=True))

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`, called on this tuner or on the base model."""
        if self._input_grads_hook is not None:
            self._input_grads_hook.remove()
            object.__setattr__(self, "_input_grads_hook", None)
        if hasattr(self.model, "disable_input_require_grads"):
            self.model.disable_input_require_grads()

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, for the blocks that are differentiated; those below run without autograd anyway."""
        self._checkpoint_trained_blocks(self.model.activation_checkpointing_enable, *args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self._checkpoint_trained_blocks(self.model.gradient_checkpointing_enable, *args, **kwargs)

    def _checkpoint_trained_blocks(self, enable: Any, *args: Any, **kwargs: Any) -> None:
        enable(*args, **kwargs)
        self.enable_input_require_grads()
        for name in self._block_names[: self._trained_from()]:
            for module in self.model.get_submodule(name).modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.gradient_checkpointing = False


def _blocks_or_none(model: nn.Module, config: AdaptQConfig) -> list[Block]:
    """The blocks; none for a model without blocks on which `target_modules` alone says what gets deltas."""
    targets_only = config.target_modules is not None and (
        config.layers_to_transform is None and config.calibration_data is None and config.layers_pattern is None
    )
    try:
        return find_blocks(model, config.layers_pattern)
    except ValueError:
        if targets_only:
            return []
        raise


def _check_indices(indices: list[int], num_blocks: int) -> list[int]:
    bad = [index for index in indices if not 0 <= index < num_blocks]
    if bad:
        raise ValueError(
            f"block indices {bad} are out of range: the model has {num_blocks} blocks, allowed are 0 to {num_blocks - 1}"
        )
    return sorted(indices)


def _require_grad(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden_states = args[0] if args else kwargs["hidden_states"]
    if torch.is_grad_enabled() and not hidden_states.requires_grad:
        hidden_states.requires_grad_(True)
