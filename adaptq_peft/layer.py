"""Layers with a trainable delta on each of their own parameters, and linears with a low-rank correction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import AdaptQConfig
from .delta_linear import delta_linear
from .low_rank import add_correction, make_factors
from .merged_weight import add_deltas
from .quantization import dequantize_linear, is_quantized, origin_of
from .quantization.origin import linear_from_tensors

#: Layers of which PEFT knows the number of inputs and outputs.
_WITH_FEATURES = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class Delta(nn.Module):
    """Trainable differences, one for each of a layer's own parameters and under the same names.

    A leaf module with real parameters, not a ParameterDict: reference copies in trainers and FSDP wrapping rules look
    for `.<adapter>.` inside parameter names.
    """

    def __init__(self, differences: dict[str, torch.Tensor]) -> None:
        nn.Module.__init__(self)  # by name: LinearDelta must not draw random weights in that of nn.Linear
        for name, difference in differences.items():
            self.register_parameter(name, nn.Parameter(difference))

    def reset_parameters(self) -> None:
        """Set all differences to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a Delta only holds parameters; call the layer that owns it")


class LinearDelta(Delta, nn.Linear):  # type: ignore[misc]  # a forward that only raises
    """The `Delta` of an `nn.Linear`, an `nn.Linear` itself: GaLore and APOLLO project the weights of no other modules.

    transformers collects these modules by `TrainingArguments.optim_target_modules`.
    """

    def __init__(self, differences: dict[str, torch.Tensor]) -> None:
        super().__init__(differences)
        self.out_features, self.in_features = differences["weight"].shape
        if "bias" not in differences:
            self.register_parameter("bias", None)


