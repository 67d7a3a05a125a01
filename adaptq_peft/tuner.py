"""`AdaptQTuner`: makes an adapter (Algorithms 1 and 2 of the paper) and manages it on a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .artifacts.checkpoint import check_adapter_tensors
from .artifacts.quantized_base import QuantizedBase
from .artifacts.quantized_blocks import (
    expect_quantized_tensors,
    load_quantized_tensors,
    quantized_tensors,
    saves_quantized,
    split_quantized,
)
from .artifacts.unloading import (
    build_unloaded_linears,
    drop_unneeded_forms,
    put_unloaded_linears,
    resolve_unloaded_form,
    seen_quantized,
    unwrap_quantized,
)
from .artifacts.weighted_adapter import (
    check_modules_to_save,
    combine_corrections,
    combine_deltas,
    combined_config,
    copy_modules_to_save,
    resolve_combination,
)
from .block_forms import BlockForms, QuantizationReport, Wishes
from .config import AdaptQConfig
from .direct_reads import children_read_by
from .fingerprint import check_base, fingerprint_base
from .frozen_codes import calibration, check_calibrated_before, check_kept_codes, open_quantized_base
from .frozen_prefix import FrozenPrefix
from .layer import AdaptQLayer, create_layer, wrap_layer
from .mixed_batch import mixed_batch
from .module_names import base_name, is_of_an_adapter
from .offloading import kept_on_device
from .plan import AdapterPlan, make_plan
from .quantization import gradients_kept_on_cpu, named_checkpoint, resolve_quantization, skip_when_quantizing
from .quantization.calibrated import CalibratedLinears, text_written_once
from .targets import is_excluded, is_targeted, match_by_peft


class AdaptQTuner(BaseTuner):
    """Trains K transformer blocks with full-rank deltas; the linears of all other blocks are stored in 4 bits.

    Unless `frozen_rank` is 0 those linears get trainable low-rank corrections.

    Made by `get_peft_model(model, AdaptQConfig(...))`. If that fails, the model is as it was before.

    Attributes:
        quantization_report: which linears were quantized and corrected, and which were left and why.
    """

    prefix = "adaptq_"
    tuner_layer_cls = AdaptQLayer

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        # Before nn.Module's own __init__, which BaseTuner calls and then injects the adapter: plain attributes only.
        vars(self).update(quantization_report=QuantizationReport(), _frozen_prefix=FrozenPrefix(model))
        vars(self).update(_targets=[], _corrected=[])
        super().__init__(model, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Profile, select, quantize and add deltas; called by `get_peft_model` and `add_adapter`."""
        with gradients_kept_on_cpu(model):
            self._inject_adapter(model, adapter_name, *args, **kwargs)

    def _inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        others = dict(self._configs)
        config = others.pop(adapter_name)
        with text_written_once():
            with _adapters_off(model):
                plan = make_plan(model, config, others)
            base = open_quantized_base(model, config, plan, others)
            calibrate = None if others else calibration(model, config, plan)
            wishes = _wishes(adapter_name, config, plan, calibrate, base)
            forms = BlockForms(model, plan.blocks, wishes, list(others))
        _check_same_layers(model, adapter_name, {*plan.targets, *forms.report.corrected})
        check_calibrated_before(config, others, forms)
        check_kept_codes(config, forms)
        with self._undo_on_error(model, adapter_name, forms):
            forms.apply()
            fingerprint = fingerprint_base(model, plan.blocks, plan.adapted)
            if config.base_fingerprint is not None and fingerprint is not None:
                check_base(config.base_fingerprint, fingerprint)
            self._targets, self._corrected = plan.targets, forms.report.corrected
            with kept_on_device(model, self._targets + self._corrected):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                self._update_nested_layers(model, adapter_name, config)
            for name, factors in forms.repairs.items():
                cast(AdaptQLayer, model.get_submodule(name)).set_correction(adapter_name, *factors)
        if config.is_saved and saves_quantized(config):
            expect_quantized_tensors(model, adapter_name)
        config.is_made_here = not config.is_saved
        config.base_fingerprint = fingerprint or config.base_fingerprint
        if base is not None:
            config.quantized_base = base.reference
            forms.report.plain.update(
                {name: why for name, why in base.description.plain.items() if name in forms.report.swapped}
            )
        self._finish(model, config, plan, forms.report)

    def _update_nested_layers(self, model: nn.Module, adapter_name: str, config: AdaptQConfig) -> None:
        """Add the adapter where PEFT does not look: adapter layers inside a layer that is wrapped itself."""
        for name in self._targets:
            layer = cast(AdaptQLayer, model.get_submodule(name))
            if adapter_name not in layer.adaptq_delta:
                layer.update_layer(adapter_name, config)
        for name in self._corrected:
            linear = model.get_submodule(name)
            if not isinstance(linear, AdaptQLayer):
                linear = wrap_layer(linear)
                linear.set_adapter(self.active_adapters)
                model.set_submodule(name, linear)
            if not linear.is_corrected_by(adapter_name):
                linear.add_correction(adapter_name, config)

    def _finish(self, model: nn.Module, config: AdaptQConfig, plan: AdapterPlan, report: QuantizationReport) -> None:
        config.layers_to_transform = plan.adapted or None
        config.profile = plan.profile
        config.quantization = plan.quantization
        config.precision = plan.precision.precision if plan.precision else None
        self.quantization_report.precision = report.precision or self.quantization_report.precision
        self.quantization_report.swapped.extend(report.swapped)
        self.quantization_report.restored.extend(report.restored)
        self.quantization_report.left.update(report.left)
        self.quantization_report.plain.update(report.plain)
        self.quantization_report.corrected.extend(report.corrected)
        skip_when_quantizing(model, report.restored)
        self._frozen_prefix.set_blocks([block.name for block in plan.blocks])
        if config.target_modules is None and (own := _own_parameters(plan)):
            warnings.warn(
                f"{len(own)} parameters belong to adapted blocks themselves, not to a layer in them, and stay frozen: "
                f"{', '.join(own)}.",
                stacklevel=4,
            )
        unasked = {name: why for name, why in report.left.items() if not why.startswith("named in")}
        if unasked:
            listed = "; ".join(f"{name}: {why}" for name, why in unasked.items())
            what = "corrected" if plan.quantization == "none" else "quantized"
            warnings.warn(f"{len(unasked)} weights of frozen blocks were not {what}. {listed}", stacklevel=4)

    @property
    def _configs(self) -> dict[str, AdaptQConfig]:
        return self.peft_config  # type: ignore[return-value]  # PEFT lets no other method onto the model

    @contextmanager
    def _undo_on_error(self, model: nn.Module, adapter_name: str, forms: BlockForms) -> Iterator[None]:
        """On any error take the half-made adapter off the model again, so that the model is as it was.

        One of the same name that it was to replace, by a second `get_peft_model` on a model, is put back.
        """
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        replaced = {
            layer: (layer.parts_of(adapter_name), layer.scaling.get(adapter_name))
            for layer in model.modules()
            if isinstance(layer, AdaptQLayer)
        }
        wrappers = {name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
        try:
            yield
        except BaseException:
            for name, module in reversed(list(model.named_modules())):  # inner layers before those around them
                if isinstance(module, AdaptQLayer):
                    module.restore_adapter(adapter_name, *replaced.get(module, ({}, None)))
                    if module.is_empty and not module.quantized_for:
                        model.set_submodule(name, module.base_layer)
                elif isinstance(module, AuxiliaryTrainingWrapper) and name not in wrappers:
                    model.set_submodule(name, module.original_module)
            forms.undo()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise

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
        config = cast(AdaptQConfig, peft_config)
        around: Any = type(parent.base_layer if isinstance(parent, AdaptQLayer) else parent)
        read_directly = target_name in children_read_by(around)
        corrected = _is_named(current_key, self._corrected)
        if isinstance(target, AdaptQLayer):
            target.read_directly = read_directly
            (target.add_correction if corrected else target.update_layer)(adapter_name, config)
            return
        layer = create_layer(target, adapter_name, config, corrected)
        layer.read_directly = read_directly
        self._replace_module(parent, target_name, layer, target)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:  # type: ignore[override]
        """Whether the layer gets a delta or a correction; PEFT wants to know of those that the user excluded, too."""
        if _is_named(key, self._targets) or _is_named(key, self._corrected):
            return True
        return match_by_peft(key, [], cast(AdaptQConfig, peft_config))

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config  # make_plan has found the targets

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if self._configs[adapter_name].delta_dtype is None:  # else the user chose
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        own, _ = split_quantized(found)
        own = {name: tensor for name, tensor in own.items() if ".adaptq_merged." not in name}
        if saves_quantized(cast(AdaptQConfig, config)):
            own |= quantized_tensors(model, adapter_name)
        return own

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict, quantized = split_quantized(state_dict)
        prefix = "base_model.model."
        expected = {
            f"{prefix}{name.removeprefix(prefix)}.{parameter_name}": parameter
            for name, module in model.named_modules()
            if isinstance(module, AdaptQLayer)
            for parameter_name, parameter in module.parameters_of(adapter_name)
        }
        found = {f"{prefix}{name.removeprefix(prefix)}": tensor for name, tensor in state_dict.items()}
        others = {f"{prefix}{name.removeprefix(prefix)}" for name in model.state_dict()}
        # PEFT saves a resized embedding or head by the name that it has in the adapter, too.
        others |= {
            name.replace(f".{adapter_name}", "") for name in others if f".modules_to_save.{adapter_name}" in name
        }
        others |= {name.replace(f".{adapter_name}", "") for name in others if ".token_adapter." in name}
        try:
            check_adapter_tensors(expected, found, others)
        except ValueError:
            # `load_adapter` has just added it, without values; the only adapter can't be deleted.
            if isinstance(model, PeftModel) and len(model.peft_config) > 1 and config.is_from_file:  # type: ignore[attr-defined]
                model.delete_adapter(adapter_name)
            raise
        config.is_from_file = False  # type: ignore[attr-defined]  # its values are here
        load_quantized_tensors(model, cast(AdaptQConfig, config), adapter_name, quantized)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # A layer that is wrapped and holds other layers keeps holding them.
        setattr(parent.base_layer if isinstance(parent, AdaptQLayer) else parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        beams, blocks = kwargs.get("num_beams") or 1, self._frozen_prefix.block_names
        with mixed_batch(self.model, names, self.peft_config, beams, blocks):
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that combines others: on each parameter, a combination of their s * delta.

        Low-rank corrections can be combined by "linear" only. The new ones have the sum of the ranks.

        Args:
            adapters: names of the adapters to combine.
            weights: a weight for each.
            adapter_name: name of the new adapter, which is not made active.
            combination_type: "linear" (default), "ties", "dare_linear", "dare_ties" or "magnitude_prune", as in
                `peft.utils.merge_utils`.
            density: share of each delta that is kept, in (0, 1]; needed by all but "linear".
            majority_sign_method: "total" (default) or "frequency", for "ties" and "dare_ties".

        Raises:
            ValueError: if a name is unknown or taken, the numbers do not match, or the adapters adapt other layers.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters or len(adapters) != len(weights) or adapter_name in self.peft_config:
            raise ValueError(
                f"can't combine adapters {adapters} with weights {weights} into {adapter_name!r}: the model has "
                f"{list(self.peft_config)}; give known adapters, a weight for each, and a new name"
            )
        combine = resolve_combination(combination_type, density, majority_sign_method)
        check_modules_to_save(self.model, adapters)
        self.peft_config[adapter_name] = combined_config([self._configs[name] for name in adapters], combination_type)
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        combine_deltas(self.model, adapters, weights, adapter_name, combine)
        combine_corrections(self.model, adapters, weights, adapter_name)
        copy_modules_to_save(self.model, adapters, adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter(s), as in other PEFT methods."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._frozen_prefix.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as in other PEFT methods, and what only it needed: original weights, quantized copies."""
        others = [name for name in self.active_adapters if name != adapter_name]
        others = others or sorted(name for name in self.peft_config if name != adapter_name)[:1]
        super().delete_adapter(adapter_name)
        if self.active_adapters != others:  # PEFT asks its first layer, which may know no other adapter
            self.set_adapter(others)
        drop_unneeded_forms(self.model, self._configs)
        self._frozen_prefix.refresh()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        frozen: str | None = None,
    ) -> nn.Module:
        """Merge deltas and low-rank corrections and take all adapters off, as in other PEFT methods.

        Args:
            progressbar: show one. Default `False`.
            safe_merge: check that merged weights are finite. Default `False`.
            adapter_names: adapters to merge; `None`: the active ones.
            frozen: what the linears of the frozen blocks become. "dequantized": plain layers with the rounded weights
                that were trained with. "original": plain layers with the original weights, as far as they were kept
                or the checkpoint can be read. "quantized": they stay as they are; those with a correction are
                quantized again with it, with a warning. Not for a model that arrived in GPTQ. `None` (default):
                "quantized" for a model that bitsandbytes quantized on arrival, else "dequantized".

        Raises:
            ValueError: if `frozen` is none of these, or "original" and original weights can't be had.
        """
        return self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names, frozen)

    def unload(self, frozen: str | None = None) -> nn.Module:
        """Take all adapters off.

        Args:
            frozen: as in `merge_and_unload`. `None` (default): "quantized" for a model that bitsandbytes quantized on
                arrival, else "original", and where original weights can't be had, "dequantized" with a warning.
        """
        return self._unload_and_optionally_merge(False, frozen=frozen)

    def _check_merge_allowed(self) -> None:
        """As in other tuners, and no delta may be merged into a weight that other modules have, too."""
        super()._check_merge_allowed()
        owners: dict[int, list[str]] = {}
        for name, module in self.model.named_modules():
            for parameter in () if is_of_an_adapter(name) else module.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(base_name(name))
        for name, layer in self.model.named_modules():
            if isinstance(layer, AdaptQLayer) and layer.adaptq_delta:
                for own in layer.base_layer.parameters(recurse=False):
                    if len(owners[id(own)]) > 1:
                        raise ValueError(
                            f"can't merge: a weight of {base_name(name)} is shared by {owners[id(own)]}, which would "
                            "all get its delta. Use the model with its adapter, or exclude_modules when it is made"
                        )

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        frozen: str | None = None,
    ) -> Any:
        """As in other tuners. Packed weights without a quantization_config would save to what can't be loaded."""
        form = resolve_unloaded_form(self.model, frozen, merge)
        if merge:
            self._check_merge_allowed()
        else:
            self.unmerge_adapter()
        revision = next((config.revision for config in self._configs.values()), None)
        seen = seen_quantized(self.model, adapter_names, merge)
        source = named_checkpoint(config.original_weights for config in self._configs.values())
        built = build_unloaded_linears(self.model, seen, form, source, revision, frozen is None, safe_merge)
        unwrap_quantized(self.model, seen)
        while any(isinstance(module, AdaptQLayer) for module in self.model.modules()):  # wrapped within wrapped ones
            super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self._frozen_prefix.let_go()
        put_unloaded_linears(self.model, built, form)
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._frozen_prefix.take_over()
        return self.model(*args, **kwargs)

    # transformers' own methods, which trainers call on the PeftModel: these are found before the base model's.

    def enable_input_require_grads(self) -> None:
        """Make the input of the lowest trained block require gradients, instead of the embeddings' output."""
        self._frozen_prefix.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        self._frozen_prefix.disable_input_require_grads()

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoint the blocks that are differentiated; those below run without autograd anyway."""
        has_name = hasattr(self.model, "activation_checkpointing_enable")  # transformers 5.23 and later
        enable = self.model.activation_checkpointing_enable if has_name else self.model.gradient_checkpointing_enable
        self._frozen_prefix.enable_checkpointing(enable, *args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self._frozen_prefix.enable_checkpointing(self.model.gradient_checkpointing_enable, *args, **kwargs)


def _own_parameters(plan: AdapterPlan) -> list[str]:
    blocks = [block for block in plan.blocks if block.index in plan.adapted]
    return [f"{b.name}.{name}" for b in blocks for name, _ in b.module.named_parameters(recurse=False)]


def _is_named(key: str, names: Collection[str]) -> bool:
    return key in names or f"_orig_mod.{key}" in names  # PEFT may ask without torch.compile's prefix


def _check_same_layers(model: nn.Module, adapter_name: str, wanted: Collection[str]) -> None:
    """A `PeftModel` made on this model before may have left an adapter of this name, which the new one replaces."""
    modules = model.named_modules()
    found = [name for name, module in modules if isinstance(module, AdaptQLayer) and module.has_adapter(adapter_name)]
    others = [name for name in found if name not in wanted]
    if others:
        raise ValueError(
            f"This model already has an adapter {adapter_name!r}, of get_peft_model or from_pretrained before, on "
            f"{len(found)} layers; {len(others)} of them, such as {others[0]}, would keep it beside the new one. Call "
            "unload() on that PeftModel first and use what it returns, or give the new adapter another name with its "
            "add_adapter or load_adapter."
        )


def _wishes(
    adapter_name: str,
    config: AdaptQConfig,
    plan: AdapterPlan,
    calibrate: Callable[[dict[str, nn.Module]], CalibratedLinears] | None,
    base: QuantizedBase | None,
) -> Wishes:
    return Wishes(
        adapter_name=adapter_name,
        adapted=plan.adapted,
        settings=resolve_quantization(plan.quantization),
        precision=plan.precision,
        original_weights=config.original_weights,
        revision=config.revision,
        is_excluded=lambda name: is_excluded(name, config),
        calibrate=calibrate,
        load_codes=None if base is None else base.load_into,
        codes_in_file=config.is_saved and saves_quantized(config),
        corrected_rank=config.frozen_rank,
        is_corrected=lambda name, linear: is_targeted(base_name(name), linear, config),
        repairs=config.frozen_rank_init == "svd" and not config.is_from_file,  # else the values are to be loaded
    )


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    layers = [m for m in model.modules() if isinstance(m, AdaptQLayer) and not m.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