class AdaptQLayer(nn.Module, BaseTunerLayer):
    """Wraps any layer with parameters of its own and runs it with W0 + scale * delta in place of each of them.

    The wrapped layer keeps its parameters, frozen. `adaptq_delta[adapter]` holds a difference of the same shape for
    each; it starts at zero, so a new adapter does not change the output.

    Where adapters on one model adapt different blocks, a linear that one of them adapts is quantized for another. Such
    a layer holds a quantized copy, too, and runs it while all active adapters are in `quantized_for`.

    An adapter that freezes a linear may have a low-rank correction there instead: `adaptq_low_rank_A[adapter]` [r, in]
    and `adaptq_low_rank_B[adapter]` [out, r] add scale * B A to it, whether it is quantized or not. The wrapped layer
    is a quantized one where all adapters want it so.
    """

    adapter_layer_names = ("adaptq_delta", "adaptq_low_rank_A", "adaptq_low_rank_B")
    other_param_names = ("scaling", "quantized_for")

    #: Whether the module around the layer reads `weight` or `bias` of it. Set by the tuner, which knows that module.
    read_directly = False
    #: Whether each sample of the batch that is running has an adapter of its own; then there is no one weight to read.
    in_mixed_batch = False

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adaptq_frozen: nn.Module | None = None
        self.adaptq_merged: nn.Module | None = None
        self.quantized_for: dict[str, bool] = {}  # used as a set; PEFT deletes adapters by key
        self._parameter_names = tuple(name for name, _ in base_layer.named_parameters(recurse=False))
        self.adaptq_delta = nn.ModuleDict()
        self.adaptq_low_rank_A = nn.ModuleDict()
        self.adaptq_low_rank_B = nn.ModuleDict()
        has_features = isinstance(base_layer, _WITH_FEATURES) or is_quantized(base_layer)
        features: Any = _get_in_out_features(base_layer) if has_features else (None, None)
        self.in_features, self.out_features = features
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._unmerged_data: dict[str, torch.Tensor] = {}
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False

    def update_layer(self, adapter_name: str, config: AdaptQConfig) -> None:
        """Add the adapter `adapter_name` to this layer: zero deltas in `config.delta_dtype`, on the layer's device."""
        self.scaling[adapter_name] = float(config.delta_scaling)
        dtype = getattr(torch, config.delta_dtype) if config.delta_dtype else None
        differences = {
            name: torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            for name, parameter in self._base_parameters().items()
        }
        if not config.init_weights:
            for difference in differences.values():
                nn.init.normal_(difference, std=0.02)
        is_linear = isinstance(self.base_layer, nn.Linear) and "weight" in differences
        self.adaptq_delta[adapter_name] = LinearDelta(differences) if is_linear else Delta(differences)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def add_correction(self, adapter_name: str, config: AdaptQConfig) -> None:
        """Add the adapter `adapter_name` as a low-rank correction of a linear: it starts at zero, as in LoRA."""
        weight: Any = self.base_layer.weight
        own = origin_of(self.base_layer).dtype if is_quantized(self.base_layer) else weight.dtype
        dtype = getattr(torch, config.delta_dtype) if config.delta_dtype else own
        a, b = make_factors(self.in_features, self.out_features, config.frozen_rank, weight.device, dtype)
        if not config.init_weights:
            nn.init.normal_(b.weight, std=0.02)
        self.scaling[adapter_name] = config.frozen_scaling
        self.adaptq_low_rank_A[adapter_name] = a.requires_grad_(False)
        self.adaptq_low_rank_B[adapter_name] = b.requires_grad_(False)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def set_correction(self, adapter_name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Let the correction of an adapter be B A, whatever its scale. On the meta device it has no values.

        Args:
            adapter_name: an adapter with a correction here.
            a: [k, in], k at most r; further rows of A are left as they are.
            b: [out, k]; further columns of B are set to zero.
        """
        own_a, own_b = self.factors_of(adapter_name)
        if own_a.is_meta or own_b.is_meta:
            return
        root = self.scaling[adapter_name] ** 0.5
        own_a[: len(a)] = a.to(own_a.device) / root
        own_b.zero_()
        own_b[:, : len(a)] = b.to(own_b.device) / root

    def factors_of(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r] of an adapter with a correction here."""
        return self.adaptq_low_rank_A[adapter].weight, self.adaptq_low_rank_B[adapter].weight  # type: ignore[return-value]

    def correction_of(self, adapter: str) -> torch.Tensor:
        """s * B A of an adapter with a correction here, in the orientation of the wrapped layer's weight."""
        return self.scaling[adapter] * self._product(adapter, isinstance(self.base_layer, Conv1D))

    def is_corrected_by(self, adapter: str) -> bool:
        """Whether an adapter has a low-rank correction here."""
        return adapter in self.adaptq_low_rank_A

    def has_adapter(self, adapter: str) -> bool:
        """Whether an adapter has a delta or a correction here."""
        return adapter in self.adaptq_delta or self.is_corrected_by(adapter)

    def parts_of(self, adapter: str) -> dict[str, nn.Module]:
        """The modules that hold what an adapter trains here, by the name of the dictionary that each is in."""
        kinds = {kind: getattr(self, kind) for kind in self.adapter_layer_names}
        return {kind: modules[adapter] for kind, modules in kinds.items() if adapter in modules}

    def parameters_of(self, adapter: str) -> list[tuple[str, nn.Parameter]]:
        """What an adapter trains here, by the names in its file, such as "adaptq_delta.weight"."""
        parts = self.parts_of(adapter).items()
        return [(f"{kind}.{name}", parameter) for kind, part in parts for name, parameter in part.named_parameters()]

    @property
    def is_empty(self) -> bool:
        """Whether no adapter has a delta or a correction here."""
        return not self.adaptq_delta and not self.adaptq_low_rank_A

    def take_adapters_of(self, other: AdaptQLayer) -> None:
        """Hold the deltas and corrections of another layer, too, which wraps the same linear in another form."""
        for name in self.adapter_layer_names:
            setattr(self, name, getattr(other, name))
        self.scaling = dict(other.scaling)
        self._active_adapter = other._active_adapter
        self._disable_adapters = other._disable_adapters

    def restore_adapter(self, adapter_name: str, parts: dict[str, nn.Module], scale: float | None) -> None:
        """Put an adapter back as it was, or forget it, without choosing an active one as `delete_adapter` does.

        Args:
            adapter_name: its name.
            parts: what `parts_of` gave; empty: there was no such adapter here.
            scale: its entry in `scaling`; `None` where it had none.
        """
        for kind in self.parts_of(adapter_name):
            del getattr(self, kind)[adapter_name]
        for kind, part in parts.items():
            getattr(self, kind)[adapter_name] = part
        self.scaling.pop(adapter_name, None)
        if scale is not None:
            self.scaling[adapter_name] = scale

    def add_quantized(self, quantized: nn.Module, adapters: list[str]) -> None:
        """Run `quantized` instead of the wrapped layer for these adapters."""
        self.adaptq_frozen = quantized
        self.quantized_for.update(dict.fromkeys(adapters, True))

    def forget_quantized(self, adapter: str) -> None:
        """Undo `add_quantized` for one adapter."""
        self.quantized_for.pop(adapter, None)
        if not self.quantized_for:
            self.adaptq_frozen = None

    def is_quantized_for(self, adapters: list[str]) -> bool:
        """Whether all of the adapters, at least one, see this layer quantized."""
        if self.adaptq_frozen is None:
            return is_quantized(self.base_layer)
        return bool(adapters) and all(name in self.quantized_for for name in adapters)

    def form_for(self, adapters: list[str]) -> nn.Module:
        """The layer that runs for these adapters: the wrapped one, or its quantized copy."""
        has_copy = self.adaptq_frozen is not None and self.is_quantized_for(adapters)
        return self.adaptq_frozen if has_copy else self.base_layer  # type: ignore[return-value]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set s in W0 + s * delta, or in s * B A, for one adapter. Unknown ones are ignored, as in PEFT's layers."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is not None:
            return self._forward_mixed_batch(adapter_names, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.adaptq_merged is not None:
            return _run(self.adaptq_merged, *args, **kwargs)
        form = self.form_for(self.merged_adapters or self.active_adapters)
        adapters = [] if self.disable_adapters or self.merged else self.active_adapters
        return self._forward_through(form, adapters, *args, **kwargs)

    def _forward_through(self, form: nn.Module, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        """What one form of the layer gives, with the deltas and corrections of these adapters."""
        deltas = [name for name in adapters if name in self.adaptq_delta]
        output = self._forward_with_deltas(deltas, *args, **kwargs) if deltas else _run(form, *args, **kwargs)
        for name in adapters:
            if self.is_corrected_by(name):
                x = args[0] if args else next(iter(kwargs.values()))
                a, b = self.adaptq_low_rank_A[name], self.adaptq_low_rank_B[name]
                output = add_correction(output, x, a, b, self.scaling[name])
        return output

    def _forward_mixed_batch(self, adapter_names: list[str], *args: Any, **kwargs: Any) -> Any:
        """Each sample through the adapter that `adapter_names` gives for it; "__base__" is none."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        size = len(args[0] if args else next(iter(kwargs.values())))
        if size % len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {size} respectively."
            )
        names = [name for name in adapter_names for _ in range(size // len(adapter_names))]
        rows_of = {name: [row for row, of in enumerate(names) if of == name] for name in dict.fromkeys(names)}
        parts = []
        for adapter, rows in rows_of.items():
            inputs = [_rows(value, rows, size) for value in args]
            named = {key: _rows(value, rows, size) for key, value in kwargs.items()}
            parts.append(self._forward_as(adapter, *inputs, **named))
        order = torch.tensor([*chain.from_iterable(rows_of.values())]).argsort()
        if isinstance(parts[0], tuple):  # a router of experts
            return tuple(_in_order(tensors, order) for tensors in zip(*parts, strict=True))
        return _in_order(parts, order)

    def _forward_as(self, adapter: str, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives for one adapter; "__base__" is the base as the active adapters see it."""
        if adapter == "__base__":
            return _run(self.form_for(self.active_adapters), *args, **kwargs)
        return self._forward_through(self.form_for([adapter]), [adapter], *args, **kwargs)

    def _applied_adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.adaptq_delta]

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the base layer, or W0 + s * delta, made anew at each read, where it is read to compute with.

        Not everywhere, because models also read `weight.dtype` and the like, for which no sum should be formed.
        """
        return self._read("weight")

    @property
    def bias(self) -> torch.Tensor:
        """As `weight`."""
        return self._read("bias")

    def _read(self, name: str) -> torch.Tensor:
        base = getattr(self.base_layer, name)
        if not self.read_directly or self.disable_adapters or self.merged or name not in self._parameter_names:
            return base
        if self.in_mixed_batch:
            raise ValueError(
                f"`adapter_names` can't be used here: the module around a {type(self.base_layer).__name__} reads its "
                f"{name}, which is one for all samples. Run the samples of each adapter as a batch of their own."
            )
        adapters = self._applied_adapters()
        return self._adapted(name, base, adapters, base.dtype) if adapters else base

    def _forward_with_deltas(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        """The path for any layer: its forward, with other tensors in place of its parameters."""
        parameters = {
            name: self._adapted(name, parameter, adapters, parameter.dtype)
            for name, parameter in self._base_parameters().items()
        }
        # While FSDP has gathered a parameter, an attribute of the same name hides it.
        attributes = vars(self.base_layer)
        gathered = {name: attributes.pop(name) for name in parameters if name in attributes}
        try:
            return torch.func.functional_call(self.base_layer, parameters, args, kwargs)
        finally:
            attributes.update(gathered)

    def _base_parameters(self) -> dict[str, torch.Tensor]:
        """The layer's own parameters by name. Attributes, because FSDP replaces parameters by plain tensors."""
        return {name: getattr(self.base_layer, name) for name in self._parameter_names}

    def _deltas(self, name: str, adapters: list[str]) -> list[torch.Tensor]:
        return [getattr(self.adaptq_delta[adapter], name) for adapter in adapters]

    def _product(self, adapter: str, transposed: bool) -> torch.Tensor:
        """B A of a correction, [out, in] or, if `transposed`, [in, out], in float32 at least."""
        a, b = self.factors_of(adapter)
        dtype = torch.promote_types(a.dtype, torch.float32)
        product = b.detach().to(dtype) @ a.detach().to(dtype)
        return product.t() if transposed else product

    def _scales(self, adapters: list[str]) -> list[float]:
        return [self.scaling[adapter] for adapter in adapters]

    def _adapted(self, name: str, base: torch.Tensor, adapters: list[str], dtype: torch.dtype) -> torch.Tensor:
        return add_deltas(base, self._deltas(name, adapters), self._scales(adapters), dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add deltas and corrections to the base parameters. The originals are kept, so `unmerge` is exact.

        A quantized linear can't hold a correction: while merged, a plain layer with its dequantized weight and the
        correction runs in its place, in the memory of a plain layer.

        Args:
            safe_merge: check the merged weights first, and raise instead of merging if some are not finite.
            adapter_names: adapters to merge; `None`: the active ones.

        Raises:
            ValueError: with `safe_merge`, if a merged weight is not finite.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if not new:
            return
        names = self.merged_adapters + new
        if self.is_quantized_for(names):
            self.adaptq_merged = self.corrected(dequantize_linear(self.form_for(names)), names, safe_merge)
        else:
            self._merge_into_base(names, safe_merge)
            self.adaptq_merged = None
        self.merged_adapters.extend(new)

    def _merge_into_base(self, adapters: list[str], safe_merge: bool) -> None:
        parameters = self._base_parameters()
        originals = self._originals() or {name: parameter.data for name, parameter in parameters.items()}
        merged = {name: self._merged(name, original, adapters) for name, original in originals.items()}
        if safe_merge:
            _check_finite(merged.values(), adapters)
        for name, tensor in merged.items():
            parameters[name].data = tensor
        self._unmerged_data = originals

    @torch.no_grad()
    def _merged(self, name: str, original: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        """A parameter, in the orientation of the wrapped layer, with the deltas and corrections of these adapters."""
        deltas = [adapter for adapter in adapters if adapter in self.adaptq_delta]
        corrections = [adapter for adapter in adapters if name == "weight" and self.is_corrected_by(adapter)]
        transposed = isinstance(self.base_layer, Conv1D)
        added = self._deltas(name, deltas) + [self._product(adapter, transposed) for adapter in corrections]
        return add_deltas(original, added, self._scales(deltas + corrections), original.dtype) if added else original

    @torch.no_grad()
    def corrected(self, plain: nn.Module, adapters: list[str], check_finite: bool = False) -> nn.Module:
        """A plain copy of the linear that this layer wraps, with the corrections of these adapters in its weight.

        Args:
            plain: `nn.Linear` or `Conv1D` with the weight to correct; stays as it is.
            adapters: those without a correction here are ignored.
            check_finite: raise ValueError if a value of the result is not finite. Default `False`.
        """
        corrections = [adapter for adapter in adapters if self.is_corrected_by(adapter)]
        transposed = isinstance(plain, Conv1D)
        products = [self._product(adapter, transposed) for adapter in corrections]
        weight: Any = plain.weight
        weight = add_deltas(weight, products, self._scales(corrections), weight.dtype) if products else weight
        if check_finite:
            _check_finite([weight], corrections)
        linear_class = Conv1D if transposed else nn.Linear
        bias: Any = plain.bias
        return linear_from_tensors(linear_class, weight.detach(), bias).train(plain.training)

    def unmerge(self) -> None:
        """Put back the tensors from before the merge: subtracting a delta would not restore a bfloat16 weight."""
        for name, original in self._originals().items():
            getattr(self.base_layer, name).data = original
        self._unmerged_data = {}
        self.adaptq_merged = None
        self.merged_adapters.clear()

    def _originals(self) -> dict[str, torch.Tensor]:
        """The tensors from before the merge, moved and cast as the model has been since then."""
        now = self._base_parameters()
        return {
            name: original if now[name].is_meta else original.to(now[name].device, now[name].dtype)
            for name, original in self._unmerged_data.items()
        }

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the deltas but keep their dtype, unlike PEFT's default: they may be wider than the base's."""
        base = next(chain(self.base_layer.parameters(recurse=False), self.base_layer.buffers(recurse=False)))
        for own in self.parts_of(adapter_name).values():
            if not any(parameter.is_meta for parameter in (base, *own.parameters())):
                own.to(device or base.device)

    def __getattr__(self, name: str) -> Any:
        """Public attributes that models read from their layers (`in_features`, `nf`, `variance_epsilon`, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return f"adaptq.{super().__repr__()}"


class AdaptQLinear(AdaptQLayer):
    """`AdaptQLayer` for `nn.Linear` and `Conv1D` by one fused autograd function."""

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """s * delta of the weight, or s * B A, in the orientation of the weight."""
        if self.is_corrected_by(adapter):
            return self.correction_of(adapter)
        return self.scaling[adapter] * self._deltas("weight", [adapter])[0].detach()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can approximate this layer: by the delta of its weight or by B A, yes."""
        return self.has_adapter(adapter_name)

    def _forward_with_deltas(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or _has_hooks(self.base_layer):
            return super()._forward_with_deltas(adapters, *args, **kwargs)
        base: Any = self.base_layer
        weight, bias = base.weight, base.bias
        device: str = weight.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        output = delta_linear(
            args[0].to(weight.device, dtype),  # the device: a hook of accelerate would move it
            weight,
            None if bias is None else self._adapted("bias", bias, adapters, dtype),
            self._deltas("weight", adapters),
            self._scales(adapters),
            transposed=isinstance(self.base_layer, Conv1D),
        )
        return output if autocast else output.to(args[0].dtype)  # as `_run` does


def _check_finite(tensors: Iterable[torch.Tensor], adapters: list[str]) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken")


def _run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a layer, a plain linear in its own dtype and with an output in that of its input, as 4-bit linears do.

    `prepare_model_for_kbit_training` leaves float32 norms between 16-bit linears.
    """
    if type(layer) not in (nn.Linear, Conv1D) or len(args) != 1 or torch.is_autocast_enabled(args[0].device.type):
        return layer(*args, **kwargs)
    return layer(args[0].to(layer.weight.dtype)).to(args[0].dtype)


def _rows(value: Any, rows: list[int], size: int) -> Any:
    """The given rows of a tensor with one row a sample; anything else as it is."""
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim and len(value) == size else value


def _in_order(parts: Sequence[torch.Tensor], order: torch.Tensor) -> torch.Tensor:
    """Rows that were computed in parts, in the order of the samples."""
    joined = torch.cat(tuple(parts))
    return joined[order.to(joined.device)]


def _has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward and moving its input: the fused path would skip it."""
    hook = getattr(module, "_hf_hook", None)
    moves_input_only = isinstance(hook, AlignDevicesHook) and not hook.offload and not hook.io_same_device
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (hook is not None and not moves_input_only)
    )


def wrap_layer(target: nn.Module) -> AdaptQLayer:
    """A layer around a module with parameters of its own: `AdaptQLinear` where it fits. It has no adapter yet."""
    fits = type(target) in (nn.Linear, Conv1D) or is_quantized(target)
    return AdaptQLinear(target) if fits else AdaptQLayer(target)


def create_layer(target: nn.Module, adapter_name: str, config: AdaptQConfig, corrected: bool = False) -> AdaptQLayer:
    """`wrap_layer` with its first adapter, active: a delta on each parameter or, if `corrected`, a correction."""
    layer = wrap_layer(target)
    layer._active_adapter = adapter_name
    (layer.add_correction if corrected else layer.update_layer)(adapter_name, config)
    return layer
